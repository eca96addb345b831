"""Picture of an order over the patch grid."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from permlab.figure.style import PALETTE, SEQUENTIAL, new_figure
from permlab.record.stored import read_arrays, read_snapshots


def draw(run_dir: Path) -> Figure | None:
    """Starting and learned order of a run whose items are permuted."""
    grid, snapshots = read_arrays(run_dir / "arrays" / "grid.npz"), read_snapshots(run_dir)
    if not grid or not snapshots:
        return None
    last = snapshots[-1]["order"]
    # The order of the checkpoint that validation picked, where there is a single one.
    order = last if last.ndim > 1 else read_arrays(run_dir / "arrays" / "order.npz").get("order", last)
    rows, columns = grid["grid"].tolist()
    name = "learned" if "scores" in snapshots[-1] else "fixed"
    return order_figure(grid["start_order"], order, grid=(rows, columns), mean_image=grid.get("mean_image"), name=name)


def order_figure(
    start: np.ndarray, order: np.ndarray, *, grid: tuple[int, int], mean_image: np.ndarray | None, name: str = "learned"
) -> Figure:
    """Starting and learned order side by side: above as a path, below as the rank of every patch.

    Where every image has its own order, their mean rank is shown, and the path that follows it.

    Args:
        start: int `[n]`, gather indices.
        order: int `[n]`, or `[b, n]` for several.
        grid: rows and columns, with n = rows * columns.
        mean_image: `[height, width]` in pixels, the background.
        name: of the right-hand order, for its title.
    Raises:
        ValueError: if the grid does not have n patches.
    """
    height, width = grid
    if start.shape != (height * width,) or order.shape[-1] != height * width:
        raise ValueError(f"orders of shape {start.shape} and {order.shape} do not fit a {height}x{width} grid")
    ranks = [_mean_rank(start), _mean_rank(order)]
    several = f", mean of {len(order)}" if order.ndim > 1 else ""
    titles = ["start", f"{name}{several} (Kendall {kendall(*ranks):+.2f} to start)"]
    if height == 1:
        return _sequence_figure(ranks, titles)
    figure = new_figure(9.6, 8.2 * min(max(height / width, 0.4), 1.5) + 1.2)
    axes = figure.subplots(2, 2)
    norm = Normalize(0, height * width - 1)
    for column, (rank, title) in enumerate(zip(ranks, titles, strict=True)):
        for row in range(2):
            _background(axes[row, column], grid, mean_image)
        axes[0, column].set_title(title)
        _draw_path(axes[0, column], np.argsort(rank, kind="stable"), grid, norm)
        mappable = _draw_ranks(axes[1, column], rank.reshape(grid), norm)
    axes[0, 0].set_ylabel("path")
    axes[1, 0].set_ylabel("slot of each patch")
    figure.colorbar(mappable, ax=axes, shrink=0.6, label="slot (0 is read first)")
    return figure


def kendall(rank: np.ndarray, other: np.ndarray) -> float:
    """Kendall's tau of two rankings: agreeing minus disagreeing pairs, over all pairs; ties count as neither."""
    signs = np.sign(np.subtract.outer(rank, rank)) * np.sign(np.subtract.outer(other, other))
    pairs = len(rank) * (len(rank) - 1)
    return float(signs.sum() / pairs) if pairs else 1.0


def _mean_rank(order: np.ndarray) -> np.ndarray:
    return np.argsort(np.atleast_2d(order), axis=-1).mean(0)


def _background(axes: Axes, grid: tuple[int, int], mean_image: np.ndarray | None) -> None:
    height, width = grid
    image = np.ones(grid) if mean_image is None else mean_image
    low, high = (0, 1) if mean_image is None else (float(image.min()), float(image.max()))
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_path(axes: Axes, order: np.ndarray, grid: tuple[int, int], norm: Normalize) -> None:
    rows, columns = np.divmod(order, grid[1])
    points = np.stack([columns, rows], axis=-1).astype(float)
    segments = list(np.stack([points[:-1], points[1:]], axis=1))
    # A white line underneath keeps the path visible on any background.
    axes.add_collection(LineCollection(segments, colors="white", linewidths=3.4, capstyle="round"))
    line = LineCollection(segments, cmap=SEQUENTIAL, norm=norm, linewidths=2, capstyle="round")
    line.set_array(np.arange(len(segments)) + 0.5)
    axes.add_collection(line)
    for point, marker, label in ((points[0], "o", "start"), (points[-1], "s", "end")):
        (drawn,) = axes.plot(*point, marker, label=label, linestyle="none", zorder=3)
        drawn.set(markersize=11, markerfacecolor=PALETTE[1], markeredgecolor="white", markeredgewidth=1.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, handletextpad=0.2)


def _draw_ranks(axes: Axes, rank: np.ndarray, norm: Normalize) -> PatchCollection:
    """Squares a little smaller than a patch, so that true colours and the image around them both show."""
    squares = [Rectangle((column - 0.36, row - 0.36), 0.72, 0.72) for row, column in np.ndindex(rank.shape)]
    collection = PatchCollection(squares, cmap=SEQUENTIAL, norm=norm, edgecolors="none")
    collection.set_array(rank.flatten())
    axes.add_collection(collection)
    if rank.size <= 100:
        for (row, column), value in np.ndenumerate(rank):
            colour = "white" if norm(value) < 0.6 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour)
    return collection


def _sequence_figure(ranks: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """For items in a row: the slot of each item."""
    figure = new_figure(9.6, 4.6)
    for axes, rank, title in zip(figure.subplots(1, 2, sharey=True), ranks, titles, strict=True):
        axes.scatter(np.arange(len(rank)), rank, c=rank, cmap=SEQUENTIAL, s=16)
        axes.set(title=title, xlabel="item", ylabel="slot (0 is read first)")
        axes.label_outer()
    return figure
