"""The claim of a run in one picture: what it reached over its steps, and what it is compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from permlab.figure.style import PALETTE, REFERENCE, new_figure
from permlab.record.rundir import read_summary
from permlab.record.stored import BESIDE, read_arrays, read_curve, read_plan


class Side(NamedTuple):
    """One that is compared.

    Args:
        label: what it is.
        curve: `[k, 2]`, step and validation metric; empty for what has no training of its own.
        final: metric of the test split.
    """

    label: str
    curve: np.ndarray
    final: float


def draw(run_dir: Path) -> Figure | None:
    """Every number that the report of a run compares; None where that is a single one."""
    summary = read_summary(run_dir) if (run_dir / "summary.json").is_file() else {}
    if not summary:
        return None
    plan = read_plan(run_dir)
    metric = plan.task.metric
    rows = [row for row in plan.task.rows if row.format is None and row.key in summary]
    if len(rows) < 2:
        return None
    curves = {metric.key: read_curve(run_dir, metric.validation_key)}
    curves |= {f"{metric.key}_{name}": curve for name, curve in read_arrays(run_dir / BESIDE).items()}
    order, none = f"order of {plan.config['method']['name']}", np.empty((0, 2))
    sides = [Side(row.label.format(order=order), curves.get(row.key, none), summary[row.key]) for row in rows]
    return comparison_figure(sides, metric)


def comparison_figure(sides: Sequence[Side], metric: Any) -> Figure:
    """Validation over the steps as lines, the test of what was picked as diamonds at their end, with its number.

    Differences are to the first one. What has no training of its own is a level.

    Args:
        sides: at least one, the one to compare with first.
        metric: `permlab.task.metric.Metric` of all numbers.
    """
    figure = new_figure(9.6, 4.8)
    axes = figure.subplots()
    last = max([1.0, *(side.curve[:, 0].max() for side in sides if len(side.curve))])
    # Beside each other, so that equal ones are both seen.
    ends = last * (1.03 + 0.025 * np.arange(len(sides)))
    for side, colour, dashes, end in zip(sides, (REFERENCE, *PALETTE), ("-", "-", "--", ":", "-."), ends, strict=False):
        marker = "o" if len(side.curve) <= 30 else ""
        axes.plot(*(side.curve * (1, metric.scale)).T, dashes, color=colour, marker=marker, markersize=3.5)
        if not len(side.curve):
            axes.axhline(metric.scale * side.final, color=colour, linestyle=dashes, linewidth=1.0)
        diamond: dict[str, Any] = {
            "marker": "D",
            "markersize": 7,
            "markeredgecolor": "white",
            "clip_on": False,
            "zorder": 3,
        }
        axes.plot(end, metric.scale * side.final, color=colour, **diamond)
    axes.set(xlabel="optimiser step", ylabel=metric.title, xlim=(0, ends[-1]))
    axes.set_title(
        "lines: validation while training;  diamonds: test of the checkpoint that validation picked", size=9.5
    )
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    _name(axes, sides, metric, ends)
    return figure


def _name(axes: Axes, sides: Sequence[Side], metric: Any, ends: np.ndarray) -> None:
    """Name and number of each beside its diamond, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    places = np.array([(metric.scale * side.final - low) / (high - low) for side in sides])
    rise = np.argsort(places, kind="stable")
    for place, index in zip(_apart(places[rise], 0.125), rise, strict=True):
        side, colour = sides[index], (REFERENCE, *PALETTE)[index]
        number = f"{metric.show(side.final)} {metric.unit}".rstrip()
        if index:
            number += f"  ({metric.show(side.final - sides[0].final, sign='+')})"
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5}
        axes.annotate(
            f"{side.label}\n{number}",
            (ends[index], metric.scale * side.final),
            (1.045, place),
            xycoords="data",
            textcoords="axes fraction",
            color=colour,
            va="center",
            linespacing=1.3,
            arrowprops=line,
            annotation_clip=False,
        )


def _apart(places: np.ndarray, gap: float) -> np.ndarray:
    """Ascending places, moved as little as keeps each pair of neighbours at least a gap apart."""
    steps = gap * np.arange(len(places))
    # What is left is to make an ascending sequence of these: the mean of every stretch that falls.
    blocks: list[list[float]] = []
    for value in places - steps:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return np.concatenate([np.full(int(n), value) for value, n in blocks]) + steps
