"""Swaps of channels accepted where they lower the layers' reconstruction error."""

from typing import ClassVar

from jaxtyping import Int64
from torch import Tensor

from permlab.method.fixed import Fixed
from permlab.option import PositiveInt
from permlab.permutation import Site
from permlab.sparsity.problem import ChannelProblem
from permlab.sparsity.search import reconstruction_search


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

    def search(self, problem: ChannelProblem) -> Int64[Tensor, " n"]:
        return search_reconstruction(problem, num_swaps=self.num_swaps)


def search_reconstruction(problem: ChannelProblem, *, num_swaps: int) -> Int64[Tensor, " n"]:
    """`reconstruction_search` on a problem; at least as good as its start on the layers' error."""
    return reconstruction_search(
        list(problem.weights),
        list(problem.hessians),
        list(problem.scores),
        n=problem.n,
        m=problem.m,
        num_groups=problem.num_groups,
        num_swaps=num_swaps,
        seed=problem.seed,
    )
