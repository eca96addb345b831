"""Next-token prediction on text, in the text's own order: how it is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from permlab.method.base import Method
from permlab.model.base import Backbone
from permlab.task.learner import Learner
from permlab.task.lm.task import Lm
from permlab.task.score import Scores, TextScores, cross_entropy


class LmLearner(Learner):
    """Cross-entropy of the next token.

    Args:
        task: the options.
        model, method: what is trained; the method is `fixed`.
        optim: settings of the optimiser, see `permlab.task.optim`.
        seed: of the run.
    Raises:
        ValueError: if the method's order is not the text's own.
    """

    task: Lm

    def __init__(self, task: Lm, model: Backbone, method: Method, optim: Mapping[str, Any], seed: int) -> None:
        super().__init__(task, model, method, optim, seed)
        if not torch.equal(method.start_order, torch.arange(method.num_items)):
            raise ValueError("method.order permutes the tokens, which are read in their own order here; expected row")

    def make_scores(self) -> Scores:
        return TextScores()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        logits = self.model(inputs)
        loss = cross_entropy(logits, targets, label_smoothing=self.task.label_smoothing)
        self._check_finite(loss, {"logits": logits})
        if self._is_log_step():
            accuracy = (logits.argmax(-1) == targets).float().mean()
            self._record({"train/loss": loss.detach(), "train/accuracy": accuracy})
        return loss

    def predict(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)
