"""How well logits fit their targets: the numbers that a run is judged by, for images and for text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats, over images or over the tokens of every sequence.

    Shapes:
        logits: `[*b, k]`.  targets: int64 `[*b]`.
    """
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)


class Scores(nn.Module):
    """Running metrics of one split, `loss` among them; ranks agree on what `compute` returns."""

    def update(self, logits: Tensor, targets: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} defines no update")

    def compute(self) -> dict[str, Tensor]:
        """Metrics by name over everything seen since the last `reset`."""
        raise NotImplementedError(f"{type(self).__name__} defines no compute")

    def reset(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} defines no reset")


class ImageScores(Scores):
    """Accuracy, top-5 accuracy, calibration error (15 bins) and mean cross-entropy."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        scores = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "accuracy_top5": MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes)),
            "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
        }
        self.scores = MetricCollection(scores, compute_groups=False)  # type: ignore[arg-type]
        self.loss = MeanMetric()

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.scores.update(logits, targets)
        self.loss.update(F.cross_entropy(logits, targets, reduction="none"))

    def compute(self) -> dict[str, Tensor]:
        return {**self.scores.compute(), "loss": self.loss.compute()}

    def reset(self) -> None:
        self.scores.reset()
        self.loss.reset()


class TextScores(Scores):
    """Mean cross-entropy per token, perplexity (its exponential) and next-token accuracy.

    Perplexity is that of windows of the configured length, each read without what came before it:
    it depends on that length.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.accuracy = MeanMetric(), MeanMetric()

    def update(self, logits: Tensor, targets: Tensor) -> None:
        losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
        self.loss.update(losses)
        self.accuracy.update((logits.argmax(-1) == targets).float())

    def compute(self) -> dict[str, Tensor]:
        loss = self.loss.compute()
        return {"perplexity": torch.exp(loss), "accuracy": self.accuracy.compute(), "loss": loss}

    def reset(self) -> None:
        self.loss.reset()
        self.accuracy.reset()
