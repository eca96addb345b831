"""The differentiable permutation layer: score, sort, and a surrogate for the one-hot matrix."""

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from permlab.method.scorer import ScoreMethod
from permlab.ops.sorting import soft_sort
from permlab.option import AddedLater, Fraction, PositiveInt, Range, Rate, SharesOne, Temperature, Where
from permlab.permutation import PermutationSample, Site, order_to_matrix


class Sort(ScoreMethod):
    """Orders items by falling score; gradients flow through a surrogate of the sorting matrix.

    With `surrogate=softmax` the surrogate is SoftSort's matrix: the softmax over items of minus
    the distance between a sorted and an unsorted score, to a power, over the temperature. Its
    rows sum to one, its columns need not.

    With `surrogate=product` it is the outer product `sorted[i] * scores[j]`, whose entry is the
    square `scores[j]^2` where item `j` is in slot `i`. It is no relaxation (its rows sum to
    nothing in particular, and it has no temperature), so only its gradient is used: the sample's
    soft matrix has the values of the hard one, and there is nothing for `soft_matrix` to return.

    Args:
        site: where the permutation acts.
        temperature: in units of score to the `power`; a number or a schedule over the active phase.
        lr: peak learning rate of the scores.
        warmup_fraction: first part of the training steps, with the starting order kept.
        freeze_fraction: last part of the training steps, with the learned order fixed.
        estimator: `relaxed` (soft matrix forward) or `straight_through` (hard order forward).
        surrogate: `softmax` or `product`.
        power: of the distance between scores, in `surrogate=softmax`; at least 1, usually 1 or 2.
        scorer: `vector` (one order for all inputs), `linear` or `mlp` (order by item features).
        width: hidden units of `scorer=mlp`.
        start: scores at the start: those of the starting `order`, to which a scorer adds, or `zero`, so that the
            scorer alone decides, wherever an item comes; `vector` has to start at the order.
    Raises:
        ValueError: for `product` with `relaxed`; if the scorer needs features that the site has
            not, or the fractions exceed 1.
    Source: zhenglinblog.top, "Differentiable Permutation Layer", 2025 (score, sort, one-hot, and
        the product whose squares mark the ones); Prillo and Eisenschlos 2020, arXiv:2006.16038,
        for the softmax.
    Differs from source: the hard matrix comes from sorting the scores, so it is a permutation
        where scores tie; the page's stop-gradient formula is read as hard + surrogate -
        stopgrad(surrogate).
    Cost: O(n^2) time and memory.
    Example:
        >>> site = Site(name="patches", order=torch.tensor([2, 0, 1]))
        >>> options = dict(lr=0.01, warmup_fraction=0.0, freeze_fraction=0.3, scorer="vector", width=1)
        >>> method = Sort(site, temperature=0.3, estimator="relaxed", surrogate="softmax", power=2.0, **options)
        >>> method().soft.detach().round(decimals=2)
        tensor([[0.0300, 0.0000, 0.9700],
                [0.9300, 0.0300, 0.0300],
                [0.0300, 0.9700, 0.0000]])
    """

    tuned_as: ClassVar[str] = "sort"
    reads_items = ("scorer", ("linear", "mlp"))

    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "width": ("scorer", ["vector", "linear"]),
        "power": ("surrogate", ["product"]),
        "temperature": ("surrogate", ["product"]),
    }

    def __init__(
        self,
        site: Site,
        *,
        temperature: Temperature,
        lr: Rate,
        warmup_fraction: Fraction,
        freeze_fraction: Annotated[Fraction, SharesOne("warmup_fraction")],
        estimator: Annotated[
            Literal["relaxed", "straight_through"], Where("surrogate", "product", equals="straight_through")
        ],
        surrogate: Literal["softmax", "product"],
        power: Annotated[float, Range(ge=1)],
        scorer: Literal["vector", "linear", "mlp"],
        width: PositiveInt,
        start: Annotated[Literal["order", "zero"], AddedLater("order")] = "order",
    ) -> None:
        if surrogate == "product" and estimator == "relaxed":
            raise ValueError("surrogate=product is no relaxation: it needs estimator=straight_through, got relaxed")
        super().__init__(
            site,
            temperature=temperature,
            lr=lr,
            warmup_fraction=warmup_fraction,
            freeze_fraction=freeze_fraction,
            estimator=estimator,
            scorer=scorer,
            width=width,
            start=start,
        )
        self.surrogate = surrogate
        self.power = power

    def relax(self, scores: Float[Tensor, "*b g m"]) -> Float[Tensor, "*b g m m"]:
        return soft_sort(scores, temperature=self.temperature, power=self.power)

    def sample(self, items: Tensor | None, generator: torch.Generator | None) -> PermutationSample:
        if self.surrogate == "softmax":
            return super().sample(items, generator)
        scores = self.scorer(items)
        order = self.sort_by_score(scores.detach())
        product = self.merge_matrices(_outer_product(self.split_scores(scores)))
        soft = order_to_matrix(order, dtype=product.dtype) + (product - product.detach())
        return PermutationSample(order=order, soft=soft, log_prob=None, estimator=self.estimator)

    def soft_matrix(self, items: Float[Tensor, "*b n d"] | None = None) -> Float[Tensor, "*c n n"] | None:
        return None if self.surrogate == "product" else super().soft_matrix(items)


def _outer_product(scores: Float[Tensor, "*b m"]) -> Float[Tensor, "*b m m"]:
    """Sorted (row) times unsorted (column) scores."""
    return scores.sort(dim=-1, descending=True).values.unsqueeze(-1) * scores.unsqueeze(-2)
