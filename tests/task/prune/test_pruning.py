"""The picture of a pruning, read back from the figure itself."""

import numpy as np
import pytest

from permlab.task.prune.figure.pruning import pruning_figure


@pytest.mark.parametrize("traces", [{}, {"tries": [1.0, 0.7, 0.5]}, {"rounds": [2.0, 1.0], "tries": [1.0, 0.5]}])
def test_bars_and_curves_show_the_arrays(traces: dict[str, list[float]]) -> None:
    bars = (["a", "b", "c"], np.array([0.1, 0.3, 0.2]), ["s", "t"], np.array([0.8, 0.9]))
    figure = pruning_figure(*bars, {label: np.array(losses) for label, losses in traces.items()})
    assert [patch.get_width() for patch in figure.axes[0].patches] == [0.1, 0.3, 0.2]
    assert [patch.get_width() for patch in figure.axes[1].patches] == [0.8, 0.9]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]
    curves = {axes.get_xlabel(): axes.lines[0].get_ydata().tolist() for axes in figure.axes[2:]}
    assert curves == traces
