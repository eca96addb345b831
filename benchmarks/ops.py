"""Side by side: our operations against other libraries and the published formulas, in alternating runs.

    python benchmarks/ops.py [names ...] [--quick] [--json PATH] [--figure PATH] [--redraw]

All implementations of a row take turns in one process, with the same inputs and threads; ratios are medians over
the rounds. Peak memory is that of a process of its own. The error is the largest deviation from float64, relative to
the largest value. On a CUDA device the same rows run there, with torch.compile'd peers and, where it is installed,
mamba_ssm's kernel, and the bandwidth that is reached is set against a copy on the device.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peers
from measure import alternate, facts, median_ratio, peak_bytes, processor
from permlab.ops.assignment import assign
from permlab.ops.plackett_luce import log_prob, sample
from permlab.ops.selective_scan import selective_scan
from permlab.ops.sinkhorn import sinkhorn
from permlab.ops.sorting import neural_sort, soft_sort
from permlab.permutation import PermutationSample, gather_items, permute

LONG_MS = 10_000  # calls that take longer are not made once more to measure their memory
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """An operation at one size.

    Args:
        inputs: arguments of every implementation, by name; those in `learned` get gradients.
        ours: our implementation.
        peers: the others, by name.
        targets: how many times as fast as each ours is meant to be.
        reference: what ours is compared with in float64, None where results are random.
        num_bytes: least traffic to memory, for the bandwidth.
    """

    operation: str
    size: str
    inputs: Mapping[str, Tensor]
    ours: Function
    peers: Mapping[str, Function]
    targets: Mapping[str, float] = field(default_factory=dict)
    learned: tuple[str, ...] = ()
    reference: Function | None = None
    num_bytes: float = 0.0


@dataclass
class Row:
    """A line of the table: one implementation of one case."""

    operation: str
    size: str
    name: str
    forward_ms: float
    both_ms: float | None
    ratio_forward: float
    ratio: float
    target: float | None
    peak_mib: float | None
    error: float | None
    gigabytes_per_second: float | None = None


# Cases


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def sinkhorn_case(b: int, n: int, targets: tuple[float, ...] = (), *, with_peers: bool = True) -> Case:
    settings = {"temperature": 0.1, "num_iters": 20}
    others = {"log-domain autograd": peers.sinkhorn_log}
    others |= {"pygmtools": peers.sinkhorn_pygmtools} if peers.library("pygmtools") else {}
    others |= {"POT": peers.sinkhorn_pot} if peers.library("ot") else {}
    return Case(
        "sinkhorn, 20 iterations",
        f"{b} x ({n} x {n})",
        {"scores": _noise(b, n, n)},
        lambda scores: sinkhorn(scores, **settings),
        {name: _with(other, **settings) for name, other in others.items()} if with_peers else {},
        dict(zip(("log-domain autograd", "pygmtools", "POT"), targets, strict=False)),
        ("scores",),
        _with(peers.sinkhorn_log, **settings) if with_peers else None,
        num_bytes=8.0 * b * n * n,
    )


def sorting_case(ours: Function, plain: Function, b: int, n: int) -> Case:
    return Case(
        ours.__name__,
        f"{b} x {n}",
        {"scores": _noise(b, n)},
        lambda scores: ours(scores, temperature=0.1),
        {"as published": _with(plain, temperature=0.1)},
        {"as published": 2.0},
        ("scores",),
        _with(plain, temperature=0.1),
        num_bytes=12.0 * b * n * n,
    )


def permute_case(b: int, n: int, d: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(b)])
    soft = _noise(b, n, n).softmax(-1)
    return Case(
        "permute, straight-through",
        f"{b} x {n} x {d}",
        {"items": _noise(b, n, d), "order": order, "soft": soft},
        lambda items, order, soft: permute(items, PermutationSample(order, soft, None, "straight_through")),
        {"matrix product": peers.permute_by_product},
        {"matrix product": 5.0},
        ("items", "soft"),
        peers.permute_by_product,
        num_bytes=8.0 * b * n * d,
    )


def gather_case(b: int, n: int, d: int) -> Case:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return Case(
        "permute, one order for all",
        f"{b} x {n} x {d}",
        {"items": _noise(b, n, d), "order": order},
        gather_items,
        {"index_select": lambda items, order: items.index_select(1, order)},
        {"index_select": 1 / 1.5},
        ("items",),
        lambda items, order: items[:, order],
        num_bytes=8.0 * b * n * d,
    )


def plackett_luce_case(b: int, n: int) -> Case:
    def ours(logits: Tensor) -> Tensor:
        return log_prob(logits, sample(logits.detach(), temperature=1.0), temperature=1.0)

    others = {"loop over slots": peers.plackett_luce_loop, "logcumsumexp": peers.plackett_luce_logcumsumexp}
    targets = {"loop over slots": 5.0, "logcumsumexp": 1.5}
    return Case(
        "plackett_luce sample + log_prob", f"{b} x {n}", {"logits": _noise(b, n)}, ours, others, targets, ("logits",)
    )


def assign_case(b: int, n: int, target: float) -> Case:
    scores = {"scores": _noise(b, n, n)}
    return Case(
        "assign", f"{b} x ({n} x {n})", scores, assign, {"scipy, looped": peers.assign_scipy}, {"scipy, looped": target}
    )


def scan_case(b: int, d: int, length: int, s: int, targets: tuple[float, ...] = (10.0, 6.0)) -> Case:
    inputs = {"u": _noise(b, d, length), "delta": _noise(b, d, length) - 2, "A": -_noise(d, s).exp()}
    inputs |= {"B": _noise(b, s, length), "C": _noise(b, s, length), "D": _noise(d), "z": _noise(b, d, length)}
    others = {"sequential": peers.scan_sequential}
    others |= {"mambapy": peers.scan_mambapy} if peers.library("mambapy.pscan") else {}
    if DEVICE.type == "cuda" and peers.library("mamba_ssm.ops.selective_scan_interface"):
        others["mamba_ssm"] = peers.scan_mamba_ssm
    return Case(
        "selective_scan",
        f"b{b} d{d} l{length} s{s}",
        inputs,
        lambda u, delta, A, B, C, D, z: selective_scan(u, delta, A, B, C, D, z, delta_softplus=True),
        others,
        dict(zip(("sequential", "mambapy"), targets, strict=False)),
        tuple(inputs),
        peers.scan_sequential,
        num_bytes=4.0 * b * d * length * 4,
    )


def cases(*, quick: bool) -> Iterator[Case]:
    """The rows of the table; `quick` leaves the large sizes out."""
    yield sinkhorn_case(64, 64, (10, 4, 15))
    yield sinkhorn_case(16, 196, (8, 8, 4))
    for ours, plain in ((soft_sort, peers.soft_sort), (neural_sort, peers.neural_sort)):
        yield sorting_case(ours, plain, 32, 196)
    yield gather_case(64, 196, 768)
    yield plackett_luce_case(256, 196)
    yield assign_case(64, 64, 1.5)
    yield scan_case(32, 128, 64, 16, (10, 3))
    if quick:
        return
    yield sinkhorn_case(1, 768, (10, 10, 8))
    yield sinkhorn_case(1, 4096, with_peers=False)
    for ours, plain in ((soft_sort, peers.soft_sort), (neural_sort, peers.neural_sort)):
        yield sorting_case(ours, plain, 8, 1024)
    yield permute_case(64, 196, 768)
    yield assign_case(1, 1024, 1.0)
    yield scan_case(32, 384, 196, 16)
    yield scan_case(4, 768, 1024, 16)


def _with(function: Function, **settings: Any) -> Function:
    return lambda *arguments, **named: function(*arguments, **named, **settings)


# Measuring


def measure(case: Case, *, budget_s: float) -> list[Row]:
    """Every implementation of a case, ours first."""
    functions = {"ours": case.ours, **case.peers}
    if DEVICE.type == "cuda":
        functions |= {f"{name}, compiled": peers.compiled(function) for name, function in case.peers.items()}
    inputs = {name: tensor.to(DEVICE) for name, tensor in case.inputs.items()}
    forward = alternate({name: _call(function, inputs, ()) for name, function in functions.items()}, budget_s=budget_s)
    both = forward
    if case.learned:
        both = alternate(
            {name: _call(function, inputs, case.learned) for name, function in functions.items()}, budget_s=budget_s
        )
    rows = []
    for name in functions:
        rows.append(
            Row(
                case.operation,
                case.size,
                name,
                forward_ms=1e3 * statistics.median(forward[name]),
                both_ms=1e3 * statistics.median(both[name]) if case.learned else None,
                ratio_forward=median_ratio(forward[name], forward["ours"]),
                ratio=median_ratio(both[name], both["ours"]),
                target=case.targets.get(name),
                peak_mib=None,
                error=_error(case, functions[name], inputs),
                gigabytes_per_second=case.num_bytes / statistics.median(forward[name]) / 1e9
                if case.num_bytes
                else None,
            )
        )
    return rows


def _call(function: Function, inputs: Mapping[str, Tensor], learned: tuple[str, ...]) -> Callable[[], object]:
    """Forward, and backward with the same incoming gradient every time where something is learned."""
    grad: list[Tensor] = []

    def call() -> object:
        given = {name: x.detach().requires_grad_(name in learned) for name, x in inputs.items()}
        result = function(*given.values())
        if not learned:
            return result
        if not grad:
            grad.append(torch.randn_like(result))
        return torch.autograd.grad(result, [given[name] for name in learned], grad[0], allow_unused=True)

    return call


def _error(case: Case, function: Function, inputs: Mapping[str, Tensor]) -> float | None:
    """Largest deviation of the result from float64, relative to the largest value."""
    if case.reference is None:
        return None
    with torch.no_grad():
        wide = [x.double() if x.is_floating_point() else x for x in inputs.values()]
        exact = case.reference(*wide)
        return float((function(*inputs.values()) - exact).abs().max() / exact.abs().max())


def measure_memory(index: int, name: str, quick: bool) -> float:
    """MiB at the peak of forward and backward of an implementation over its inputs; meant for a process of its own."""
    case = list(cases(quick=quick))[index]
    function = {"ours": case.ours, **case.peers}[name]
    inputs = {key: tensor.to(DEVICE) for key, tensor in case.inputs.items()}
    # Imports and compilation are no part of it. All but A, and what has one axis, begin with the batch.
    few = {key: x[:1] if x.ndim > 1 and key != "A" else x for key, x in inputs.items()}
    _call(function, few, case.learned)()
    return peak_bytes(_call(function, inputs, case.learned)) / 2**20


def copy_bandwidth() -> float:
    """Gigabytes per second of a copy within the device's memory, read and written bytes counted."""
    source = torch.empty(2**26, device=DEVICE)
    target = torch.empty_like(source)
    seconds = alternate({"copy": lambda: target.copy_(source)}, budget_s=1.0)["copy"]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds) / 1e9


# Growth


def growth(budget_s: float) -> dict[str, dict[str, Any]]:
    """Milliseconds of ours, forward and backward, at doubled sizes, and the fitted exponent of the upper half."""
    grown: dict[str, tuple[str, float, Callable[[int], Case], list[int]]] = {
        "sinkhorn": ("n", 2, lambda n: sinkhorn_case(4, n, with_peers=False), peers.doublings(64, 1024)),
        "soft_sort": ("n", 2, lambda n: sorting_case(soft_sort, peers.soft_sort, 4, n), peers.doublings(64, 1024)),
        "neural_sort": (
            "n",
            2,
            lambda n: sorting_case(neural_sort, peers.neural_sort, 4, n),
            peers.doublings(64, 1024),
        ),
        "permute, one order": ("n", 1, lambda n: gather_case(16, n, 256), peers.doublings(64, 1024)),
        "plackett_luce": ("n", 1, lambda n: plackett_luce_case(64, n), peers.doublings(64, 1024)),
        "selective_scan": ("tokens", 1, lambda n: scan_case(4, 128, n, 16), peers.doublings(64, 1024)),
    }
    result = {}
    for name, (axis, expected, make, sizes) in grown.items():
        times = []
        for size in sizes:
            case = make(size)
            inputs = {key: tensor.to(DEVICE) for key, tensor in case.inputs.items()}
            times.append(
                min(alternate({"ours": _call(case.ours, inputs, case.learned)}, budget_s=budget_s)["ours"]) * 1e3
            )
        half = len(sizes) // 2
        slope = math.log(times[-1] / times[half]) / math.log(sizes[-1] / sizes[half])
        result[name] = {"axis": axis, "sizes": sizes, "ms": times, "exponent": slope, "expected": expected}
    return result


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Times of ours and of every peer by its name, and below how those of ours grow with the size.

    Args:
        record: what the JSON file holds.
        path: of a PNG.
    """
    import matplotlib

    from permlab.figure.style import new_figure, save_figure, sign_figure, style

    with matplotlib.rc_context(style()):
        figure = new_figure(9.6, 12.0)
        above, below = figure.subplots(2, 1, height_ratios=(2.6, 1))
        _draw_peers(above, record["rows"])
        _draw_growth(below, record["growth"])
        versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "POT", "pygmtools", "mambapy"))
        sign_figure(figure, f"float32, {record['device']}; {versions}")
        save_figure(figure, path)


def _draw_peers(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    """A line for every case with a peer: a dot for each implementation, and their names in the same order."""
    from permlab.figure.style import PALETTE, REFERENCE

    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["operation"], row["size"]), []).append(row)
    # Cases of an operation stand together, in the order of the table.
    names = list(dict.fromkeys(operation.split(",")[0] for operation, _ in found))
    compared = [case for case in found if len(found[case]) > 1]
    compared.sort(key=lambda case: names.index(case[0].split(",")[0]))
    for place, case in enumerate(compared):
        ordered = sorted(found[case], key=lambda row: row["both_ms"] or row["forward_ms"])
        times = [row["both_ms"] or row["forward_ms"] for row in ordered]
        axes.plot(times, [place] * len(times), color="#d9d9d9", linewidth=1.2, zorder=1)
        for ms, row in zip(times, ordered, strict=True):
            colour, size = (PALETTE[0], 8) if row["name"] == "ours" else (REFERENCE, 5.5)
            axes.plot(ms, place, "o", color=colour, markersize=size, zorder=2)
        words = [row["name"] + ("" if row["name"] == "ours" else f" {row['ratio']:,.1f}x") for row in ordered]
        where = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
        axes.annotate(",  ".join(words), (1.02, place), annotation_clip=False, **where)
    axes.set_xscale("log")
    axes.set_yticks(range(len(compared)), [f"{operation}\n{size}" for operation, size in compared], fontsize=8)
    axes.set_ylim(len(compared) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("forward and backward, ms (assign: forward)")
    axes.set_title(
        "ours (blue) and its peers, named from left to right,\nwith how many times as long they take", loc="left"
    )


def _draw_growth(axes: Any, grown: Mapping[str, Mapping[str, Any]]) -> None:
    """Cost against size, both logarithmic, with the exponent that was found and the one that is expected."""
    from matplotlib.ticker import NullLocator

    from permlab.figure.style import PALETTE

    for (name, line), colour in zip(grown.items(), PALETTE, strict=False):
        label = f"{name}: {line['exponent']:.2f} (expected {line['expected']})"
        axes.loglog(line["sizes"], line["ms"], marker="o", markersize=4, color=colour, label=label)
    axes.set(xlabel="items, slots or tokens", ylabel="forward and backward, ms", title="growth of ours")
    axes.set_xticks(sizes := next(iter(grown.values()))["sizes"], [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(title="exponent of the upper half", loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


# Output


def text(rows: list[Row]) -> str:
    """The table in Markdown; a target is one for forward and backward together, and `no` says that it is missed."""
    with_bandwidth = DEVICE.type == "cuda"
    heads = [
        "operation",
        "size",
        "implementation",
        "forward ms",
        "forward+backward ms",
        "ratio forward",
        "ratio",
        "target",
    ]
    heads += ["peak MiB", "error", *(["GB/s"] if with_bandwidth else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        met = "" if row.target is None else f"{row.target:.3g} {'yes' if row.ratio >= row.target else 'no'}"
        cells = [row.operation, row.size, row.name, f"{row.forward_ms:.2f}", _cell(row.both_ms, ".2f")]
        cells += [
            f"{row.ratio_forward:.1f}",
            f"{row.ratio:.1f}",
            met,
            _cell(row.peak_mib, ".1f"),
            _cell(row.error, ".0e"),
        ]
        cells += [_cell(row.gigabytes_per_second, ".0f")] if with_bandwidth else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="operations whose name contains one of these; all of them by default")
    parser.add_argument("--quick", action="store_true", help="small sizes and short times, no memory, no growth")
    parser.add_argument(
        "--threads", type=int, help="threads of torch and of our kernels; torch's own number by default"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results, with hardware and versions")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="also draw times and growth")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: draw --figure from what --json holds")
    options = parser.parse_args(arguments)
    if options.redraw:
        if not (options.json and options.figure):
            parser.error("--redraw needs --json, which is read, and --figure")
        draw(json.loads(options.json.read_text()), options.figure)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    budget_s, rows = 0.5 if options.quick else 2.0, []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peers", "measure", "permlab.ops.selective_scan", "permlab.ops.plackett_luce"])
    for index, case in enumerate(cases(quick=options.quick)):
        if options.names and not any(name in case.operation for name in options.names):
            continue
        print(f"{case.operation}, {case.size}", file=sys.stderr, flush=True)
        measured = measure(case, budget_s=budget_s)
        if not options.quick:
            for row in measured:
                if (row.name in case.peers or row.name == "ours") and (row.both_ms or 0) < LONG_MS:
                    with context.Pool(1) as pool:
                        row.peak_mib = pool.apply(measure_memory, (index, row.name, options.quick))
        rows += measured
        print(text(measured).split("\n", 2)[-1], flush=True)
    device = (
        torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    )
    print(text(rows))
    print(f"\nfloat32, {device}, torch {torch.__version__}")
    record: dict[str, Any] = facts(
        device=device, packages=("numba", "scipy", "POT", "pygmtools", "mambapy", "torchsort")
    )
    record["rows"] = [asdict(row) for row in rows]
    if DEVICE.type == "cuda":
        record["copy_gigabytes_per_second"] = copy_bandwidth()
        print(f"a copy on the device: {record['copy_gigabytes_per_second']:.0f} GB/s")
    if not options.quick and not options.names:
        record["growth"] = growth(budget_s / 8)
        for name, line in record["growth"].items():
            print(f"{name}: cost grows as {line['axis']}^{line['exponent']:.2f}, expected {line['expected']}")
        if options.figure:
            draw(record, options.figure)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
