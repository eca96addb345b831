"""The confusion matrix and the accuracy of every class."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, recall_score

from permlab.task.classify.figure.confusion import confusion_figure


def test_accuracy_per_class_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 200)
    guess = np.where(rng.random(200) < 0.7, truth, rng.integers(0, 5, 200))
    figure = confusion_figure(confusion_matrix(truth, guess))
    matrix, bars = figure.axes[0], figure.axes[1]
    widths = [bar.get_width() for bar in bars.patches]
    np.testing.assert_allclose(widths, 100 * recall_score(truth, guess, average=None))
    assert f"{100 * (truth == guess).mean():.1f} %" in matrix.get_title()
    numbers = {text.get_position(): int(text.get_text()) for text in matrix.texts}
    assert numbers[(1, 0)] == ((truth == 0) & (guess == 1)).sum()
    assert sum(numbers.values()) == 200


def test_a_class_without_samples_has_accuracy_zero() -> None:
    figure = confusion_figure(np.array([[2, 0], [0, 0]]))
    assert [bar.get_width() for bar in figure.axes[1].patches] == [100, 0]


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_labels_are_named_and_within_the_margins(num_classes: int) -> None:
    names = [f"class number {index}" for index in range(num_classes)]
    figure = confusion_figure(np.eye(num_classes, dtype=int), names)
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.01
    assert (box.x1, box.y1) <= (width + 0.01, height + 0.01)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == [
        names[0],
        names[-(-num_classes // 20)],
    ]


def test_a_matrix_that_is_not_square_is_an_error() -> None:
    with pytest.raises(ValueError, match="2, 3"):
        confusion_figure(np.zeros((2, 3)))
