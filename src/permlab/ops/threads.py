"""How compiled kernels are run: in how many threads, and when they cannot be."""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor, nn


def is_readable(tensor: Tensor) -> bool:
    """Whether a compiled kernel can read this tensor: it lies in the memory of the CPU and is nobody's stand-in."""
    return tensor.device.type == "cpu" and not is_traced() and type(tensor) in (Tensor, nn.Parameter)


def is_traced() -> bool:
    """Whether torch.compile or torch.func is at work: their tensors have no memory to point a kernel at."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def run_tasks(kernel: Callable[..., None], num_tasks: int, work: int, *arguments: object) -> None:
    """Run a kernel over all its tasks in as many threads as torch uses; fewer where there is little to do.

    The kernel releases the interpreter's lock, so plain threads do; unlike numba's own pools they
    survive a fork and may be entered from several threads at once.
    """
    num_threads = min(torch.get_num_threads(), num_tasks, 1 + work // 2**17)
    if num_threads <= 1:
        kernel(0, num_tasks, *arguments)
        return
    # More pieces than threads, so that one thread that is held up does not hold up the rest.
    num_pieces = min(num_tasks, 8 * num_threads)
    bounds = [num_tasks * piece // num_pieces for piece in range(num_pieces + 1)]
    pieces = iter(list(itertools.pairwise(bounds)))

    def take_pieces() -> None:
        for first, last in pieces:
            kernel(first, last, *arguments)

    pool = _thread_pool(num_threads - 1, os.getpid())
    others = [pool.submit(take_pieces) for _ in range(num_threads - 1)]
    take_pieces()
    for other in others:
        other.result()


@cache
def _thread_pool(num_threads: int, pid: int) -> ThreadPoolExecutor:
    """The threads besides the caller's, started when needed; the process id makes a forked child start its own."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="permlab")
