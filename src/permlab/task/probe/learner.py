"""Classify images by a linear head on frozen features: how it is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from permlab.data.loader import ArrayDataset
from permlab.data.module import DataModule
from permlab.method.base import Method
from permlab.model.base import Backbone
from permlab.permutation import permute
from permlab.record.pulse import watched
from permlab.task.learner import Learner
from permlab.task.probe.task import Probe
from permlab.task.score import ImageScores, Scores, cross_entropy


class ProbeLearner(Learner):
    """Cross-entropy of the head alone; the backbone computes in evaluation mode and has no gradient.

    The features of the validation images, and of the training images where those are the same in every epoch,
    are computed once, before the training, and held in memory: a step is then that of a linear layer. Every rank
    computes all of them.

    Args:
        task: the options.
        model, method: the head of the model is trained; the method is `fixed`.
        optim: settings of the optimiser, see `permlab.task.optim`.
        seed: of the run.
    Raises:
        ValueError: if the model's head has nothing to learn.
    Cost: of an image one forward pass and `num_features` floats of memory.
    """

    method: Method
    task: Probe

    def __init__(self, task: Probe, model: Backbone, method: Method, optim: Mapping[str, Any], seed: int) -> None:
        super().__init__(task, model, method, optim, seed)
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        if not self.learns:
            raise ValueError(f"the head of a {type(model).__name__} has no parameters to learn")
        self.computed: set[str] = set()  # splits whose batches are features

    def make_scores(self) -> Scores:
        return ImageScores(self.spec.num_classes)

    def prepare(self, data: DataModule, before: Mapping[str, Path]) -> None:
        """Compute features once, where every epoch would compute the same."""
        data.keep("train", data.drawn("train", self.task.num_samples))
        for split in ("train", "val"):
            if split == "val" or not data.augments:
                data.keep(split, self._features_of(data, split))
                self.computed.add(split)

    def _features_of(self, data: DataModule, split: str) -> ArrayDataset:
        batches = watched(f"features of {split}", "batches", data.in_order(split))
        parts = [(self._features(inputs.to(self.device)).cpu(), labels) for inputs, labels in batches]
        features, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        return ArrayDataset(features.numpy(), labels.numpy())

    @torch.no_grad()
    def _features(self, inputs: Tensor) -> Float[Tensor, "b f"]:
        self.model.eval()
        items = self.model.embed(inputs)
        return self.model.encode(permute(items, self.method(items)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        features = inputs if "train" in self.computed else self._features(inputs)
        logits = self.model.head(features)
        loss = cross_entropy(logits, labels, label_smoothing=self.task.label_smoothing)
        self._check_finite(loss, {"features": features, "logits": logits})
        if self._is_log_step():
            accuracy = (logits.argmax(-1) == labels).float().mean()
            self._record({"train/loss": loss.detach(), "train/accuracy": accuracy})
        return loss

    def predict(self, inputs: Tensor) -> Tensor:
        return self.model.head(self._features(inputs))

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        logits = self.model.head(inputs) if split in self.computed else self.predict(inputs)
        self._scores(split).update(logits.float(), labels)
        return logits
