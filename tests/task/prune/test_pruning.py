"""The picture of a pruning, read back from the figure itself."""

import numpy as np
import pytest

from permlab.task.prune.figure.pruning import pruning_figure


@pytest.mark.parametrize("num_steps", [0, 5])
def test_bars_and_curve_show_the_arrays(num_steps: int) -> None:
    loss = np.linspace(1.0, 0.5, num_steps)
    figure = pruning_figure(["a", "b", "c"], np.array([0.1, 0.3, 0.2]), ["s", "t"], np.array([0.8, 0.9]), loss)
    assert [patch.get_width() for patch in figure.axes[0].patches] == [0.1, 0.3, 0.2]
    assert [patch.get_width() for patch in figure.axes[1].patches] == [0.8, 0.9]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]
    assert len(figure.axes) == (3 if num_steps else 2)
    if num_steps:
        assert figure.axes[2].lines[0].get_ydata().tolist() == loss.tolist()
