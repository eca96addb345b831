"""Studies: the grids in `sweeps/`, run here in parallel and resumed by running them again.

A sweep file has the format of a W&B sweep, so `wandb sweep sweeps/<stem>.yaml` runs the same
grid on a server. Here every job is a process of its own; finished ones are found again, so the
same command resumes a study. A study is every sweep whose name begins with the study's; its
table is written from the files of its runs.
"""

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import yaml

from permlab.compose import resolve_train
from permlab.config import run_directory
from permlab.errors import ConfigError, RunError
from permlab.multirun import start_job
from permlab.rundir import is_done
from permlab.schema import CONF, nearest

SWEEPS = CONF.parent / "sweeps"
RESULTS = CONF.parent / "results"


def read_sweep(name: str) -> list[list[str]]:
    """Jobs of `sweeps/<name>.yaml`, each a list of overrides; the last parameter varies fastest.

    Raises:
        ConfigError: if there is no such file, or it is no grid.
    """
    path = SWEEPS / f"{name}.yaml"
    if not re.fullmatch(r"\w[\w.-]*", name) or not path.is_file():
        raise ConfigError(f"NAME={name}: no such sweep{nearest(name, [file.stem for file in SWEEPS.glob('*.yaml')])}")
    try:
        sweep = dict(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if sweep.get("method") != "grid":
        raise ConfigError(f"{path.name}: method={sweep.get('method')}; only a grid is run here")
    axes = []
    for key, choice in sweep["parameters"].items():
        values = choice.get("values", [choice["value"]] if "value" in choice else [])
        if not values:
            raise ConfigError(f"{path.name}: parameters.{key}={choice}: expected value or values")
        axes.append([f"{key}={value if isinstance(value, str) else _word(value)}" for value in values])
    return [list(job) for job in itertools.product(*axes)]


def _word(value: Any) -> str:
    """A value as Hydra's grammar has it: JSON, but for the keys, which are not quoted."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_word(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_word, value)) + "]"
    return json.dumps(value)


def run_jobs(jobs: Sequence[Sequence[str]], *, num_processes: int) -> list[int]:
    """Exit code of every job, run so many at a time, one torch thread each where there are several.

    Finished runs are not started again; a failed job does not stop the others.
    """
    codes: dict[int, int] = {}
    running: dict[Any, tuple[int, BaseProcess]] = {}
    waiting = list(enumerate(jobs))
    began = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                index, job = waiting.pop(0)
                code = _done(job)
                if code is not None:
                    codes[index] = code
                    continue
                process = start_job("train", job)
                running[process.sentinel] = index, process
            for sentinel in wait(list(running)) if running else []:
                index, process = running.pop(sentinel)
                process.join()
                code = process.exitcode or 0
                codes[index] = 128 - code if code < 0 else code  # killed by a signal
                minutes = (time.monotonic() - began) / 60
                print(
                    f"[{len(codes)}/{len(jobs)}] {minutes:.1f} min, exit {codes[index]}: {' '.join(jobs[index])}",
                    flush=True,
                )
    finally:
        for _, process in running.values():
            process.terminate()
    return [codes[index] for index in range(len(jobs))]


def _done(job: Sequence[str]) -> int | None:
    """0 for a job whose run is finished, 2 for one that cannot run, None for one to start."""
    try:
        return 0 if is_done(run_directory(resolve_train(job)[0])) else None
    except ConfigError as error:
        print(f"error: {' '.join(job)}: {error}", file=sys.stderr)
        return 2


def _resolve(job: Sequence[str]) -> dict[str, Any] | None:
    """Configuration of a job; None where there is none, which has been reported."""
    try:
        return resolve_train(job)[0]
    except ConfigError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run sweeps or a study; returns the worst exit code of its jobs."""
    parser = argparse.ArgumentParser(prog="python -m permlab.sweep", description="Run studies.")
    parser.add_argument("names", nargs="*", help="stems of files in sweeps/")
    parser.add_argument("--study", help="run every sweep whose name begins so, and write results/<study>.md and .csv")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8), help="jobs at a time")
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
        names += sorted(path.stem for path in SWEEPS.glob(f"{options.study}_*.yaml"))
    if not names:
        raise ConfigError(f"nothing to run{nearest('', [file.stem for file in SWEEPS.glob('*.yaml')])}")
    threads = [] if options.processes == 1 else ["num_threads=1"]
    jobs = [[*threads, *job, *options.set] for name in names for job in read_sweep(name)]
    codes = [] if options.table else run_jobs(jobs, num_processes=options.processes)
    from permlab.table import write_table

    configs = [config for job in jobs if (config := _resolve(job)) is not None]
    finished = [config for config in configs if is_done(run_directory(config))]
    stem = options.study or "_".join(names)
    print(write_table(finished, RESULTS / stem))
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
