"""RIA's channel permutation: deal the channels into groups by their sums, then match slot by slot."""

from typing import ClassVar

from jaxtyping import Int64
from torch import Tensor

from permlab.method.fixed import Fixed
from permlab.option import PositiveInt
from permlab.permutation import Site
from permlab.sparsity.search import deal_and_match
from permlab.sparsity.search_inputs import SearchInputs


class DealAndMatch(Fixed):
    """Keeps the order that `permlab.sparsity.search.deal_and_match` finds on the joint scores of a site's layers.

    Args:
        site: where the permutation acts.
        num_sweeps: passes over the m slots of a group; the paper makes one.
    """

    permutes: ClassVar[tuple[str, ...]] = ("weights",)
    tuned_as: ClassVar[str] = "search"

    def __init__(self, site: Site, *, num_sweeps: PositiveInt) -> None:
        super().__init__(site)
        self.num_sweeps = num_sweeps

    def search(self, inputs: SearchInputs) -> Int64[Tensor, " n"]:
        return deal_and_match(
            inputs.joint_scores(),
            n=inputs.n,
            m=inputs.m,
            num_groups=inputs.num_groups,
            num_sweeps=self.num_sweeps,
        )
