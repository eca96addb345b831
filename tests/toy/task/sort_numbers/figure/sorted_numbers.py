"""Ranks of the numbers of a few samples, slot by slot."""

from pathlib import Path

from matplotlib.figure import Figure

from permlab.figure.style import new_figure
from permlab.record.stored import read_arrays


def draw(run_dir: Path) -> Figure | None:
    arrays = read_arrays(run_dir / "arrays" / "ranks.npz")
    if not arrays:
        return None
    figure = new_figure(4.8, 3.2)
    figure.subplots().plot(arrays["ranks"].T)
    return figure
