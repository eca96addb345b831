"""Side by side: channel searches for 2:4 pruning on one core, next to published figures and plain baselines.

    python benchmarks/prune.py [--quick] [--size 4096] [--budget 60] [--json PATH]

Every row is measured in a process of its own. Seconds are wall clock of the search alone, kernels
being compiled before; CPU seconds tell whether the machine was shared meanwhile. Memory is the
process's peak during the search over what it held before, the matrix included.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1")

import numpy as np
import torch
from numba import njit

from measure import facts, peak_mib, processor, reset_peak_mib
from permlab.permutation import invert
from permlab.sparsity.quality import efficacy, retained
from permlab.sparsity.search import deal_and_match, swap_search
from permlab.sparsity.search_kernel import retention_kernels

N, M = 2, 4
PUBLIC = "public 128x64"


@dataclass(frozen=True)
class Row:
    """A line of the table; what is None was not measured, or not published."""

    matrix: str
    method: str
    retained: float | None = None
    efficacy: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_mib: float | None = None
    seed: int = 0
    budget_s: float | None = None


# README of apex's permutation tests, on an NVIDIA V100 unless stated: method, retained, efficacy in %, seconds.
PUBLISHED = (
    ("apex channel_swap, 0 escapes", 2913.352, 32.1, 0.214),
    ("apex channel_swap, 1000 escapes", 2920.694, 36.0, 20.248),
    ("apex OSG, 8 columns, 0 escapes", 2919.757, 35.5, 0.013),
    ("apex OSG, 8 columns, 0 escapes, CPU path", None, None, 60.7),
    ("apex OSG, 8 columns, 1000 escapes", 2919.935, 35.6, 1.387),
    ("apex OSG, 12 columns, 0 escapes", 2921.947, 36.6, 0.860),
    ("apex random, 100k permutations", None, 14.1, 11.5),
)


def matrix(name: str) -> torch.Tensor:
    """Scores by name: the matrix of apex's README, or `uniform <size>`, or `heavy-tailed <size>`.

    Heavy-tailed entries are lognormal and so are the scales of the columns.
    """
    if name == PUBLIC:
        return torch.from_numpy(np.random.RandomState(1).rand(128, 64))
    kind, size = name.split()
    generator = torch.Generator().manual_seed(0)
    scores = torch.empty(int(size), int(size))
    if kind == "uniform":
        return scores.uniform_(generator=generator)
    return scores.log_normal_(generator=generator).mul_(torch.empty(int(size)).log_normal_(generator=generator))


def rows(*, size: int, budget_s: float, quick: bool) -> list[Row]:
    """What is to be measured, in the order of the table."""
    budgets = (0.1, 0.5) if quick else (0.1, 1.0, 5.0)
    todo = [Row(PUBLIC, "default order"), Row(PUBLIC, "deal_and_match")]
    todo += [Row(PUBLIC, "random swaps", budget_s=budgets[-1]), Row(PUBLIC, "swap_search")]
    todo += [Row(PUBLIC, "swap_search", seed=seed, budget_s=budget) for budget in budgets for seed in range(2)]
    for kind in ("uniform", "heavy-tailed"):
        name = f"{kind} {size}"
        todo += [Row(name, "default order"), Row(name, "deal_and_match")]
        todo += [Row(name, "random swaps", budget_s=budget_s), Row(name, "swap_search", budget_s=budget_s)]
        todo += [Row(name, "swap_search")]
    return todo


def measure(row: Row) -> Row:
    """The row with its figures; meant for a process that does nothing else."""
    torch.set_num_threads(1)
    search = METHODS[row.method]
    search(torch.rand(8, 16), replace(row, budget_s=row.budget_s and 0.01))
    scores = matrix(row.matrix)
    held = reset_peak_mib()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    order = search(scores, row)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    risen_mib = peak_mib() - held
    invert(order)
    return replace(
        row,
        retained=retained(scores, order, n=N, m=M) * scores.sum(dtype=torch.float64).item(),
        efficacy=100 * efficacy(scores, order, n=N, m=M),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        peak_mib=risen_mib,
    )


# Methods


def _default_order(scores: torch.Tensor, row: Row) -> torch.Tensor:
    return torch.arange(scores.shape[1])


def _deal_and_match(scores: torch.Tensor, row: Row) -> torch.Tensor:
    return deal_and_match(scores, n=N, m=M)


def _swap_search(scores: torch.Tensor, row: Row) -> torch.Tensor:
    return swap_search(scores, n=N, m=M, seed=row.seed, budget_s=row.budget_s)


def _random_swaps(scores: torch.Tensor, row: Row) -> torch.Tensor:
    """The baseline that a search must beat: random swaps of two columns, each made if it gains, compiled as well."""
    assert row.budget_s is not None
    refresh = retention_kernels().refresh
    end = time.perf_counter() + row.budget_s
    columns = scores.float().T.contiguous().numpy()
    width, height = columns.shape
    order, blocks = np.arange(width), np.arange(width // M)
    last, first = np.empty((2, len(blocks), height), np.float32)
    refresh(columns, order, blocks, N, M, last, first, np.empty(len(blocks)))
    generator = np.random.default_rng(row.seed)
    while time.perf_counter() < end:
        pairs, tried = generator.integers(0, width, (256, 2)), 0
        while tried < len(pairs):
            tried, gains = _try_swaps(columns, order, last, first, pairs, tried)
            if gains:
                pair = pairs[tried - 1]
                order[pair] = order[pair[::-1]]
                refresh(columns, order, pair // M, N, M, last, first, np.empty(len(blocks)))
    return torch.from_numpy(order)


@njit(nogil=True, fastmath={"contract", "reassoc", "nsz", "nnan"})
def _try_swaps(columns, order, last, first, pairs, begin):
    """How many pairs were looked at when one gained, or in all; and whether one did."""
    for index in range(begin, len(pairs)):
        i, j = pairs[index]
        a, b = i // M, j // M
        if a == b:
            continue
        x, y = columns[order[i]], columns[order[j]]
        gain = np.float32(0)
        for r in range(columns.shape[1]):
            bar_x = first[a, r] if x[r] >= last[a, r] else last[a, r]
            bar_y = first[b, r] if y[r] >= last[b, r] else last[b, r]
            gain += (max(bar_x, y[r]) - max(bar_x, x[r])) + (max(bar_y, x[r]) - max(bar_y, y[r]))
        # Rounding is no gain.
        if gain > 1e-5:
            return index + 1, True
    return len(pairs), False


METHODS: dict[str, Callable[[torch.Tensor, Row], torch.Tensor]] = {
    "default order": _default_order,
    "deal_and_match": _deal_and_match,
    "random swaps": _random_swaps,
    "swap_search": _swap_search,
}


# Output


def text(results: list[Row]) -> str:
    """The table in Markdown, with the published rows after the first one."""
    lines = ["| matrix | method | retained | efficacy % | seconds | CPU seconds | peak MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    published = [Row(PUBLIC, f"{name} (published)", *figures) for name, *figures in PUBLISHED]
    for row in [*results[:1], *published, *results[1:]]:
        method = row.method
        if row.budget_s is not None:
            method += f", {row.budget_s:g} s"
        if row.method == "swap_search":
            method += f", seed {row.seed}"
        figures = ((row.retained, ".3f"), (row.efficacy, ".2f"), (row.seconds, ".3f"), (row.cpu_seconds, ".3f"))
        cells = [_cell(*figure) for figure in (*figures, (row.peak_mib, ".1f"))]
        lines.append("| " + " | ".join([row.matrix, method, *cells]) + " |")
    return "\n".join(lines)


def _cell(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def record(results: list[Row]) -> dict[str, object]:
    """What the JSON file holds: the rows, and what they were measured with."""
    measured_with = facts(device=f"{processor()}, 1 thread", packages=("numba",))
    published = [dict(zip(("method", "retained", "efficacy", "seconds"), row, strict=True)) for row in PUBLISHED]
    source = {"source": "README of apex's permutation tests", "device": "NVIDIA V100 unless stated", "rows": published}
    return {"pattern": f"{N}:{M}", **measured_with, "rows": [asdict(row) for row in results], "published": source}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small matrices and budgets: about half a minute")
    parser.add_argument("--size", type=int, help="rows and columns of the large matrices (4096; 512 with --quick)")
    parser.add_argument("--budget", type=float, help="seconds of a search on a large matrix (60; 2 with --quick)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results, with hardware and versions")
    options = parser.parse_args(arguments)
    size, budget_s = options.size or (512 if options.quick else 4096), options.budget or (2 if options.quick else 60)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["permlab.sparsity.search", "permlab.sparsity.quality"])
    results = []
    todo = rows(size=size, budget_s=budget_s, quick=options.quick)
    for index, row in enumerate(todo, 1):
        print(f"{index}/{len(todo)} {row.matrix}: {row.method}", file=sys.stderr)
        with context.Pool(1) as pool:
            results.append(pool.apply(measure, (row,)))
    print(text(results))
    print(f"\n2:4, one core: {processor()}. Published rows: apex's README, NVIDIA V100 unless stated.")
    if options.json:
        options.json.write_text(json.dumps(record(results), indent=2) + "\n")


if __name__ == "__main__":
    main()
