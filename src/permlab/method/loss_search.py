"""Search on the model's own loss: a layer-wise start, then swaps that its gradient proposes."""

from typing import ClassVar

from jaxtyping import Int64
from torch import Tensor

from permlab.method.fixed import Fixed
from permlab.method.reconstruction_search import search_reconstruction
from permlab.option import PositiveInt
from permlab.permutation import Site
from permlab.sparsity.search_inputs import SearchInputs


class LossSearch(Fixed):
    """The start and the polish of `Hybrid` without the learning between them; the control of what learning adds.

    Args:
        site: where the permutation acts.
        num_search_swaps: proposals of `reconstruction_search` for each site.
        num_polish_steps: evaluations of the calibration loss, each of a set of swaps over all sites.
    """

    permutes: ClassVar[tuple[str, ...]] = ("weights",)
    tuned_as: ClassVar[str] = "search"

    def __init__(self, site: Site, *, num_search_swaps: PositiveInt, num_polish_steps: PositiveInt) -> None:
        super().__init__(site)
        self.num_search_swaps, self.num_polish_steps = num_search_swaps, num_polish_steps

    def search(self, inputs: SearchInputs) -> Int64[Tensor, " n"]:
        return search_reconstruction(inputs, num_swaps=self.num_search_swaps)
