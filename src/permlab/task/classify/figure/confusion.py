"""Which classes are taken for which."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from permlab.figure.style import PALETTE, new_figure
from permlab.record.stored import read_arrays

MAX_NUMBERED = 20


def draw(run_dir: Path) -> Figure | None:
    """Confusion matrix of a run that has one."""
    arrays = read_arrays(run_dir / "arrays" / "confusion.npz")
    names = arrays["names"].tolist() if "names" in arrays else None
    return confusion_figure(arrays["confusion"], names) if arrays else None


def confusion_figure(counts: np.ndarray, names: Sequence[str] | None = None) -> Figure:
    """Confusion matrix in per cent of each true class, its counts, and the accuracy of every class.

    Args:
        counts: `[k, k]`, row = true class, column = predicted class.
        names: of the classes; by default their numbers.
    Raises:
        ValueError: if the matrix is not square.
    """
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"a confusion matrix is square, got shape {counts.shape}")
    num_classes = len(counts)
    labels = list(names) if names is not None else [str(index) for index in range(num_classes)]
    totals = counts.sum(1)
    shares = counts / np.maximum(totals, 1)[:, None]
    accuracy = float(np.trace(counts) / max(counts.sum(), 1))

    figure = new_figure(9.6, 7.4)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    image = left.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    left.set(xlabel="predicted class", ylabel="true class")
    left.set_title(f"{int(counts.sum())} images, accuracy {100 * accuracy:.1f} %")
    ticks = np.arange(0, num_classes, -(-num_classes // MAX_NUMBERED))
    left.set_xticks(ticks, [labels[tick] for tick in ticks], rotation=90 if max(map(len, labels)) > 3 else 0)
    left.set_yticks(ticks, [labels[tick] for tick in ticks])
    if num_classes <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                left.text(column, row, str(int(count)), ha="center", va="center", fontsize=9, color=colour)
    # Below, where no class is read off it.
    bar = figure.colorbar(image, ax=left, location="bottom", shrink=0.5, aspect=30, pad=0.02)
    bar.set_label("colour: % of the images of the true class", fontsize=9)
    bar.ax.tick_params(labelsize=8)

    right.barh(np.arange(num_classes), 100 * np.diag(shares), color=PALETTE[0])
    right.axvline(100 * accuracy, color=PALETTE[1], linestyle="--", linewidth=1.2, label="all classes")
    right.set(xlim=(0, 100), ylim=(num_classes - 0.5, -0.5), xlabel="accuracy, %", title="per class")
    right.set_yticks(ticks, [labels[tick] for tick in ticks])
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1))
    right.set_ylabel("true class")
    return figure
