"""The numbers that a run is judged by, against loops over samples and tokens."""

import math

import pytest
import torch

from permlab.data.spec import DataSpec
from permlab.task.score import ImageScores, TextScores, cross_entropy

TEXT = DataSpec(kind="text", num_classes=7, channels=1, height=1, width=5)
IMAGE = DataSpec(kind="image", num_classes=7, channels=1, height=2, width=2)


def log_probabilities(logits: torch.Tensor) -> list[float]:
    total = math.log(sum(math.exp(value) for value in logits.tolist()))
    return [value - total for value in logits.tolist()]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_is_the_mean_over_tokens(smoothing: float) -> None:
    logits, targets = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    total = 0.0
    for sequence in range(3):
        for token in range(5):
            logs = log_probabilities(logits[sequence, token])
            total -= (1 - smoothing) * logs[targets[sequence, token]] + smoothing * sum(logs) / 7
    assert cross_entropy(logits, targets, label_smoothing=smoothing).item() == pytest.approx(total / 15, rel=1e-5)
    assert cross_entropy(logits[:, 0], targets[:, 0]).item() == pytest.approx(
        -sum(log_probabilities(logits[s, 0])[targets[s, 0]] for s in range(3)) / 3, rel=1e-5
    )


def test_perplexity_is_that_of_all_tokens_of_batches_of_any_size() -> None:
    scores = TextScores()
    losses, right = [], []
    for count in (4, 1):  # the mean of the batches' means would be another number
        logits, targets = 3 * torch.randn(count, 5, 7), torch.randint(7, (count, 5))
        scores.update(logits, targets)
        for sequence in range(count):
            for token in range(5):
                logs = log_probabilities(logits[sequence, token])
                losses.append(-logs[targets[sequence, token]])
                right.append(max(range(7), key=logs.__getitem__) == targets[sequence, token])
    found = scores.compute()
    assert set(found) == {"perplexity", "accuracy", "loss"}
    assert found["loss"].item() == pytest.approx(sum(losses) / 25, rel=1e-5)
    assert found["perplexity"].item() == pytest.approx(math.exp(sum(losses) / 25), rel=1e-5)
    assert found["accuracy"].item() == pytest.approx(sum(right) / 25)


def test_uniform_logits_have_the_vocabulary_as_perplexity_and_a_reset_forgets() -> None:
    scores = TextScores()
    scores.update(10 * torch.randn(2, 5, 7), torch.randint(7, (2, 5)))
    scores.reset()
    scores.update(torch.zeros(2, 5, 7), torch.randint(7, (2, 5)))
    assert scores.compute()["perplexity"].item() == pytest.approx(7, rel=1e-5)


def test_image_scores_against_a_loop() -> None:
    scores = ImageScores(IMAGE.num_classes)
    assert isinstance(scores, ImageScores)
    logits, labels = torch.randn(40, 7), torch.randint(7, (40,))
    for part in (slice(0, 33), slice(33, 40)):
        scores.update(logits[part], labels[part])
    ranks = [sorted(range(7), key=lambda k: -logits[i, k].item()).index(labels[i]) for i in range(40)]
    found = scores.compute()
    assert found["accuracy"].item() == pytest.approx(sum(rank == 0 for rank in ranks) / 40)
    assert found["accuracy_top5"].item() == pytest.approx(sum(rank < 5 for rank in ranks) / 40)
    expected = -sum(log_probabilities(logits[i])[labels[i]] for i in range(40)) / 40
    assert found["loss"].item() == pytest.approx(expected, rel=1e-5)
    scores.reset()
    scores.update(torch.eye(7), torch.arange(7))
    assert scores.compute()["accuracy"] == 1


def test_fewer_classes_than_five() -> None:
    scores = ImageScores(3)
    scores.update(torch.randn(6, 3), torch.arange(6) % 3)
    assert scores.compute()["accuracy_top5"] == 1
