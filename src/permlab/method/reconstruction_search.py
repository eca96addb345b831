"""Swaps of channels accepted where they lower the layers' reconstruction error."""

from typing import ClassVar

from jaxtyping import Int64
from torch import Tensor

from permlab.method.fixed import Fixed
from permlab.option import PositiveInt
from permlab.permutation import Site
from permlab.sparsity.search import reconstruction_search
from permlab.sparsity.search_inputs import SearchInputs


class ReconstructionSearch(Fixed):
    """Keeps the order that `permlab.sparsity.search.reconstruction_search` finds from `deal_and_match`'s.

    Args:
        site: where the permutation acts.
        num_swaps: proposals for each site.
    """

    permutes: ClassVar[tuple[str, ...]] = ("weights",)
    tuned_as: ClassVar[str] = "search"

    def __init__(self, site: Site, *, num_swaps: PositiveInt) -> None:
        super().__init__(site)
        self.num_swaps = num_swaps

    def search(self, inputs: SearchInputs) -> Int64[Tensor, " n"]:
        return search_reconstruction(inputs, num_swaps=self.num_swaps)


def search_reconstruction(inputs: SearchInputs, *, num_swaps: int) -> Int64[Tensor, " n"]:
    """Run `reconstruction_search` on what a method is given; the layers' error is at most that of the start."""
    return reconstruction_search(
        list(inputs.weights),
        list(inputs.hessians),
        list(inputs.scores),
        n=inputs.n,
        m=inputs.m,
        num_groups=inputs.num_groups,
        num_swaps=num_swaps,
        seed=inputs.seed,
    )
