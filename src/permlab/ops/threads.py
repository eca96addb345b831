"""How compiled kernels are run: in how many threads, in whose, and when they cannot be."""

import ctypes
import itertools
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def is_readable(tensor: Tensor) -> bool:
    """Whether a compiled kernel can read this tensor: it lies in the memory of the CPU and is nobody's stand-in."""
    return tensor.device.type == "cpu" and not is_traced() and type(tensor) in (Tensor, nn.Parameter)


def is_stand_in(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers, as when a computation is only counted."""
    return tensor.device.type == "meta"


def is_traced() -> bool:
    """Whether torch.compile or torch.func is at work: their tensors have no memory to point a kernel at."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def as_batch(x: Tensor, num_axes: int) -> np.ndarray:
    """The numbers as contiguous arrays of so many axes along one batch axis; a view where they lie like that."""
    shape = x.shape[-num_axes:]
    return np.ascontiguousarray(x.detach().numpy()).reshape(x.shape[:-num_axes].numel(), *shape)


def run_tasks(kernel: Callable[..., None], num_tasks: int, work: int, *arguments: object) -> None:
    """Run a kernel over all its tasks in as many threads as torch uses; fewer where there is little to do.

    The kernel releases the interpreter's lock, so any threads do.
    """
    num_threads = min(torch.get_num_threads(), num_tasks, 1 + work // 2**17)
    if num_threads <= 1:
        kernel(0, num_tasks, *arguments)
        return
    # More pieces than threads, so that one thread that is held up does not hold up the rest.
    num_pieces = min(num_tasks, 8 * num_threads)
    bounds = [num_tasks * piece // num_pieces for piece in range(num_pieces + 1)]
    pieces = iter(list(itertools.pairwise(bounds)))

    def take_pieces(*_: int) -> None:
        for first, last in pieces:
            kernel(first, last, *arguments)

    openmp = _openmp() if _CAN_USE_OPENMP else None
    if openmp is not None:
        openmp.run(take_pieces, num_threads)
        return
    # Unlike OpenMP's these survive a fork; the process id makes a child start its own.
    pool = _thread_pool(num_threads - 1, os.getpid())
    others = [pool.submit(take_pieces) for _ in range(num_threads - 1)]
    take_pieces()
    for other in others:
        other.result()


def run_together(kernel: Callable[..., None], num_tasks: int, work: int, length: int, *arguments: object) -> None:
    """Run a kernel of which several threads can work on one task: all on each where tasks are fewer than threads.

    Results depend on the number of threads that torch uses, not on how many could be had.

    Args:
        kernel: called with `first, last, thread, team, counter, shared, *arguments`; `counter` is for
            `gather_team` and `meet`, and `shared`, `[2, part, length]` in the type of the first array, for what
            the threads tell each other. It divides a task into as many parts.
    """
    dtype = next(x.dtype for x in arguments if isinstance(x, np.ndarray))
    num_threads = min(torch.get_num_threads(), 1 + work // 2**17)
    num_parts = num_threads if num_tasks < num_threads else 1
    openmp = _openmp() if _CAN_USE_OPENMP and num_parts > 1 and _CROWD.is_clear() else None
    if openmp is not None:
        counter, shared = np.zeros(2, np.int64), np.empty((2, num_parts, length), dtype)

        def take_part(thread: int, team: int) -> None:
            kernel(0, num_tasks, thread, team, counter.ctypes.data, shared, *arguments)

        began = time.perf_counter()
        openmp.run(take_part, num_threads)
        _CROWD.note(int(counter[1]) / (num_threads - 1), time.perf_counter() - began)
        if counter[0] >= 0:
            return

    def take_tasks(first: int, last: int) -> None:
        kernel(first, last, 0, 1, 0, np.empty((2, num_parts, length), dtype), *arguments)

    run_tasks(take_tasks, num_tasks, work)


class _Crowd:
    """Whether others compete for the cores.

    Then the threads of a team wait for each other at every barrier, and one alone is many times
    as fast. After that has happened the next calls are made alone, twice as many each time.
    """

    def __init__(self, *, max_pauses: int = 16, least: int = 16, most: int = 4096) -> None:
        self._max_pauses, self._least, self._most = max_pauses, least, most
        self._next, self._left = least, 0

    def is_clear(self) -> bool:
        """Whether to try; counts a call that is made alone."""
        if self._left == 0:
            return True
        self._left -= 1
        return False

    def note(self, num_pauses: float, seconds: float) -> None:
        """Learn how often a thread of a team had to pause for another, which is more than half a millisecond each."""
        if num_pauses <= max(self._max_pauses, 1000 * seconds):
            self._next = self._least
        else:
            self._left, self._next = self._next, min(2 * self._next, self._most)


_CROWD = _Crowd()


@cache
def _thread_pool(num_threads: int, pid: int) -> ThreadPoolExecutor:
    """The threads besides the caller's, started when needed."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="permlab")


# OpenMP

_CAN_USE_OPENMP = True


class _OpenMP:
    """The threads of torch itself.

    They go on spinning for a while after every operation of torch; other threads would have to
    share the cores with them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._parallel, self._thread = library.GOMP_parallel, library.omp_get_thread_num
        self._team = library.omp_get_num_threads
        self._type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        self._parallel.argtypes = (self._type, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._parallel.restype = None

    def run(self, part: Callable[[int, int], None], num_threads: int) -> None:
        """Call `part(thread, team)` in every thread of a team of at most so many, this thread's among them.

        Raises:
            BaseException: what the first of the calls has raised.
        """
        errors: list[BaseException] = []

        def call(_: int | None) -> None:
            # An exception that a signal raises before the next line is printed by ctypes, and lost.
            try:
                part(self._thread(), self._team())
            except BaseException as error:  # C cannot hand it on
                errors.append(error)

        self._parallel(self._type(call), None, num_threads, 0)
        if errors:
            raise errors[0]


@cache
def _openmp() -> _OpenMP | None:
    """The library that torch has loaded, where it has one that speaks GNU's protocol, as LLVM's does too."""
    if not torch.backends.openmp.is_available():
        return None
    with suppress(OSError, AttributeError):
        mapped = set(re.findall(r"/\S*/lib[gi]?omp\d*[-.]\S*", Path("/proc/self/maps").read_text()))
        torch_lib = str(Path(torch.__file__).parent / "lib")
        candidates = [path for path in mapped if path.startswith(torch_lib)] or list(mapped)
        if len(candidates) == 1:
            return _OpenMP(ctypes.CDLL(candidates[0]))
    return None


def trust_openmp(trusted: bool) -> None:
    """Say whether this process may use OpenMP: not one that was forked from a process which had used it.

    Its threads are not there after the fork, but are waited for. A forked process is taken for such
    a one until it says otherwise.
    """
    global _CAN_USE_OPENMP
    _CAN_USE_OPENMP = trusted


os.register_at_fork(after_in_child=lambda: trust_openmp(False))
