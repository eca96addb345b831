"""Picture of the scores that a method learns, over time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from permlab.figure.matrices import matrices_figure, read_series
from permlab.figure.style import SEQUENTIAL, new_figure
from permlab.record.stored import read_arrays


def draw(run_dir: Path) -> Figure | None:
    """Scores of a run that has any: a line for each item, or matrices."""
    steps, scores = read_series(run_dir, "scores")
    if not scores:
        return None
    if scores[0].ndim == 1:
        return scores_figure(steps, scores, read_arrays(run_dir / "arrays" / "grid.npz")["start_order"])
    return matrices_figure(steps, [_block_diagonal(blocks) for blocks in scores], name="scores")


def _block_diagonal(blocks: np.ndarray) -> np.ndarray:
    """Scores `[g, m, m]` of g groups as one matrix; what lies between groups is left empty."""
    num_groups, size, _ = blocks.shape
    matrix = np.full((num_groups * size, num_groups * size), np.nan, dtype=blocks.dtype)
    for group, block in enumerate(blocks):
        matrix[group * size : (group + 1) * size, group * size : (group + 1) * size] = block
    return matrix


def scores_figure(steps: Sequence[int], scores: Sequence[np.ndarray], start: np.ndarray) -> Figure:
    """One line per item, coloured by its slot in the starting order; where lines cross, the order changes.

    Args:
        steps: optimiser steps, ascending.
        scores: one `[n]` per step; the highest score is read first.
        start: int `[n]`, the starting order.
    """
    figure = new_figure(9.6, 5.0)
    axes = figure.subplots()
    values = np.stack(list(scores), axis=1)
    norm = Normalize(0, len(start) - 1)
    lines = [np.stack([steps, values[item]], axis=-1) for item in start]
    collection = LineCollection(lines, cmap=SEQUENTIAL, norm=norm, linewidths=1.2)
    collection.set_array(np.arange(len(start)))
    axes.add_collection(collection)
    axes.autoscale()
    axes.margins(x=0.01, y=0.04)
    axes.set(xlabel="optimiser step", ylabel="score (highest is read first)", title="scores of the items")
    figure.colorbar(collection, ax=axes, label="slot in the starting order")
    return figure
