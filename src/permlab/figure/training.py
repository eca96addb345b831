"""Curves of a training over its optimiser steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from permlab.config.build import component_class
from permlab.config.schema import is_component
from permlab.figure.style import PALETTE, new_figure
from permlab.record.rundir import read_metrics

# Title, and the metric of each line, of the panels above and below those that the run's task names.
ABOVE = (("loss", {"train": "train/loss", "validation": "val/loss"}),)
BELOW = (
    ("temperature", {"temperature": "permutation/temperature"}),
    (
        "permutation",
        {"Kendall's tau to\nthe starting order": "permutation/kendall", "entropy, 1 is uniform": "permutation/entropy"},
    ),
)
PHASE_SHADES = {"warmup": "#f3e6d8", "active": "#ffffff", "frozen": "#dfe8f1"}

Phase = tuple[str, int, int]
Panels = Sequence[tuple[str, Mapping[str, str]]]


def draw(run_dir: Path) -> Figure | None:
    """Curves of a run that has logged something."""
    records = read_metrics(run_dir)
    if not any(key != "step" and key != "epoch" for record in records for key in record):
        return None
    path = run_dir / "config.yaml"
    config = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return training_figure(records, _phases(config, records), _panels(config))


def _panels(config: Mapping[str, Any]) -> Panels:
    """Panels that the run's task names."""
    component = config.get("task", {}).get("component")
    return component_class("task", component).panels if is_component("task", component) else ()  # type: ignore[attr-defined]


def _phases(config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """Phases of the permutation, from the configuration and the number of steps."""
    method = config.get("method", {})
    if "freeze_fraction" not in method:
        return []
    num_steps = config.get("trainer", {}).get("max_steps", -1)
    if num_steps < 1:
        num_steps = max(record["step"] for record in records)
    begin = round(method.get("warmup_fraction", 0.0) * num_steps)
    end = num_steps - round(method["freeze_fraction"] * num_steps)
    return [("warmup", 0, begin), ("active", begin, end), ("frozen", end, num_steps)]


def training_figure(records: Sequence[Mapping[str, Any]], phases: Sequence[Phase] = (), panels: Panels = ()) -> Figure:
    """Loss, what the task names, temperature and distance from the start, one above the other.

    Panels without data are left out, and beside others those whose numbers stay what they are.

    Args:
        records: lines of `metrics.jsonl`.
        phases: name (`warmup`, `active`, `frozen`), first step and step after the last, of the permutation.
        panels: title, and the metric of each line by its label.
    Raises:
        ValueError: if the records hold nothing to draw.
    """
    wanted = [*ABOVE, *panels, *BELOW]
    panels = [(title, lines) for title, lines in wanted if any(_curve(records, key)[0].size for key in lines.values())]
    if not panels:
        raise ValueError(f"none of {len(records)} records has a metric to draw")
    panels = [(title, lines) for title, lines in panels if _moves(records, lines)] or panels
    figure = new_figure(9.6, 2.0 * len(panels) + 1.0)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(rows, panels, strict=True):
        _shade(axes, phases, named=axes is rows[0])
        _draw_lines(axes, records, lines)
        axes.set_ylabel(title)
        if title == "temperature":
            axes.set_ylim(bottom=0)
    rows[-1].set_xlabel("optimiser step")
    figure.align_ylabels()
    return figure


def _draw_lines(axes: Axes, records: Sequence[Mapping[str, Any]], lines: Mapping[str, str]) -> None:
    for colour, dashes, (label, key) in zip(PALETTE, ("-", "--"), lines.items(), strict=False):
        steps, values = _curve(records, key)
        if steps.size:
            marker = "o" if steps.size <= 30 else ""
            axes.plot(steps, values, color=colour, linestyle=dashes, marker=marker, markersize=3.5, label=label)
    if len(lines) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.margins(x=0.01)


def _moves(records: Sequence[Mapping[str, Any]], lines: Mapping[str, str]) -> bool:
    """Whether some line is not level; a single point may yet become one that is not."""
    curves = [values for key in lines.values() if (values := _curve(records, key)[1]).size]
    return any(values.size == 1 or np.unique(values).size > 1 for values in curves)


def _curve(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[key]) for record in records if key in record]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def _shade(axes: Axes, phases: Sequence[Phase], *, named: bool) -> None:
    for name, begin, end in phases:
        if end <= begin:
            continue
        axes.axvspan(begin, end, color=PHASE_SHADES[name], zorder=0, linewidth=0)
        if named and len(phases) > 1:
            above = axes.get_xaxis_transform()
            axes.text((begin + end) / 2, 1.03, name, transform=above, ha="center", va="bottom", color="#444444")
