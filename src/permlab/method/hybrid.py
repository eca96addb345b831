"""Search, then learn, then keep only the swaps that help."""

from typing import Annotated, ClassVar, Literal

from jaxtyping import Int64
from torch import Tensor

from permlab.method.reconstruction_search import search_reconstruction
from permlab.method.sinkhorn import Sinkhorn
from permlab.option import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Rate,
    SharesOne,
    Temperature,
)
from permlab.permutation import Site
from permlab.sparsity.search import deal_and_match, swap_search
from permlab.sparsity.search_inputs import SearchInputs


class Hybrid(Sinkhorn):
    """Starts from an order found by search, learns from there, and is polished by swaps.

    The learned table is that of `Sinkhorn` in the coordinates of the found order. After training
    the task takes the better of the found and the learned order, by calibration loss, and tries
    swaps, keeping those that lower it: the result is never worse than its start on that loss. With
    `num_polish_steps=0` the task keeps the learned order, whatever its loss.

    Args:
        site: where the permutation acts.
        search: `reconstruction_search`, `swap_search`, `deal_and_match`, or `none`; `auto` is the
            first, or the last but one where the task updates the weights that its mask keeps.
        num_search_swaps: proposals of `reconstruction_search`; without effect on the others.
        num_polish_steps: evaluations of the calibration loss after training, each of a set of swaps; 0 for none.
        temperature, lr, warmup_fraction, freeze_fraction, estimator, num_iters, noise, start,
            start_scale, jitter, cost, width: as in `Sinkhorn`.
    Raises:
        ValueError: as `Sinkhorn`.
    Source: this repository; the parts are RIA's and apex's searches, PermLLM's learning
        (Zou et al. 2025, arXiv:2510.10136) and local search.
    """

    permutes: ClassVar[tuple[str, ...]] = ("weights",)

    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "width": ("cost", ["table"]),
        "jitter": ("start", ["random"]),
        "start_scale": ("start", ["zero"]),
        "num_search_swaps": ("search", ["swap_search", "deal_and_match", "none"]),
    }

    def __init__(
        self,
        site: Site,
        *,
        search: Literal["auto", "reconstruction_search", "swap_search", "deal_and_match", "none"],
        num_search_swaps: PositiveInt,
        num_polish_steps: NonNegativeInt,
        temperature: Temperature,
        lr: Rate,
        warmup_fraction: Fraction,
        freeze_fraction: Annotated[Fraction, SharesOne("warmup_fraction")],
        estimator: Literal["relaxed", "straight_through"],
        num_iters: PositiveInt,
        noise: NonNegativeFloat,
        start: Literal["order", "zero", "random"],
        start_scale: PositiveFloat,
        jitter: NonNegativeFloat,
        cost: Literal["table", "network"],
        width: PositiveInt,
    ) -> None:
        super().__init__(
            site,
            temperature=temperature,
            lr=lr,
            warmup_fraction=warmup_fraction,
            freeze_fraction=freeze_fraction,
            estimator=estimator,
            num_iters=num_iters,
            noise=noise,
            start=start,
            start_scale=start_scale,
            jitter=jitter,
            cost=cost,
            width=width,
        )
        self.search_name, self.num_search_swaps, self.num_polish_steps = search, num_search_swaps, num_polish_steps

    def search(self, inputs: SearchInputs) -> Int64[Tensor, " n"] | None:
        scores, n, m, num_groups = inputs.joint_scores(), inputs.n, inputs.m, inputs.num_groups
        name = self.search_name
        if name == "auto":
            name = "deal_and_match" if inputs.updates_weights else "reconstruction_search"
        if name == "deal_and_match":
            return deal_and_match(scores, n=n, m=m, num_groups=num_groups)
        if name == "swap_search":
            return swap_search(scores, n=n, m=m, num_groups=num_groups, seed=inputs.seed)
        if name == "reconstruction_search":
            return search_reconstruction(inputs, num_swaps=self.num_search_swaps)
        return None
