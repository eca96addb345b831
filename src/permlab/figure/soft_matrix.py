"""Picture of the relaxation that a method trains by, over time."""

from pathlib import Path

from matplotlib.figure import Figure

from permlab.figure.matrices import matrices_figure, read_series


def draw(run_dir: Path) -> Figure | None:
    """Soft matrices of a run that has any."""
    steps, matrices = read_series(run_dir, "soft")
    return matrices_figure(steps, matrices, name="soft matrix") if matrices else None
