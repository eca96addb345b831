"""Exchange of channels between all blocks at once, with noise to leave local optima."""

from typing import ClassVar

from jaxtyping import Int64
from torch import Tensor

from permlab.method.fixed import Fixed
from permlab.option import PositiveFloat
from permlab.permutation import Site
from permlab.sparsity.search import swap_search
from permlab.sparsity.search_inputs import SearchInputs


class SwapSearch(Fixed):
    """Keeps the order that `permlab.sparsity.search.swap_search` finds on the joint scores of a site's layers.

    Args:
        site: where the permutation acts.
        budget_s: seconds for each site; null for a fixed number of noisy rounds.
    """

    permutes: ClassVar[tuple[str, ...]] = ("weights",)
    tuned_as: ClassVar[str] = "search"

    def __init__(self, site: Site, *, budget_s: PositiveFloat | None) -> None:
        super().__init__(site)
        self.budget_s = budget_s

    def search(self, inputs: SearchInputs) -> Int64[Tensor, " n"]:
        return swap_search(
            inputs.joint_scores(),
            n=inputs.n,
            m=inputs.m,
            num_groups=inputs.num_groups,
            seed=inputs.seed,
            budget_s=self.budget_s,
        )
