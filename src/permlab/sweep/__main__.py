"""Studies: the grids in `sweeps/`, run here in parallel and resumed by running them again.

Every job is a process of its own; finished ones are found again, so the same command resumes a
study. A study is every sweep whose name begins with the study's; its table is written from the
files of its runs, and with `--kept` from what `results/<study>.jsonl` says of those of other machines.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from permlab.cli import main as command_line
from permlab.config.plan import Plan
from permlab.config.schema import CONF
from permlab.data.cores import count_cores
from permlab.errors import ConfigError, RunError, nearest
from permlab.run.companion import companion_plan
from permlab.run.outlook import announce_jobs
from permlab.study.finished import Finished, Kept, find_finished, read_kept, run_name, write_kept
from permlab.study.grid import Job, read_sweep, studies, sweep_comments, sweep_names
from permlab.study.jobs import resolve_jobs, run_jobs
from permlab.study.table import write_table

RESULTS = CONF.parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run sweeps or a study; returns the worst exit code of its jobs."""
    parser = argparse.ArgumentParser(prog="python -m permlab.sweep", description="Run studies.")
    parser.add_argument("names", nargs="*", help="stems of files in sweeps/; none: list them")
    parser.add_argument(
        "--study",
        nargs="?",
        const="",
        metavar="NAME",
        help="run every sweep whose name begins so, and write results/<study>.md and .csv; no name: list the studies",
    )
    parser.add_argument("--processes", type=int, default=min(count_cores(), 8), help="jobs at a time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override for every job")
    parser.add_argument("--table", action="store_true", help="only write the table of what has been run")
    parser.add_argument(
        "--kept", action="store_true", help="do not run again what results/<name>.jsonl says has been run elsewhere"
    )
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    names = list(options.names)
    if options.study:
        names += _sweeps_of(options.study)
    if not names:
        print(_listing() if options.study is None else _listing_of_studies())
        return 0
    threads = [] if options.processes == 1 else ["num_threads=1"]
    jobs = [[*threads, *job, *options.set] for name in names for job in read_sweep(name)]
    plans = resolve_jobs("train", jobs)
    path = RESULTS / (options.study or "_".join(names))
    kept = read_kept(path.with_suffix(".jsonl")) if options.kept else {}
    codes = [] if options.table else _run_rest(jobs, plans, kept, options.processes)
    runs = [run for plan in plans if (run := find_finished(plan, kept)) is not None]
    if not runs:
        print(f"nothing of it has been run: {path}.md stays as it is")
        return max(codes, default=0)
    write_kept(runs, path.with_suffix(".jsonl"))
    print(write_table(runs, path, before=_before(runs)))
    return max(codes, default=0)


def _run_rest(jobs: Sequence[Job], plans: Sequence[Plan | None], kept: Kept, num_processes: int) -> list[int]:
    """Exit codes of the jobs that have not been run elsewhere."""
    rest = [index for index, plan in enumerate(plans) if plan is None or plan.is_forced or run_name(plan) not in kept]
    jobs, plans = [jobs[index] for index in rest], [plans[index] for index in rest]
    print(announce_jobs(plans), flush=True)
    return run_jobs(command_line, "train", jobs, plans, num_processes=num_processes)


def _sweeps_of(study: str) -> list[str]:
    """Stems of a study's sweeps, in the order in which they are run.

    Raises:
        ConfigError: if no sweep's name begins so.
    """
    if not re.fullmatch(r"\w+", study):
        raise ConfigError(f"--study {study}: no name of a study")
    names = sweep_names(f"{study}_")
    if not names:
        raise ConfigError(f"--study {study}: no sweep's name begins so{nearest(study, sorted(studies()))}")
    return names


def _before(runs: Sequence[Finished]) -> list[Finished]:
    """Finished runs that others needed before them, each once."""
    found = {}
    for plan in (run.plan for run in runs):
        for companion in plan.task.before(plan).values():
            if companion.run is None:
                other = companion_plan(plan, companion)
                found[other.directory] = other
    return [run for plan in found.values() if (run := find_finished(plan)) is not None]


def _listing_of_studies() -> str:
    """Every study with the number of its sweeps and jobs."""
    counts = {name: (len(names), sum(len(read_sweep(sweep)) for sweep in names)) for name, names in studies().items()}
    width = max(map(len, counts), default=0)
    lines = [f"{name:<{width}}  sweeps: {sweeps}, jobs: {jobs}" for name, (sweeps, jobs) in counts.items()]
    return "\n".join(
        [*lines, "python -m permlab.sweep --study <name> runs one, or goes on with it, and prints its table"]
    )


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
