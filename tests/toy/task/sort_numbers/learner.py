"""Sort numbers, the least first: how it is trained."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from permlab.method.base import Method
from permlab.permutation import permute
from permlab.task.learner import Learner, Result, Summary
from permlab.task.score import Scores
from permlab.task.sort_numbers.task import SortNumbers


class DisplacementScores(Scores):
    """How far numbers are from the slots of their ranks, and how many samples are in order."""

    def __init__(self) -> None:
        super().__init__()
        self.displacement, self.in_order = MeanMetric(), MeanMetric()

    def update(self, logits: Tensor, targets: Tensor) -> None:
        distance = (logits - torch.arange(logits.shape[-1], device=logits.device)).abs()
        self.displacement.update(distance)
        self.in_order.update((distance == 0).all(-1).float())

    def compute(self) -> dict[str, Tensor]:
        return {"displacement": self.displacement.compute(), "in_order": self.in_order.compute()}

    def reset(self) -> None:
        self.displacement.reset()
        self.in_order.reset()


class SortNumbersLearner(Learner):
    """Squared error of the permuted numbers, and of what the model reads of them, from the sorted ones."""

    task: SortNumbers
    method: Method

    def make_scores(self) -> Scores:
        return DisplacementScores()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        numbers, _ = batch
        items = self.model.embed(numbers)
        sample = self.method(items, generator=self._noise(batch_idx))
        if not self._is_learnable({"numbers": sample}, items=items):
            return self._no_loss()
        permuted, wanted = permute(items, sample), numbers.sort(-1).values.unsqueeze(-1)
        read = self.model.read(permuted)
        loss = F.mse_loss(permuted, wanted) + self.task.pair_weight * F.mse_loss(read, wanted)
        loss = loss + self._untouched_parameters()
        self._check_finite(loss, {"soft": sample.soft, "read": read})
        if self._is_log_step():
            self._record({"train/loss": loss.detach()})
        return loss

    def predict(self, inputs: Tensor) -> Tensor:
        """Ranks of the numbers in their slots."""
        order = self.method.best(self.model.embed(inputs)).expand(inputs.shape)
        return inputs.argsort(-1).argsort(-1).gather(-1, order)

    def finish(self, test: Callable[[], Summary]) -> Result:
        numbers = torch.rand(8, self.model.num_items, generator=torch.Generator().manual_seed(self.seed))
        ranks = self.predict(numbers.to(self.device)).cpu().numpy()
        return Result(test(), {"order": self.order_arrays(), "ranks": {"ranks": ranks}})
