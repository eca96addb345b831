"""Every figure of a run, from the files in its directory."""

import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from permlab.rundir import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# What a file of the run raises that was cut short or garbled since it was written.
UNREADABLE_ARRAYS = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


def draw_all(run_dir: Path) -> list[Path]:
    """Draw `figures/*.png` anew, each where the run has the files it is drawn from.

    Returns:
        Paths of the pictures, in a fixed order.
    """
    import matplotlib

    from permlab.figure.style import save_figure, style

    paths = []
    with matplotlib.rc_context(style()):
        for name, draw in FIGURES.items():
            try:
                figure = draw(run_dir)
            except (*UNREADABLE_ARRAYS, IndexError, AttributeError, RuntimeError) as error:
                # A picture is not worth the results it shows.
                warnings.warn(f"figures/{name}.png is not drawn: {type(error).__name__}: {error}", stacklevel=2)
                continue
            if figure is not None:
                paths.append(run_dir / "figures" / f"{name}.png")
                save_figure(figure, paths[-1])
    return paths


def read_snapshots(run_dir: Path) -> list[dict[str, np.ndarray]]:
    """Snapshots of the permutation, by ascending step."""
    return [_read(path) for path in sorted((run_dir / "arrays").glob("step=*.npz"))]


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _order(run_dir: Path) -> "Figure | None":
    from permlab.figure.order import order_figure

    grid, snapshots = _read(run_dir / "arrays" / "grid.npz"), read_snapshots(run_dir)
    if not grid or not snapshots:
        return None
    last = snapshots[-1]["order"]
    # The order of the checkpoint that validation picked, where there is a single one.
    order = last if last.ndim > 1 else _read(run_dir / "arrays" / "order.npz").get("order", last)
    rows, columns = grid["grid"].tolist()
    name = "learned" if "scores" in snapshots[-1] else "fixed"
    return order_figure(grid["start_order"], order, grid=(rows, columns), mean_image=grid.get("mean_image"), name=name)


def _soft(run_dir: Path) -> "Figure | None":
    from permlab.figure.order import matrices_figure

    steps, matrices = _series(run_dir, "soft")
    return matrices_figure(steps, matrices, name="soft matrix") if matrices else None


def _scores(run_dir: Path) -> "Figure | None":
    from permlab.figure.order import matrices_figure, scores_figure

    steps, scores = _series(run_dir, "scores")
    if not scores:
        return None
    if scores[0].ndim == 1:
        return scores_figure(steps, scores, _read(run_dir / "arrays" / "grid.npz")["start_order"])
    return matrices_figure(steps, [_block_diagonal(blocks) for blocks in scores], name="scores")


def _series(run_dir: Path, key: str) -> tuple[list[int], list[np.ndarray]]:
    found = [(int(snapshot["step"]), snapshot[key]) for snapshot in read_snapshots(run_dir) if key in snapshot]
    return [step for step, _ in found], [array for _, array in found]


def _block_diagonal(blocks: np.ndarray) -> np.ndarray:
    """Scores `[g, m, m]` of g groups as one matrix; what lies between groups is left empty."""
    num_groups, size, _ = blocks.shape
    matrix = np.full((num_groups * size, num_groups * size), np.nan, dtype=blocks.dtype)
    for group, block in enumerate(blocks):
        matrix[group * size : (group + 1) * size, group * size : (group + 1) * size] = block
    return matrix


def _training(run_dir: Path) -> "Figure | None":
    from permlab.figure.training import training_figure

    records = read_metrics(run_dir)
    if not any(key != "step" and key != "epoch" for record in records for key in record):
        return None
    return training_figure(records, _phases(run_dir, records))


def _phases(run_dir: Path, records: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Phases of the permutation, from the configuration and the number of steps."""
    path = run_dir / "config.yaml"
    config = yaml.safe_load(path.read_text()) if path.is_file() else {}
    method = config.get("method", {})
    if "freeze_fraction" not in method:
        return []
    num_steps = config.get("trainer", {}).get("max_steps", -1)
    if num_steps < 1:
        num_steps = max(record["step"] for record in records)
    begin = round(method.get("warmup_fraction", 0.0) * num_steps)
    end = num_steps - round(method["freeze_fraction"] * num_steps)
    return [("warmup", 0, begin), ("active", begin, end), ("frozen", end, num_steps)]


def _confusion(run_dir: Path) -> "Figure | None":
    from permlab.figure.confusion import confusion_figure

    arrays = _read(run_dir / "arrays" / "confusion.npz")
    names = arrays["names"].tolist() if "names" in arrays else None
    return confusion_figure(arrays["confusion"], names) if arrays else None


def _pruning(run_dir: Path) -> "Figure | None":
    from permlab.figure.pruning import pruning_figure

    arrays = _read(run_dir / "arrays" / "sites.npz")
    if not arrays:
        return None
    layers, errors = arrays["layer"].tolist(), arrays["reconstruction_error"]
    return pruning_figure(layers, errors, arrays["site"].tolist(), arrays["retained"], arrays["polished_loss"])


FIGURES: dict[str, Callable[[Path], "Figure | None"]] = {
    "order": _order,
    "soft_matrix": _soft,
    "scores": _scores,
    "training": _training,
    "confusion": _confusion,
    "pruning": _pruning,
}
