"""A pruning tried on few samples: what it does beside its steps, each part once, and what it holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from permlab.data.module import DataModule
from permlab.sparsity.calibrate import InputStatistics
from permlab.task import piece
from permlab.task.piece import Amounts, Piece

if TYPE_CHECKING:
    from permlab.task.prune.learner import PruneLearner

# Seconds that the passes over all calibration samples may take; of more samples, one batch is tried.
CALIBRATION_SECONDS = 5.0
# A search that is expected to take longer than this is not tried, but judged by one of another size.
SEARCH_SECONDS = 20.0
# Passes over the calibration samples before training: with second moments, which cost about another, and for logits.
PASSES = 3
# Calibration losses at the end, of which two more are of a relaxed permutation where there is one.
LAST_LOSSES = 3


class Rehearsal:
    """Makes a learner ready with what `prepare` does, but few samples, and one search for each shape of site.

    Args:
        learner: whose dense model need not be trained, as time and memory do not depend on its weights.
    """

    def __init__(self, learner: "PruneLearner") -> None:
        self.learner = learner
        self.batch_seconds = 0.0
        self.searches: dict[tuple[int, int], float] = {}
        self.skipped: dict[tuple[int, int], int] = {}
        self.scale, self.num_left = 1.0, 0

    def prepare(self, data: DataModule) -> None:
        learner, wanted = self.learner, self.learner.task.num_samples
        (batch,) = data.sample("train", min(wanted, data.settings["batch_size"]))[:1]
        inputs = learner._shorten(batch)[0].to(learner.device)
        learner.reading.eval()
        for _ in range(2):  # the first sets everything up
            self.batch_seconds = piece.timed(lambda: torch.no_grad()(learner.reading)(inputs))
        num_batches = -(-min(wanted, len(data.dataset("train"))) // len(inputs))
        num_tried = num_batches if PASSES * num_batches * self.batch_seconds <= CALIBRATION_SECONDS else 1
        self.scale, self.num_left = num_batches / num_tried, num_batches - num_tried
        with self._few(num_tried * len(inputs)), self._one_search_of_each_shape():
            learner.prepare(data, {})

    @contextmanager
    def _few(self, num_samples: int) -> Iterator[None]:
        task = self.learner.task
        before, task.num_samples = task.num_samples, min(task.num_samples, num_samples)
        try:
            yield
        finally:
            task.num_samples = before

    @contextmanager
    def _one_search_of_each_shape(self) -> Iterator[None]:
        search = self.learner._search
        self.learner._search = lambda name, *more: self._search_once(search, name, *more)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.learner._search

    def _search_once(self, search: Callable[..., None], name: str, *more: Any) -> None:
        layers = more[0] if more else self.learner.layers[name]
        shape = layers.items.shape[0], layers.items.shape[1]
        if shape not in self.searches and self._expected(shape) <= SEARCH_SECONDS:
            self.searches[shape] = piece.timed(lambda: search(name, *more))
            return
        self.skipped[shape] = self.skipped.get(shape, 0) + 1
        self.learner.method.set_features(name, layers.features())

    def _expected(self, shape: tuple[int, int]) -> float:
        """Seconds of a search, by the one of the nearest size: in proportion to pairs of channels times rows."""
        if not self.searches:
            return 0.0
        size = shape[0] ** 2 * shape[1]
        other = min(self.searches, key=lambda o: abs(o[0] ** 2 * o[1] - size))
        return self.searches[other] * size / (other[0] ** 2 * other[1])

    # What a run does beside its steps

    def pieces(self, amounts: Amounts) -> Iterator[Piece]:
        learner, scale = self.learner, self.scale
        left = sum(count * self._expected(shape) for shape, count in self.skipped.items())
        yield Piece("search", 1.0, left)
        yield Piece("calibration", PASSES * self.num_left, self.batch_seconds)
        orders, soft = learner.method.orders(), learner._soft_values()
        num_losses = (amounts.validations + LAST_LOSSES) * (1 if soft is None else 2)
        del soft
        yield Piece(
            "calibration loss", num_losses * scale, lambda: learner.calibration_loss(learner._hard_values(orders))
        )
        num_steps = learner.method.num_descent_steps
        yield Piece("descent", float(num_steps), lambda: learner._loss_of_a_batch(orders, 0) if num_steps else None)
        steps = learner.method.num_polish_steps
        yield Piece("polishing", (steps + 1) / 2 * scale if steps else 0.0, lambda: self._polish_one_step(orders))
        yield Piece("pruning and quality", scale, lambda: learner._quality(orders, learner._prune(orders)))
        yield Piece("pruning unpermuted", 1.0, lambda: learner._prune(orders))

    def _polish_one_step(self, orders: dict[str, Tensor]) -> None:
        """Two losses with gradients, and the swaps between them."""
        first = next(iter(self.learner.method.methods.values()))
        steps, first.num_polish_steps = first.num_polish_steps, 1  # type: ignore[assignment]
        try:
            self.learner._polish(orders, orders)
        finally:
            first.num_polish_steps = steps

    def holds(self) -> dict[str, int]:
        learner, of_model = self.learner, {id(x.untyped_storage()) for x in self.learner.parameters()}
        kinds = {
            "site statistics": (learner.layers, 1.0),
            "cached logits": (learner._kept_predictions.in_memory, self.scale),
            "calibration samples": ([learner.calibration, learner.held_out], self.scale),
        }
        return {name: round(scale * _size(values, of_model)) for name, (values, scale) in kinds.items()}


def _size(values: Any, others: set[int]) -> int:
    """Bytes of the tensors in containers and data classes, each counted once, those of others not at all."""
    storages = {id(s): s for s in (x.untyped_storage() for x in _tensors(values))}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in others)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, InputStatistics):
        yield from values.tensors
    elif is_dataclass(values):
        for part in fields(values):
            yield from _tensors(getattr(values, part.name, None))
