"""Studies: the grids in `sweeps/`, run here in parallel and resumed by running them again.

Every job is a process of its own; finished ones are found again, so the same command resumes a
study. A study is every sweep whose name begins with the study's; its table is written from the
files of its runs.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from permlab.cli import main as command_line
from permlab.config.schema import CONF
from permlab.data.cores import count_cores
from permlab.errors import ConfigError, RunError, nearest
from permlab.record.rundir import is_done
from permlab.run.outlook import announce_jobs
from permlab.study.grid import read_sweep, sweep_comments, sweep_names
from permlab.study.jobs import resolve_jobs, run_jobs
from permlab.study.table import write_table

RESULTS = CONF.parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run sweeps or a study; returns the worst exit code of its jobs."""
    parser = argparse.ArgumentParser(prog="python -m permlab.sweep", description="Run studies.")
    parser.add_argument("names", nargs="*", help="stems of files in sweeps/; none: list them")
    parser.add_argument("--study", help="run every sweep whose name begins so, and write results/<study>.md and .csv")
    parser.add_argument("--processes", type=int, default=min(count_cores(), 8), help="jobs at a time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override for every job")
    parser.add_argument("--table", action="store_true", help="only write the table of what has been run")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    names = list(options.names)
    if options.study and not re.fullmatch(r"\w+", options.study):
        raise ConfigError(f"--study {options.study}: no name of a study")
    if options.study:
        names += sweep_names(f"{options.study}_")
    if not names and options.study:
        studies = {name.partition("_")[0] for name in sweep_names()}
        raise ConfigError(
            f"--study {options.study}: no sweep's name begins so{nearest(options.study, sorted(studies))}"
        )
    if not names:
        print(_listing())
        return 0
    threads = [] if options.processes == 1 else ["num_threads=1"]
    jobs = [[*threads, *job, *options.set] for name in names for job in read_sweep(name)]
    plans = resolve_jobs("train", jobs)
    if not options.table:
        print(announce_jobs(plans), flush=True)
    codes = [] if options.table else run_jobs(command_line, "train", jobs, plans, num_processes=options.processes)
    finished = [plan for plan in plans if plan is not None and is_done(plan.directory)]
    print(write_table(finished, RESULTS / (options.study or "_".join(names))))
    return max(codes, default=0)


def _listing() -> str:
    """Every sweep with its comment."""
    comments = sweep_comments()
    width = max(map(len, comments), default=0)
    lines = [f"{name:<{width}}  {comment}" for name, comment in comments.items()]
    how = (
        "make sweep NAME=<name> runs one, or goes on with it; python -m permlab.sweep --study <first word> runs several"
    )
    return "\n".join([*lines, how])


if __name__ == "__main__":
    sys.exit(main())
