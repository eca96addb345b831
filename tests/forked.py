"""Processes of their own for tests, forked from a server that has imported the libraries once."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from permlab.cli import main
from permlab.ops.threads import trust_openmp

TIMEOUT_SECONDS = 240


def start(
    call: Callable[..., Any], arguments: Sequence[Any], logs: tuple[Path, Path], variables: Mapping[str, str]
) -> BaseProcess:
    """A process in which a function of a module is called, under these environment variables besides its own.

    Args:
        logs: files that standard output and standard error go to.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["permlab.run.story"])
    process = context.Process(target=_call, args=(call, arguments, *map(str, logs), dict(variables)))
    process.start()
    return process


def run(
    call: Callable[..., Any], arguments: Sequence[Any], folder: Path, variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Such a process, from its start to its end; its output goes through files in `folder`."""
    logs = (folder / "stdout", folder / "stderr")
    process = start(call, arguments, logs, variables)
    process.join(TIMEOUT_SECONDS)
    return subprocess.CompletedProcess(list(arguments), process.exitcode or 0, *(log.read_text() for log in logs))


def train(words: list[str]) -> None:
    """`python train.py`, in this process, which it ends."""
    torch.set_num_threads(1)
    sys.argv = ["train.py", *words]
    sys.exit(main("train", words))


def _call(call: Callable[..., Any], arguments: Sequence[Any], out: str, err: str, variables: dict[str, str]) -> None:
    trust_openmp(True)  # the server has only imported
    os.environ.update(variables)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    call(*arguments)
