"""A projection as people read it, in one screen, and as programs do."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from permlab.config.plan import Plan
from permlab.record.pulse import duration
from permlab.run.count import NOT_COUNTED, megabytes, scientific
from permlab.run.gpu import CONTEXT_BYTES, FLOAT_UTILISATION, GPUS, HALF_UTILISATION, LAUNCH_SECONDS, Gpu
from permlab.run.outlook import LONG_SECONDS, Outlook
from permlab.run.projection import Part, Projection


def table(plan: Plan, outlook: Outlook, projections: Sequence[Projection], start: float) -> str:
    """What a command would take, in at most thirty lines.

    Args:
        projections: of its trainings, in the order in which they are made.
        start: seconds before the first of them, of importing libraries.
    """
    config = plan.config
    names = ", ".join(f"{group} {config[group]['name']}" for group in ("task", "data", "model", "method"))
    if not projections:
        return f"plan: {names}: this run is finished, and nothing is left to do"
    lines = [f"plan: {names}; nothing is run or written", ""]
    lines += aligned([_HEAD, *(_row(p) for p in projections)])
    seconds = start + sum(p.seconds for p in projections)
    peak = max(projections, key=lambda p: p.memory)
    lines += [
        f"whole command: {duration(seconds)} here, {duration(start)} of them to start; up to {megabytes(peak.memory)}"
    ]
    lines.append(f"measured by: {_measured_by(projections)}")
    lines += ["", *(_parts(p) for p in _largest(projections))]
    lines += [
        f"memory of {peak.name}: " + ", ".join(f"{name} {megabytes(size)}" for name, size in _sorted(peak) if size)
    ]
    lines += ["", *aligned([_GPU_HEAD, *(_gpu_row(gpu, projections) for gpu in GPUS)])]
    lines += [
        f"assumed there: {FLOAT_UTILISATION:.0%} of the published float32 speed, {HALF_UTILISATION:.0%} of that of "
        f"tensor cores, {LAUNCH_SECONDS * 1e6:.0f} us for each call; what is no step or test takes as long as here",
        f"not counted in FLOPs: {NOT_COUNTED}",
    ]
    missing = dict.fromkeys(what for p in projections for what in p.not_measured)
    lines += [f"not measured: {', '.join(missing)}"] if missing else []
    if seconds > LONG_SECONDS:
        lines.append(f"over an hour: to shorten that, {outlook.shorter()}")
    return "\n".join(lines)


_HEAD = ("training", "steps", "batch", "items", "parameters", "learned", "FLOPs/step", "FLOPs", "time here", "memory")
_GPU_HEAD = ("GPU", "memory", "float32", "16 bit")


def _measured_by(projections: Sequence[Projection]) -> str:
    named: dict[str, list[str]] = {}
    for projection in projections:
        named.setdefault(projection.how, []).append(projection.name)
    return "; ".join(f"{how} ({', '.join(names)})" for how, names in named.items())


def _row(projection: Projection) -> tuple[str, ...]:
    model, learned, method = projection.parameters
    of_method = f" (method {method:,})" if method else ""
    return (
        projection.name,
        f"{projection.steps:,}" if projection.steps else "none",
        f"{projection.batch_size:,}",
        f"{projection.num_items:,}",
        f"{model:,}",
        f"{learned:,}{of_method}",
        scientific(projection.step_flops),
        scientific(projection.flops),
        duration(projection.seconds),
        megabytes(projection.memory),
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def _largest(projections: Sequence[Projection]) -> list[Projection]:
    """The longest, and others that differ from it in more than the name; four at most."""
    different = {repr({**vars(p), "name": ""}): p for p in reversed(projections)}
    return sorted(different.values(), key=lambda p: -p.seconds)[:4]


def _parts(projection: Projection) -> str:
    parts = sorted(projection.parts, key=lambda part: -part.seconds)
    named = [f"{part.name} {duration(part.seconds)}" for part in parts if part.seconds >= 0.01 * projection.seconds]
    return f"time of {projection.name}: {', '.join(named)}"


def _sorted(projection: Projection) -> list[tuple[str, int]]:
    return sorted(projection.bytes.items(), key=lambda item: -item[1])


def on_gpu(gpu: Gpu, projections: Sequence[Projection], *, half: bool) -> float | None:
    """Seconds of a command there; None where it does not fit."""
    if not gpu.fits(max(map(device_bytes, projections))):
        return None
    return sum(_part_on_gpu(gpu, p, part, half=half) for p in projections for part in p.parts)


def _part_on_gpu(gpu: Gpu, projection: Projection, part: Part, *, half: bool) -> float:
    if not part.flops:
        return part.seconds
    operations = projection.step_operations * part.flops / max(1.0, projection.step_flops)
    return gpu.seconds(part.flops, operations, half=half)


def device_bytes(projection: Projection) -> int:
    """What lies on a GPU: all but the process."""
    return projection.memory - projection.bytes.get("process", 0)


def _gpu_row(gpu: Gpu, projections: Sequence[Projection]) -> tuple[str, ...]:
    size = CONTEXT_BYTES + max(map(device_bytes, projections))
    times = [on_gpu(gpu, projections, half=half) for half in (False, True)]
    cells = ["does not fit" if time is None else duration(time) for time in times]
    return f"{gpu.name} ({gpu.memory:.0f} GiB)", megabytes(size), cells[0], f"{cells[1]} ({gpu.half_type})"


def as_json(plan: Plan, outlook: Outlook, projections: Sequence[Projection], start: float) -> str:
    """The same for programs: seconds, operations and bytes."""
    found: dict[str, Any] = {
        "directory": str(plan.directory),
        "seconds": start + sum(p.seconds for p in projections),
        "start_seconds": start,
        "peak_bytes": max((p.memory for p in projections), default=0),
        "trainings": [{**asdict(p), "seconds": p.seconds, "flops": p.flops} for p in projections],
        "gpus": {
            gpu.name: {kind: on_gpu(gpu, projections, half=kind != "float32") for kind in ("float32", gpu.half_type)}
            for gpu in GPUS
        }
        if projections
        else {},
    }
    return json.dumps(found, indent=1)
