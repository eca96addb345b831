"""Run many configurations, each in a fresh process of its own.

A process per job keeps one job's ranks, random state, W&B run and GPU memory out of the next
(Lightning's data-parallel children otherwise repeat the whole sweep). The processes fork from a
server that has imported the libraries and done nothing else, so a job starts in well under a
second without inheriting anything that was computed.
"""

import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from permlab.config import CONF, digest, run_directory
from permlab.errors import ConfigError
from permlab.report import headline
from permlab.rundir import is_done, read_summary
from permlab.secret import redact

# Left behind by a launcher around us or by an earlier job; each job sets its own.
RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
OTHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")
ORDER_COLUMNS = {"control": "_control", "learned": "", "refit": "_refit"}
PRUNING_COLUMNS = {"dense": "_dense", "unpermuted": "_unpermuted", "pruned": ""}


def multirun(name: str, jobs: Sequence[Sequence[str]]) -> int:
    """Run every job in turn; a failed one does not stop the others.

    Returns:
        0 if every job ended well; 2 if not one had a usable configuration; otherwise 1, or
        128 + signal if the sweep was interrupted.
    """
    from permlab.cli import resolve

    codes: list[int] = []
    configs: list[dict[str, Any] | None] = []
    for number, job in enumerate(jobs, start=1):
        print(redact(f"[{number}/{len(jobs)}] {' '.join(job)}"), flush=True)
        try:
            configs.append(resolve(name, job)[0])
        except ConfigError as error:
            print(redact(f"error: {' '.join(str(error).split())}"), file=sys.stderr)
            configs.append(None)
            codes.append(2)
            continue
        codes.append(run_isolated(name, job))
        if codes[-1] in (130, 143):
            print(f"interrupted after {number} of {len(jobs)} jobs; the same command goes on from here")
            return codes[-1]
    if name == "train":
        print(table(jobs, configs, codes))
    failed = [code for code in codes if code]
    return 0 if not failed else 2 if all(code == 2 for code in codes) else 1


def run_isolated(name: str, job: Sequence[str]) -> int:
    """Exit code of one job, run in a process forked from the preloaded server."""
    process = start_job(name, job)
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        _join(process)
    finally:
        signal.signal(signal.SIGTERM, previous)
    code = process.exitcode or 0
    return 128 - code if code < 0 else code


def start_job(name: str, job: Sequence[str]) -> BaseProcess:
    """A job that has been started in a process forked from the preloaded server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["permlab.run"])
    # Lightning reads its rank when it is imported, so the server must not see that of a launcher around us.
    with _hidden((*RANK_VARIABLES, *OTHER_VARIABLES)):
        forkserver.ensure_running()
    # Lightning's launcher starts further ranks from sys.argv.
    script = str(CONF.parent / f"{name}.py")
    process = context.Process(target=_job, args=(name, script, list(job), dict(os.environ), os.getpid()))
    process.start()
    return process


@contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """The environment without these variables."""
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


def _join(process: BaseProcess) -> None:
    """Wait; Ctrl-C reaches the job by itself, which saves and ends, so go on waiting for that."""

    def wait(number: int, frame: FrameType | None) -> None: ...

    previous = signal.signal(signal.SIGINT, wait)
    try:
        process.join()
    finally:
        signal.signal(signal.SIGINT, previous)


def _job(name: str, script: str, job: list[str], environment: dict[str, str], driver: int) -> None:
    from permlab.cli import main
    from permlab.ops.threads import trust_openmp

    trust_openmp(True)  # the server has only imported
    os.environ.clear()
    os.environ.update({k: v for k, v in environment.items() if k not in (*RANK_VARIABLES, *OTHER_VARIABLES)})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A job inherits the server's way of starting processes; its loaders' workers would import everything anew.
    multiprocessing.set_start_method(None, force=True)
    sys.argv = [script, *job]
    threading.Thread(target=_follow, args=(driver,), daemon=True, name="follow-driver").start()
    sys.exit(main(name, job))


def _follow(driver: int) -> None:
    """Ask this job to save and end once the process that started it has died, which no longer can."""
    while True:
        time.sleep(0.5)
        try:
            os.kill(driver, 0)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def table(jobs: Sequence[Sequence[str]], configs: Sequence[dict[str, Any] | None], codes: Sequence[int]) -> str:
    """One line per job, then mean and standard deviation over the seeds of each configuration."""
    swept = _swept(jobs)
    summaries = [_summary(config, code) for config, code in zip(configs, codes, strict=True)]
    finished = [summary for summary in summaries if summary is not None]
    metric = headline(finished[0]) if finished else "test/accuracy"
    pruned = any(f"{metric}_unpermuted" in summary for summary in finished)
    columns = PRUNING_COLUMNS if pruned else ORDER_COLUMNS
    keys = [metric + suffix for suffix in columns.values()]
    rows = []
    for job, summary, code in zip(jobs, summaries, codes, strict=True):
        failed = [f"failed (exit {code})", "", ""]
        rows.append([_label(job, swept), *(failed if summary is None else [_cell(summary, key) for key in keys])])
    groups: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        if config is not None and summaries[index] is not None:
            groups.setdefault(digest(config), []).append(index)
    for members in groups.values():
        if len(members) > 1:
            first = _label(jobs[members[0]], [i for i in swept if not jobs[members[0]][i].startswith("seed=")])
            of_seeds = [summary for i in members if (summary := summaries[i]) is not None]
            rows.append([f"{first or 'all'} ({len(members)} seeds)", *(_spread(of_seeds, key) for key in keys)])
    title = "test accuracy, %" if metric == "test/accuracy" else "test perplexity"
    return _format([[title, *columns], *rows])


def _summary(config: dict[str, Any] | None, code: int) -> dict[str, float] | None:
    if config is None or code or not is_done(run_directory(config)):
        return None
    return read_summary(run_directory(config))


def _swept(jobs: Sequence[Sequence[str]]) -> list[int]:
    return [index for index in range(len(jobs[0])) if len({job[index] for job in jobs}) > 1]


def _label(job: Sequence[str], swept: Sequence[int]) -> str:
    return " ".join(job[index] for index in swept)


def _cell(summary: dict[str, float], key: str) -> str:
    return _number(summary[key], key) if key in summary else "-"


def _number(value: float, key: str) -> str:
    return f"{100 * value:.1f}" if key.startswith("test/accuracy") else f"{value:.3f}"


def _spread(summaries: Sequence[dict[str, float]], key: str) -> str:
    values = [summary[key] for summary in summaries if key in summary]
    if len(values) < 2:
        return "-"
    return f"{_number(statistics.mean(values), key)} +- {_number(statistics.stdev(values), key)}"


def _format(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
