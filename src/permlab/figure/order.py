"""Picture of an order over the patch grid."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from permlab.figure.style import PALETTE, SEQUENTIAL, new_figure
from permlab.record.stored import read_arrays, read_snapshots

FEW = 144  # patches that are numbered


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
    """Starting and learned order side by side: above the rank of every patch, below the path over the mean image.

    Steps to a neighbouring patch are thick and jumps are thin, the longer the paler. Where every image has its
    own order, their mean rank is shown, and the path that follows it. An order that is still the starting one
    is shown once.

    Args:
        start: int `[n]`, gather indices.
        order: int `[n]`, or `[b, n]` for several.
        grid: rows and columns, with n = rows * columns.
        mean_image: `[height, width]` in pixels, the background of the path.
        name: of the right-hand order, for its title.
    Raises:
        ValueError: if the grid does not have n patches.
    """
    height, width = grid
    if start.shape != (height * width,) or order.shape[-1] != height * width:
        raise ValueError(f"orders of shape {start.shape} and {order.shape} do not fit a {height}x{width} grid")
    ranks = [_mean_rank(start), _mean_rank(order)]
    several = f", mean of {len(order)}" if order.ndim > 1 else ""
    titles = ["starting order", f"{name} order{several}, Kendall's tau to the starting one {kendall(*ranks):+.2f}"]
    if np.array_equal(ranks[0], ranks[1]):
        ranks, titles = ranks[:1], [f"{name} order{several}, which is the starting one"]
    if height == 1:
        return _sequence_figure(ranks, titles)
    figure = new_figure(4.8 * len(ranks) + 0.4, 8.4 * min(max(height / width, 0.4), 1.5) + 1.4)
    axes = figure.subplots(2, len(ranks), squeeze=False)
    norm = Normalize(0, max(1, height * width - 1))
    for column, (rank, title) in enumerate(zip(ranks, titles, strict=True)):
        axes[0, column].set_title(title)
        mappable = _draw_ranks(axes[0, column], rank.reshape(grid), norm)
        _background(axes[1, column], grid, mean_image)
        _draw_path(axes[1, column], np.argsort(rank, kind="stable"), grid, norm)
    axes[0, 0].set_ylabel("slot of each patch")
    axes[1, 0].set_ylabel("path over the mean image" if mean_image is not None else "path")
    bar = figure.colorbar(mappable, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label("slot, 0 is read first")
    handles = axes[1, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower right", ncols=2, handletextpad=0.2)
    return figure


def kendall(rank: np.ndarray, other: np.ndarray) -> float:
    """Kendall's tau of two rankings: agreeing minus disagreeing pairs, over all pairs; ties count as neither."""
    signs = np.sign(np.subtract.outer(rank, rank)) * np.sign(np.subtract.outer(other, other))
    pairs = len(rank) * (len(rank) - 1)
    return float(signs.sum() / pairs) if pairs else 1.0


def _mean_rank(order: np.ndarray) -> np.ndarray:
    return np.argsort(np.atleast_2d(order), axis=-1).mean(0)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _background(axes: Axes, grid: tuple[int, int], mean_image: np.ndarray | None) -> None:
    """The mean image, pale and with its bright parts dark, so that a path in colours is seen on it."""
    height, width = grid
    image = np.zeros(grid) if mean_image is None else mean_image
    low, high = float(image.min()), float(image.max())
    spread = max(high - low, 1e-9)
    axes.imshow(image, cmap="gray_r", vmin=low, vmax=low + 3 * spread, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    _bare(axes)


def _draw_path(axes: Axes, order: np.ndarray, grid: tuple[int, int], norm: Normalize) -> None:
    rows, columns = np.divmod(order, grid[1])
    points = np.stack([columns, rows], axis=-1).astype(float)
    segments = np.stack([points[:-1], points[1:]], axis=1)
    lengths = np.hypot(*(points[1:] - points[:-1]).T)
    is_near = lengths < 1.5  # beside or across a corner
    slots = np.arange(len(segments)) + 0.5
    # Jumps lie beneath, and fade with their length: many long lines would hide everything else.
    jumps = LineCollection(list(segments[~is_near]), cmap=SEQUENTIAL, norm=norm, linewidths=0.9)
    jumps.set_array(slots[~is_near])
    if not is_near.all():  # Matplotlib refuses none
        jumps.set_alpha(np.clip(1.6 / lengths[~is_near], 0.25, 1.0))
    near = LineCollection(list(segments[is_near]), cmap=SEQUENTIAL, norm=norm, linewidths=3.2, capstyle="round")
    near.set_array(slots[is_near])
    axes.add_collection(jumps)
    axes.add_collection(near)
    for point, marker, label in ((points[0], "o", "read first"), (points[-1], "s", "read last")):
        (drawn,) = axes.plot(*point, marker, label=label, linestyle="none", zorder=3)
        drawn.set(markersize=11, markerfacecolor=PALETTE[1], markeredgecolor="white", markeredgewidth=1.5)


def _draw_ranks(axes: Axes, rank: np.ndarray, norm: Normalize) -> AxesImage:
    image = axes.imshow(rank, cmap=SEQUENTIAL, norm=norm, interpolation="nearest")
    _bare(axes)
    if rank.size <= FEW:
        size = 9 if rank.size <= 100 else 7
        for (row, column), value in np.ndenumerate(rank):
            colour = "white" if norm(value) < 0.6 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size, color=colour)
    return image


def _sequence_figure(ranks: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """For items in a row: the slot of each item."""
    figure = new_figure(4.8 * len(ranks), 4.6)
    for axes, rank, title in zip(
        figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0], ranks, titles, strict=True
    ):
        axes.scatter(np.arange(len(rank)), rank, c=rank, cmap=SEQUENTIAL, s=16)
        axes.set(title=title, xlabel="item", ylabel="slot (0 is read first)")
        axes.label_outer()
    return figure
