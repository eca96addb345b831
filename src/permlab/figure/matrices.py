"""Square matrices over time, as panels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure

from permlab.figure.style import SEQUENTIAL, new_figure
from permlab.record.stored import read_snapshots

MAX_PANELS = 6


def read_series(run_dir: Path, key: str) -> tuple[list[int], list[np.ndarray]]:
    """Steps at which the snapshots of a run have an array of this name, and the arrays."""
    found = [(int(snapshot["step"]), snapshot[key]) for snapshot in read_snapshots(run_dir) if key in snapshot]
    return [step for step, _ in found], [array for _, array in found]


def matrices_figure(steps: Sequence[int], matrices: Sequence[np.ndarray], *, name: str) -> Figure:
    """Square matrices over time, row = slot and column = item, at up to six of the steps.

    Args:
        steps: optimiser steps, ascending.
        matrices: one `[n, n]` per step.
        name: `soft matrix` or `scores`; entries of a soft matrix lie between 0 and 1.
    """
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(MAX_PANELS, len(steps))).round().astype(int))
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(3.1 * columns + 1.0, 3.05 * rows + 0.5)
    soft = name == "soft matrix"
    low = 0.0 if soft else float(min(np.nanmin(matrices[index]) for index in chosen))
    high = 1.0 if soft else float(max(np.nanmax(matrices[index]) for index in chosen))
    # Square root: a row that is spread over many items would otherwise look empty.
    norm = PowerNorm(0.5, 0.0, 1.0) if soft else Normalize(low, high)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(chosen) :]:
        panel.set_axis_off()
    for panel, index in zip(panels.flat, chosen, strict=False):
        image = panel.imshow(matrices[index], cmap=SEQUENTIAL, norm=norm, interpolation="nearest")
        panel.set_title(f"step {steps[index]}")
    for panel in panels[:, 0]:
        panel.set_ylabel("slot")
    for panel in panels[-1]:
        panel.set_xlabel("item")
    figure.colorbar(image, ax=panels, shrink=0.7, label=f"{name}, square-root scale" if soft else name)
    return figure
