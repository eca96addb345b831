"""Put images together from their pieces: how it is trained."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchmetrics import MeanMetric

from permlab.config.plan import Plan
from permlab.method.base import Method
from permlab.model.base import Backbone
from permlab.permutation import gather_items, invert, permute
from permlab.task.jigsaw.task import Jigsaw
from permlab.task.learner import Learner
from permlab.task.place import at_samples
from permlab.task.score import Scores

# Keeps the logarithm of a weight that has vanished finite.
TINY = 1e-20


class JigsawScores(Scores):
    """How many pieces are in place, how many images solved, the rank correlation of places, and the squared error.

    Beside that how many pieces would be in place in an order drawn at random, which equal pieces make more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.placed, self.solved, self.kendall, self.error, self.placed_chance = (MeanMetric() for _ in range(5))

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count images.

        Shapes:
            logits: pieces by slot `[b, n, p]`, each one of the true ones.  targets: the image's, `[b, n, p]`.
        """
        places = true_places(logits, targets)
        right = places == torch.arange(places.shape[-1], device=places.device)
        self.placed.update(right.float())
        self.solved.update(right.all(-1).float())
        self.kendall.update(rank_correlation(places))
        self.error.update((logits - targets).square())
        equal = (targets.unsqueeze(-2) == targets.unsqueeze(-3)).all(-1)
        self.placed_chance.update(equal.float().mean(-1))

    def compute(self) -> dict[str, Tensor]:
        names = ("placed", "solved", "kendall", "error", "placed_chance")
        return {name: getattr(self, name).compute() for name in names}

    def reset(self) -> None:
        for metric in (self.placed, self.solved, self.kendall, self.error, self.placed_chance):
            metric.reset()


class JigsawLearner(Learner):
    """Squared error of the image that the relaxed order makes, and the cross-entropy of the order by its weight.

    Every image is shuffled anew at every step, by (seed, step); for evaluation always in the same way.

    Args:
        task: the options.
        model, method: what is trained, the model without its head; an item of the method is a piece.
        optim: settings of the optimiser, see `permlab.task.optim`.
        seed: of the shuffles and of the method's noise.
    """

    task: Jigsaw
    method: Method

    def __init__(self, task: Jigsaw, model: Backbone, method: Method, optim: Mapping[str, Any], seed: int) -> None:
        super().__init__(task, model, method, optim, seed)
        model.head.requires_grad_(False)  # no label is predicted

    @classmethod
    def place(cls, plan: Plan, model: Backbone) -> Method:
        sides = plan.task.num_sides
        return at_samples(model, plan, "pieces", (sides, sides))

    @property
    def grid(self) -> tuple[int, int]:
        return self.task.num_sides, self.task.num_sides

    def describe(self) -> str:
        return f", putting together {self.task.num_sides}x{self.task.num_sides} pieces"

    def make_scores(self) -> Scores:
        return JigsawScores()

    # Pieces

    def items(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n f"]:
        """Features of the pieces of images, in raster order."""
        return self._features(cut(inputs, self.task.num_sides))

    def _features(self, pieces: Float[Tensor, "b n c p q"]) -> Float[Tensor, "b n f"]:
        images = F.interpolate(pieces.flatten(0, 1), size=(self.spec.height, self.spec.width), mode="nearest")
        return self.model.encode(self.model.embed(images)).unflatten(0, pieces.shape[:2])

    def _shuffled(
        self, pieces: Float[Tensor, "b n c p q"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "b n c p q"], Int64[Tensor, "b n"]]:
        """Pieces in random orders, and the orders."""
        order = torch.rand(pieces.shape[:2], generator=generator, device=pieces.device).argsort(-1)
        return gather_items(pieces.flatten(2), order).view_as(pieces), order

    # Training and evaluation

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        generator = self._noise(batch_idx)
        whole = cut(batch[0], self.task.num_sides)
        pieces, shuffle = self._shuffled(whole, generator)
        items = self._features(pieces)
        sample = self.method(items, generator=generator)
        if not self._is_learnable({"pieces": sample}, images=batch[0], items=items):
            return self._no_loss()
        assert sample.soft is not None, "needs_relaxation has refused what gives none"
        given, wanted = pieces.flatten(2), whole.flatten(2)
        losses = {}
        if self.task.error_weight:
            losses["error"] = self.task.error_weight * F.mse_loss(permute(given, sample), wanted)
        if self.task.order_weight:
            belongs = same_pieces(wanted, given, invert(shuffle))
            losses["order"] = -self.task.order_weight * ((sample.soft * belongs).sum(-1) + TINY).log().mean()
        loss = torch.stack(list(losses.values())).sum()
        self._check_finite(loss, {"images": batch[0], "items": items, "soft": sample.soft})
        if self._is_log_step():
            places = true_places(gather_items(given, sample.order), wanted)
            right = places == torch.arange(places.shape[-1], device=places.device)
            logged = {f"train/{name}": value.detach() for name, value in losses.items()}
            self._record({"train/loss": loss.detach(), "train/placed": right.float().mean(), **logged})
        return loss

    def predict(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n p"]:
        """Pieces of images by slot, after they were shuffled and put together again."""
        generator = torch.Generator(device=inputs.device).manual_seed(self.seed)
        pieces, _ = self._shuffled(cut(inputs, self.task.num_sides), generator)
        return gather_items(pieces.flatten(2), self.method.best(self._features(pieces)))

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, _ = batch
        placed = self.predict(images)
        self._scores(split).update(placed, cut(images, self.task.num_sides).flatten(2))
        return placed


def cut(images: Float[Tensor, "b c h w"], sides: int) -> Float[Tensor, "b n c p q"]:
    """Pieces of images in raster order; the last row and column are repeated until `sides` divides both.

    Example:
        >>> cut(torch.arange(4.0).view(1, 1, 2, 2), 2).flatten()
        tensor([0., 1., 2., 3.])
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % sides, 0, -height % sides), mode="replicate")
    blocks = padded.unflatten(-1, (sides, -1)).unflatten(-3, (sides, -1))  # b c rows p columns q
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def same_pieces(
    wanted: Float[Tensor, "b n p"], given: Float[Tensor, "b n p"], order: Int64[Tensor, "b n"]
) -> Bool[Tensor, "b n n"]:
    """Which of the given pieces (column) looks as it should in a slot (row).

    Args:
        wanted: the image's pieces.
        given: the same pieces in another order.
        order: of the given ones that gives the image; a piece equals itself.
    """
    equal = (wanted.unsqueeze(-2) == given.unsqueeze(-3)).all(-1)
    return equal.scatter(-1, order.unsqueeze(-1), True)


def true_places(placed: Float[Tensor, "b n p"], wanted: Float[Tensor, "b n p"]) -> Int64[Tensor, "b n"]:
    """Where in the image the piece in each slot belongs: there, if the image looks like it there.

    Otherwise the first place that looks like it.
    """
    equal = (placed.unsqueeze(-2) == wanted.unsqueeze(-3)).all(-1)
    first = equal.to(torch.uint8).argmax(-1)
    slots = torch.arange(placed.shape[-2], device=placed.device)
    return torch.where(equal.diagonal(dim1=-2, dim2=-1), slots, first)


def rank_correlation(places: Int64[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Kendall's tau-a of places with their slots: pairs in order minus pairs out of order, over all pairs."""
    signs = (places.unsqueeze(-2) - places.unsqueeze(-1)).sign().triu(1)
    num_items = places.shape[-1]
    return signs.sum((-2, -1)) / (num_items * (num_items - 1) / 2)
