"""How the processes of a run die together: none outlives another for long."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from permlab.errors import RankError
from permlab.record.rundir import fail_run

POLL_SECONDS = 1.0
# What a rank has to end by itself once another has.
GRACE_SECONDS = 10.0

# Lightning starts them at the first training of a process, and later ones of that process share them.
_LAUNCHED: list[subprocess.Popen] = []


def watch_ranks(trainer: L.Trainer, run_dir: Path) -> None:
    """End this process soon after another rank of its launcher has died.

    A collective operation may wait long for a rank that is gone. Ranks that torchrun or SLURM
    have started are watched by those.
    """
    launcher = trainer.strategy.launcher
    observed = getattr(launcher, "procs", [])
    if observed:
        _LAUNCHED.extend(observed)
        # Lightning's own observer holds this list. It would end this process by SIGKILL, without a word.
        launcher.procs = list(observed)  # type: ignore[union-attr]
        observed.clear()
        _start_thread(_watch_children, run_dir)
    elif os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        _start_thread(_watch_parent, os.getppid())


def _start_thread(target: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=target, args=arguments, daemon=True, name="watch-ranks").start()


def _watch_children(run_dir: Path) -> None:
    while all(process.poll() in (None, 0) for process in _LAUNCHED):
        time.sleep(POLL_SECONDS)
    # Most often this process has noticed too, and is on its way out with a better message.
    time.sleep(2 * POLL_SECONDS)
    message = describe_dead()
    print(f"error: {message}", file=sys.stderr, flush=True)
    fail_run(run_dir, f"RankError: {message}")
    for process in _LAUNCHED:
        process.kill()
    os._exit(RankError.exit_code)


def describe_dead() -> str:
    """Which ranks have died of what, and what to do."""
    ended = [(rank, p) for rank, p in enumerate(_LAUNCHED, start=1) if p.poll() not in (None, 0)]
    names = [f"rank {rank} (process {p.pid}) {_ending(p.returncode)}" for rank, p in ended]
    found = "; ".join(names) or "the connection to another rank broke"
    return f"{found}; checkpoints/last.ckpt is the last good state, the same command goes on from it"


def _ending(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    time.sleep(GRACE_SECONDS)
    os._exit(RankError.exit_code)


@contextmanager
def end_ranks(trainer: L.Trainer) -> Iterator[None]:
    """If the block fails here, see to it that the other ranks end, and name one that died as the reason."""
    try:
        yield
    except BaseException as error:
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end and any(process.poll() is None for process in _LAUNCHED):
            time.sleep(0.1)
        for process in _LAUNCHED:
            process.kill()
        if trainer.world_size > 1 and _is_broken_connection(error):
            raise RankError(describe_dead()) from error
        raise


def _is_broken_connection(error: BaseException) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("gloo", "connection", "nccl")
    return type(error) is RuntimeError and any(word in str(error).lower() for word in words)
