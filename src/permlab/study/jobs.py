"""The runner of jobs: many configurations, each in a fresh process of its own.

A process per job keeps one job's ranks, random state, W&B run and GPU memory out of the next
(Lightning's data-parallel children otherwise repeat the whole sweep). The processes fork from a
server that has imported the libraries and done nothing else, so a job starts in well under a
second without inheriting anything that was computed.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from permlab.config.compose import resolve
from permlab.config.plan import Plan
from permlab.config.schema import CONF
from permlab.config.secret import redact
from permlab.errors import ConfigError
from permlab.record.rundir import is_done
from permlab.study.grid import Job

# Left behind by a launcher around us or by an earlier job; each job sets its own.
RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
OTHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")
# Exit codes of a job that was asked to stop.
INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)

# What a process runs: the command line of `train` or `eval`.
Main = Callable[[str, Sequence[str]], int]


def resolve_jobs(name: str, jobs: Sequence[Job]) -> list[Any]:
    """What every job is asked for, a plan for `train`; None, with a line on stderr, for one that is refused."""
    plans: list[Any] = []
    for number, job in enumerate(jobs, start=1):
        try:
            plans.append(resolve(name, job))
        except ConfigError as error:
            line = f"error: {' '.join(str(error).split())} (job {number} of {len(jobs)}: {' '.join(job)})"
            print(redact(line), file=sys.stderr)
            plans.append(None)
    return plans


def run_jobs(main: Main, name: str, jobs: Sequence[Job], plans: Sequence[Any], *, num_processes: int = 1) -> list[int]:
    """Exit code of every job, run so many at a time; those of jobs that were not reached are left out.

    One without a plan is not started, and has 2; a finished run is not started again, unless it is
    forced, and has 0. A failed job does not stop the others; one that was interrupted does. Where
    jobs run one at a time, each is announced before it starts; otherwise a line tells that it has ended.

    Args:
        main: the command line, which a job's process calls with `name` and the job.
        plans: of the jobs, see `resolve_jobs`.
    """
    codes: dict[int, int] = {}
    running: dict[Any, tuple[int, BaseProcess]] = {}
    waiting = list(enumerate(jobs))
    began = time.monotonic()
    with _passing_on(running):
        while waiting or running:
            while waiting and len(running) < num_processes:
                index, job = waiting.pop(0)
                if num_processes == 1:
                    print(redact(f"[{index + 1}/{len(jobs)}] {' '.join(job)}"), flush=True)
                code = _known_code(plans[index])
                if code is None:
                    process = start_job(main, name, job)
                    running[process.sentinel] = index, process
                else:
                    codes[index] = code
            for sentinel in wait(list(running)) if running else []:
                index, process = running.pop(sentinel)
                process.join()
                codes[index] = _code(process)
                if num_processes > 1:
                    _tell(codes, jobs, index, began)
                if codes[index] in INTERRUPTED:
                    waiting.clear()
    if len(codes) < len(jobs):
        print(f"interrupted after {len(codes)} of {len(jobs)} jobs; the same command goes on from here")
    return [codes[index] for index in sorted(codes)]


def _known_code(plan: Any) -> int | None:
    """Exit code of a job that need not be started."""
    if plan is None:
        return ConfigError.exit_code
    is_over = isinstance(plan, Plan) and is_done(plan.directory) and not plan.is_forced
    return 0 if is_over else None


def _tell(codes: dict[int, int], jobs: Sequence[Job], index: int, began: float) -> None:
    minutes = (time.monotonic() - began) / 60
    line = f"[{len(codes)}/{len(jobs)}] {minutes:.1f} min, exit {codes[index]}: {' '.join(jobs[index])}"
    print(redact(line), flush=True)


def _code(process: BaseProcess) -> int:
    code = process.exitcode or 0
    return 128 - code if code < 0 else code  # killed by a signal


def worst_code(codes: Sequence[int]) -> int:
    """0 if every job ended well; the code of an interruption; 2 if not one had a usable configuration; otherwise 1."""
    interrupted = [code for code in codes if code in INTERRUPTED]
    if interrupted:
        return interrupted[0]
    failed = [code for code in codes if code]
    return 0 if not failed else 2 if all(code == ConfigError.exit_code for code in codes) else 1


@contextmanager
def _passing_on(running: dict[Any, tuple[int, BaseProcess]]) -> Iterator[None]:
    """SIGTERM goes to the jobs. Ctrl-C reaches them by itself; they save and end, and are waited for."""

    def pass_on(*_: Any) -> None:
        for _index, process in running.values():
            process.terminate()

    handlers: dict[int, Any] = {signal.SIGTERM: pass_on, signal.SIGINT: lambda *_: None}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        pass_on()
        for number in previous:
            signal.signal(number, previous[number])


def start_job(main: Main, name: str, job: Sequence[str]) -> BaseProcess:
    """A job that has been started in a process forked from the preloaded server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["permlab.run.story"])
    # Lightning reads its rank when it is imported, so the server must not see that of a launcher around us.
    with _hidden((*RANK_VARIABLES, *OTHER_VARIABLES)):
        forkserver.ensure_running()
    # Lightning's launcher starts further ranks from sys.argv.
    script = str(CONF.parent / f"{name}.py")
    process = context.Process(target=_job, args=(main, name, script, list(job), dict(os.environ), os.getpid()))
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


def _job(main: Main, name: str, script: str, job: list[str], environment: dict[str, str], driver: int) -> None:
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
