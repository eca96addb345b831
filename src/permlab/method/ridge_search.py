"""Swaps of items accepted where they lower the closed-form loss of a fading linear memory."""

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from permlab.method.fixed import Fixed
from permlab.method.training_items import TrainingItems
from permlab.ops.ridge_search import ridge_search
from permlab.option import PositiveFloat, PositiveInt, Range
from permlab.permutation import Site


class RidgeSearch(Fixed):
    """Keeps the order that `permlab.ops.ridge_search.ridge_search` finds on training images before training.

    The search knows no model: it takes the read-out of the data by a linear memory with fixed decays for what
    the model will make of an order. Validation and test images have no part in it.

    Args:
        site: where the permutation acts.
        num_swaps: pairs of items to try.
        ridge: penalty of the regression, in units of the items' mean variance. Weaker than what training can
            make use of, it finds orders that only an exact solution can read.
        num_memories: decays of the memory.
        longest_memory: slots after which its slowest state has faded to 1/e; the fastest takes one slot.
        readout: of the memory, after the last slot or the mean over all.
        num_folds: parts of the images that are predicted in turn, each from the others.
        num_components: principal components that stand for an item's features, at most.
        num_images: training images to look at, at most.
        budget_s: seconds after which no further pair is tried; null for no limit.
    Raises:
        ValueError: as `ridge_search`, where there are too few training images.
    Source: this repository.
    """

    permutes: ClassVar[tuple[str, ...]] = ("items",)

    found: Tensor

    def __init__(
        self,
        site: Site,
        *,
        num_swaps: PositiveInt,
        ridge: PositiveFloat,
        num_memories: PositiveInt,
        longest_memory: Annotated[PositiveFloat, Range(ge=1)],
        readout: Literal["last", "mean"],
        num_folds: Annotated[PositiveInt, Range(ge=2)],
        num_components: PositiveInt,
        num_images: Annotated[PositiveInt, Range(ge=2)],
        budget_s: PositiveFloat | None,
    ) -> None:
        super().__init__(site)
        self.num_swaps, self.budget_s, self.num_images = num_swaps, budget_s, num_images
        self.ridge, self.num_folds, self.num_components = ridge, num_folds, num_components
        self.num_memories, self.longest_memory = num_memories, longest_memory
        self.readout: Literal["last", "mean"] = readout
        self.register_buffer("found", site.order.clone())

    def prepare(self, training: TrainingItems) -> None:
        items, labels = training.draw(self.num_images)
        order = ridge_search(
            items,
            labels,
            self.start_order,
            num_groups=self.site.num_groups,
            num_swaps=self.num_swaps,
            num_memories=self.num_memories,
            longest_memory=self.longest_memory,
            readout=self.readout,
            ridge=self.ridge,
            num_folds=self.num_folds,
            num_components=self.num_components,
            seed=training.seed,
            budget_s=self.budget_s,
        )
        with torch.no_grad():
            self.found.copy_(order)

    @property
    def base_order(self) -> Int64[Tensor, " n"]:
        return self.found

    def best(self, items: Float[Tensor, "*b n d"] | None = None) -> Int64[Tensor, "*c n"]:
        return self.found
