"""What a pruning lost, layer by layer, and how descent and polishing went."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from permlab.figure.style import PALETTE, new_figure
from permlab.record.stored import read_arrays

# Calibration losses on the way to the final orders, by what they are counted in.
TRACES = {"rounds of the descent": "descent_loss", "sets of swaps tried": "polished_loss"}


def draw(run_dir: Path) -> Figure | None:
    """What each layer and site of a pruning lost."""
    arrays = read_arrays(run_dir / "arrays" / "sites.npz")
    if not arrays:
        return None
    layers, errors = arrays["layer"].tolist(), arrays["reconstruction_error"]
    traces = {label: arrays[name] for label, name in TRACES.items() if len(arrays.get(name, ()))}
    return pruning_figure(layers, errors, arrays["site"].tolist(), arrays["retained"], traces)


def pruning_figure(
    layers: Sequence[str],
    errors: np.ndarray,
    sites: Sequence[str],
    retained: np.ndarray,
    traces: Mapping[str, np.ndarray],
) -> Figure:
    """Reconstruction error of every layer, retained score of every site, and the loss while swaps were made.

    Args:
        layers, errors: relative error of each layer's output on held-out inputs.
        sites, retained: share of the score that each site's mask keeps.
        traces: calibration losses, by what they are counted in.
    """
    num_bars = max(len(layers), len(sites))
    panels = 2 + len(traces)
    figure = new_figure(4.6 * panels, 0.24 * num_bars + 1.4)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel, names, values, colour, label in (
        (axes[0], layers, errors, PALETTE[0], "relative reconstruction error, held out"),
        (axes[1], sites, retained, PALETTE[1], "retained score"),
    ):
        places = np.arange(len(names))
        panel.barh(places, values, color=colour, height=0.7)
        panel.set_yticks(places, names, fontsize=7)
        panel.invert_yaxis()
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
    for panel, (label, losses) in zip(axes[2:], traces.items(), strict=True):
        panel.plot(np.arange(len(losses)), losses, color=PALETTE[2])
        panel.set_xlabel(label)
        panel.set_ylabel("divergence from dense, calibration")
        panel.set_ylim(bottom=0)
    return figure
