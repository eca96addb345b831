"""Next-token prediction on text, in the text's own order."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from permlab.data.spec import DataSpec
from permlab.method.base import Method
from permlab.model.base import Backbone
from permlab.option import Fraction
from permlab.task.base import Task
from permlab.task.score import cross_entropy


class Lm(Task):
    """Cross-entropy of the next token; the dense model that pruning starts from.

    There is no place in it for a method: tokens that were read in another order would have their
    targets among them.

    Args:
        spec, model, method: what is trained; the method is `fixed`.
        optim: settings of the optimiser, see `permlab.optim`.
        seed: of the run.
        label_smoothing: of the cross-entropy that is minimised.
    Raises:
        ValueError: if the method's order is not the text's own.
    """

    takes: ClassVar[tuple[str, ...]] = ("text",)
    permutes: ClassVar[str] = "nothing"

    def __init__(
        self,
        spec: DataSpec,
        model: Backbone,
        method: Method,
        optim: Mapping[str, Any],
        seed: int,
        *,
        label_smoothing: Fraction,
    ) -> None:
        super().__init__(spec, model, method, optim, seed)
        if not torch.equal(method.start_order, torch.arange(method.num_items)):
            raise ValueError("method.order permutes the tokens, which are read in their own order here; expected row")
        self.label_smoothing = label_smoothing

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        logits = self.model(inputs)
        loss = cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        self._check_finite(loss, {"logits": logits})
        if self._is_log_step():
            accuracy = (logits.argmax(-1) == targets).float().mean()
            self._record({"train/loss": loss.detach(), "train/accuracy": accuracy})
        return loss

    def predict(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)
