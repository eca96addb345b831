"""Square matrices over time, as panels."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure

from permlab.figure.style import DIVERGING, SEQUENTIAL, new_figure
from permlab.record.stored import read_snapshots

MAX_PANELS = 6


def read_series(run_dir: Path, key: str) -> tuple[list[int], list[np.ndarray]]:
    """Steps at which the snapshots of a run have an array of this name, and the arrays."""
    found = [(int(snapshot["step"]), snapshot[key]) for snapshot in read_snapshots(run_dir) if key in snapshot]
    return [step for step, _ in found], [array for _, array in found]


def matrices_figure(steps: Sequence[int], matrices: Sequence[np.ndarray], *, name: str) -> Figure:
    """Square matrices over time, row = slot and column = item, at up to six of the steps at which they changed.

    Numbers of both signs have colours that diverge from white at zero.

    Args:
        steps: optimiser steps, ascending.
        matrices: one `[n, n]` per step.
        name: `soft matrix` or `scores`; entries of a soft matrix lie between 0 and 1.
    """
    changed = _changed(matrices)
    chosen = changed[np.unique(np.linspace(0, len(changed) - 1, min(MAX_PANELS, len(changed))).round().astype(int))]
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(3.1 * columns + 1.0, 3.05 * rows + 0.7)
    soft = name == "soft matrix"
    # Square root: a row that is spread over many items would otherwise look empty.
    colours, norm = (SEQUENTIAL, PowerNorm(0.5, 0.0, 1.0)) if soft else _scale([matrices[index] for index in chosen])
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(chosen) :]:
        panel.set_axis_off()
    for panel, index in zip(panels.flat, chosen, strict=False):
        image = panel.imshow(matrices[index], cmap=colours, norm=norm, interpolation="nearest")
        # A matrix that stays as it is, say of a frozen order, is shown once.
        last = changed[changed > index][0] - 1 if (changed > index).any() else len(steps) - 1
        panel.set_title(f"step {steps[index]}" + (f" to {steps[last]}" if last > index else ""))
    for panel in panels[:, 0]:
        panel.set_ylabel("slot")
    for panel in panels[-1]:
        panel.set_xlabel("item")
    figure.colorbar(image, ax=panels, shrink=0.7, label=f"{name}, square-root scale" if soft else name)
    return figure


def _changed(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Indices of the matrices that are not what the one before is."""
    moved = (not np.array_equal(a, b, equal_nan=True) for a, b in pairwise(matrices))
    return np.array([0, *(index for index, changes in enumerate(moved, 1) if changes)])


def _scale(matrices: Sequence[np.ndarray]) -> tuple[str, Normalize]:
    low, high = (float(f([f(matrix) for matrix in matrices])) for f in (np.nanmin, np.nanmax))
    if low >= 0:
        return SEQUENTIAL, Normalize(low, high)
    bound = max(abs(low), abs(high))
    return DIVERGING, Normalize(-bound, bound)
