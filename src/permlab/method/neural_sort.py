"""Sorting by score, relaxed through sums of pairwise distances."""

from typing import Annotated, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from permlab.method.scorer import ScoreMethod
from permlab.ops.sorting import neural_sort
from permlab.option import AddedLater, Fraction, PositiveInt, Rate, SharesOne, Temperature
from permlab.permutation import Site


class NeuralSort(ScoreMethod):
    """Orders items by falling score; gradients flow through the NeuralSort matrix.

    Its logits grow with the number of items (they sum n distances), so a temperature that is
    warm for `Sort` is cold here. Rows of the relaxation sum to one, columns need not.

    Args:
        site: where the permutation acts.
        temperature: in units of score; a number or a schedule over the active phase.
        lr: peak learning rate of the scores.
        warmup_fraction: first part of the training steps, with the starting order kept.
        freeze_fraction: last part of the training steps, with the learned order fixed.
        estimator: `straight_through` (hard order forward) or `relaxed` (mixtures of items
            forward, to which the model adapts; expect a loss when the order is hardened).
        scorer: `vector` (one order for all inputs), `linear` or `mlp` (order by item features).
        width: hidden units of `scorer=mlp`.
        start: scores at the start: those of the starting `order`, to which a scorer adds, or `zero`, so that the
            scorer alone decides, wherever an item comes; `vector` has to start at the order.
    Raises:
        ValueError: if the scorer needs features that the site has not, or the fractions exceed 1.
    Source: Grover et al. 2019, arXiv:1903.08850, equation 5.
    Differs from source: the straight-through order comes from sorting the scores, not from the
        largest entry of each row, so that ties still give a permutation.
    Cost: O(n^2) time and memory.
    Example:
        >>> import torch
        >>> site = Site(name="patches", order=torch.tensor([2, 0, 1]))
        >>> options = dict(lr=0.01, warmup_fraction=0.0, freeze_fraction=0.3, scorer="vector", width=1)
        >>> NeuralSort(site, temperature=3.0, estimator="straight_through", **options)().order
        tensor([2, 0, 1])
    """

    tuned_as: ClassVar[str] = "sort"
    reads_items = ("scorer", ("linear", "mlp"))

    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "width": ("scorer", ["vector", "linear"]),
    }

    def __init__(
        self,
        site: Site,
        *,
        temperature: Temperature,
        lr: Rate,
        warmup_fraction: Fraction,
        freeze_fraction: Annotated[Fraction, SharesOne("warmup_fraction")],
        estimator: Literal["relaxed", "straight_through"],
        scorer: Literal["vector", "linear", "mlp"],
        width: PositiveInt,
        start: Annotated[Literal["order", "zero"], AddedLater("order")] = "order",
    ) -> None:
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

    def relax(self, scores: Float[Tensor, "*b g m"]) -> Float[Tensor, "*b g m m"]:
        return neural_sort(scores, temperature=self.temperature)
