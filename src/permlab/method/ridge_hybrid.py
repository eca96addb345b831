"""Search for an order of items in closed form, then learn from there."""

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from permlab.method.sinkhorn import Sinkhorn
from permlab.method.training_items import TrainingItems
from permlab.ops.ridge_search import ridge_search
from permlab.option import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Rate, SharesOne, Temperature
from permlab.permutation import Site


class RidgeHybrid(Sinkhorn):
    """Starts from the order that `RidgeSearch` finds, and learns on with the model itself.

    The search takes a linear memory with fixed decays for the model; what the model makes of an order beyond
    that is left to learn. The learned table is that of `Sinkhorn` in the coordinates of the found order.

    Args:
        site: where the permutation acts.
        num_search_swaps, ridge, num_images: `num_swaps`, `ridge` and `num_images` of `RidgeSearch`, whose other
            options are left as they are.
        temperature, lr, warmup_fraction, freeze_fraction, estimator, num_iters, noise, start_scale, jitter: as in
            `Sinkhorn`.
    Raises:
        ValueError: as `Sinkhorn` and `ridge_search`.
    Source: this repository.
    """

    permutes: ClassVar[tuple[str, ...]] = ("items",)
    reads_items: ClassVar[tuple[str, tuple[str, ...]] | None] = None
    no_effect: ClassVar[dict[str, tuple[str, list]]] = {}

    found: Tensor

    def __init__(
        self,
        site: Site,
        *,
        num_search_swaps: PositiveInt,
        ridge: PositiveFloat,
        num_images: PositiveInt,
        temperature: Temperature,
        lr: Rate,
        warmup_fraction: Fraction,
        freeze_fraction: Annotated[Fraction, SharesOne("warmup_fraction")],
        estimator: Literal["relaxed", "straight_through"],
        num_iters: PositiveInt,
        noise: NonNegativeFloat,
        start_scale: PositiveFloat,
        jitter: NonNegativeFloat,
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
            start="order",
            start_scale=start_scale,
            jitter=jitter,
            cost="table",
            width=1,
        )
        self.num_search_swaps, self.ridge, self.num_images = num_search_swaps, ridge, num_images
        self.register_buffer("found", site.order.clone())

    def prepare(self, training: TrainingItems) -> None:
        items, labels = training.draw(self.num_images)
        order = ridge_search(
            items,
            labels,
            self.start_order,
            num_groups=self.site.num_groups,
            num_swaps=self.num_search_swaps,
            ridge=self.ridge,
            seed=training.seed,
        )
        with torch.no_grad():
            # What a slot's scores say of the item that it starts with they now say of the item found for it.
            blocks, starts = self.split_order(order), self.split_order(self.found)
            columns = torch.empty_like(blocks).scatter_(-1, blocks, starts)
            self.table.copy_(self.table.gather(-1, columns.unsqueeze(-2).expand_as(self.table)))
            self.found.copy_(order)

    @property
    def base_order(self) -> Int64[Tensor, " n"]:
        return self.found
