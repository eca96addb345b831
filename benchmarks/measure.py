"""What the benchmarks share: alternating timings, peak memory, and what they were measured with."""

import contextlib
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch

from permlab.record import provenance


def alternate(functions: Mapping[str, Callable[[], object]], *, budget_s: float = 3.0) -> dict[str, list[float]]:
    """Seconds of every call, the functions taking turns, until the budget is spent.

    One round is not counted; at least three follow, or a single one where a round takes longer than the budget.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    began_all, end, least = time.perf_counter(), None, 4
    while end is None or time.perf_counter() < end or len(next(iter(seconds.values()))) < least:
        for name, function in functions.items():
            _wait()
            began = time.perf_counter()
            function()
            _wait()
            seconds[name].append(time.perf_counter() - began)
        if end is None:
            end = time.perf_counter() + budget_s
            least = 2 if time.perf_counter() - began_all > 2 * budget_s else 4
    return {name: values[1:] for name, values in seconds.items()}


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over the rounds of how many times as long the other took."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], object]) -> float:
    """Greatest memory during a call over what was held before; meant for a process that does nothing else."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - held
    held_mib = reset_peak_mib()
    function()
    return (peak_mib() - held_mib) * 2**20


def reset_peak_mib() -> float:
    """Forget the peak so far where the system allows it, and return the memory held from which the next is counted."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def peak_mib() -> float:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return int(found[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def facts(*, device: str, packages: tuple[str, ...] = ()) -> dict[str, object]:
    """Code, versions and hardware, for the JSON file of a benchmark."""
    collected = provenance.collect(device=device)
    kept = {key: collected[key] for key in ("git_sha", "git_dirty", "versions", "python", "platform", "device")}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            kept["versions"] = kept["versions"] | {name: metadata.version(name)}
    return kept
