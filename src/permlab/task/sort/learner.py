"""Sort images by the numbers that they show: how it is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import MeanMetric

from permlab.config.plan import Plan
from permlab.data.module import DataModule
from permlab.errors import ConfigError
from permlab.method.base import Method
from permlab.model.base import Backbone
from permlab.task.learner import Learner
from permlab.task.place import at_samples
from permlab.task.score import Scores
from permlab.task.sort.task import Sort

# Keeps the logarithm of a weight that has vanished finite.
TINY = 1e-20


class SortScores(Scores):
    """How many samples are in order, and how many numbers in the slots of numbers equal to them.

    Beside that how many samples would be in an order drawn at random, which equal numbers make more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exact, self.elementwise, self.exact_chance = MeanMetric(), MeanMetric(), MeanMetric()

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count samples.

        Shapes:
            logits: numbers by slot `[b, n]`.  targets: the numbers `[b, n]` in any order.
        """
        if len(targets) == 0:
            return  # the last images of a split are too few
        right = logits == targets.sort(-1, descending=True).values
        self.exact.update(right.all(-1).float())
        self.elementwise.update(right.float())
        self.exact_chance.update(chance_in_order(targets))

    def compute(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).compute() for name in ("exact", "elementwise", "exact_chance")}

    def reset(self) -> None:
        for metric in (self.exact, self.elementwise, self.exact_chance):
            metric.reset()


class SortLearner(Learner):
    """Negative logarithm of the weight of items of the right value, mean over slots and samples.

    Args:
        task: the options.
        model, method: what is trained, the model without its head; an item of the method is a number.
        optim: settings of the optimiser, see `permlab.task.optim`.
        seed: of the method's noise.
    """

    task: Sort
    method: Method

    def __init__(self, task: Sort, model: Backbone, method: Method, optim: Mapping[str, Any], seed: int) -> None:
        super().__init__(task, model, method, optim, seed)
        model.head.requires_grad_(False)  # numbers are told by their order alone

    @classmethod
    def place(cls, plan: Plan, model: Backbone) -> Method:
        task = plan.task
        grid = (1, task.num_numbers)
        return at_samples(model, plan, "numbers", grid, images=task.num_digits)

    @property
    def grid(self) -> tuple[int, int]:
        return 1, self.task.num_numbers

    def describe(self) -> str:
        digits = "digit" if self.task.num_digits == 1 else "digits"
        return f", sorting {self.task.num_numbers} numbers of {self.task.num_digits} {digits}"

    def prepare(self, data: DataModule, before: Mapping[str, Path]) -> None:
        """See that there is a sample in every split.

        Raises:
            ConfigError: if there is not.
        """
        for split in ("train", "val", "test"):
            count, needed = len(data.dataset(split)), self.task.num_images
            if count < needed:
                raise ConfigError(f"task.num_numbers={self.task.num_numbers}: {split} has {count} images of {needed}")

    def make_scores(self) -> Scores:
        return SortScores()

    # Samples

    def items(self, inputs: Float[Tensor, "i c h w"]) -> Float[Tensor, "b n f"]:
        """Features of the numbers of as many samples as a batch of images makes."""
        images = self._samples(inputs).flatten(0, 2)
        features = self.model.encode(self.model.embed(images))
        return features.unflatten(0, (-1, self.task.num_numbers, self.task.num_digits)).flatten(-2)

    def numbers(self, labels: Int64[Tensor, " i"]) -> Int64[Tensor, "b n"]:
        """Numbers of the same samples, their first digit being that of most weight."""
        powers = torch.arange(self.task.num_digits - 1, -1, -1, device=labels.device)
        return (self._samples(labels) * self.spec.num_classes**powers).sum(-1)

    def _samples(self, images: Tensor) -> Tensor:
        """Images, or labels, by sample, number and digit: `[b, n, digits, ...]`."""
        count = len(images) // self.task.num_images
        shape = (count, self.task.num_numbers, self.task.num_digits)
        return images[: count * self.task.num_images].unflatten(0, shape)

    # Training and evaluation

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        items, numbers = self.items(images), self.numbers(labels)
        sample = self.method(items, generator=self._noise(batch_idx))
        if not self._is_learnable({"numbers": sample}, images=images, items=items):
            return self._no_loss()
        assert sample.soft is not None, "needs_relaxation has refused what gives none"
        loss = order_loss(sample.soft, numbers)
        self._check_finite(loss, {"images": images, "items": items, "soft": sample.soft})
        if self._is_log_step():
            scores = SortScores().to(self.device)
            scores.update(numbers.gather(-1, sample.order), numbers)
            self._record({"train/loss": loss.detach(), "train/exact": scores.compute()["exact"]})
        return loss

    def predict(self, inputs: Tensor) -> Int64[Tensor, "b n"]:
        """Orders of the numbers of as many samples as the images make, the largest first."""
        return self.method.best(self.items(inputs))

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        numbers = self.numbers(labels)
        placed = numbers.gather(-1, self.predict(images)) if len(numbers) else numbers
        self._scores(split).update(placed, numbers)
        return placed


def chance_in_order(numbers: Int64[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Probability that a random order sorts numbers: the orders of equal ones among themselves, over all n!.

    Example:
        >>> chance_in_order(torch.tensor([[7, 7, 7], [7, 8, 7], [7, 8, 9]]))
        tensor([1.0000, 0.3333, 0.1667])
    """
    equal = numbers.unsqueeze(-1) == numbers.unsqueeze(-2)
    counts = equal.tril().sum(-1).float()  # 1 to m along each m equal numbers
    everything = torch.arange(1, numbers.shape[-1] + 1, device=numbers.device).float()
    return (counts.log().sum(-1) - everything.log().sum()).exp()


def order_loss(soft: Float[Tensor, "b n n"], numbers: Int64[Tensor, "b n"]) -> Tensor:
    """Negative logarithm of the weight that slots give to items of the value that belongs there, in nats.

    Without equal numbers it is the mean over the slots of the cross-entropy between true and relaxed matrix.

    Args:
        soft: relaxed order, row = slot, which sorts the numbers in descending order.
        numbers: of the items.
    Example:
        >>> order_loss(torch.tensor([[[0.25, 0.75], [0.75, 0.25]]]), torch.tensor([[1, 2]])).exp()
        tensor(1.3333)
    """
    belongs = numbers.sort(-1, descending=True).values.unsqueeze(-1) == numbers.unsqueeze(-2)
    return -((soft * belongs).sum(-1) + TINY).log().mean()
