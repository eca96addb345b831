"""Swaps by the model's own gradient, many at every step of a descent, from a layer-wise start."""

from typing import Annotated, ClassVar

from jaxtyping import Int64
from torch import Tensor

from permlab.method.fixed import Fixed
from permlab.method.reconstruction_search import search_reconstruction
from permlab.option import NonNegativeInt, PositiveFloat, PositiveInt, Range
from permlab.permutation import Site
from permlab.sparsity.search_inputs import SearchInputs


class SwapDescent(Fixed):
    """The start and the polish of `LossSearch`, and between them swaps that are made without being tried.

    Where a step of polishing looks at all calibration samples and keeps a set of swaps only if the loss has
    fallen, a step of the descent looks at one batch of them and makes many swaps at once, by a running
    mean of the gradient; see `permlab.sparsity.descent`. The task keeps what the descent ends with if
    it is better than the start.

    Args:
        site: where the permutation acts.
        num_search_swaps: proposals of `reconstruction_search` for each site.
        num_descent_steps: steps, each of one batch of calibration samples.
        swap_share: swaps at the first step, as a part of all blocks of m; their number falls to one.
        num_polish_steps: evaluations of the calibration loss afterwards, each of a set of swaps; 0 for none.
    Source: this repository.
    """

    permutes: ClassVar[tuple[str, ...]] = ("weights",)
    tuned_as: ClassVar[str] = "search"

    def __init__(
        self,
        site: Site,
        *,
        num_search_swaps: PositiveInt,
        num_descent_steps: PositiveInt,
        swap_share: Annotated[PositiveFloat, Range(gt=0, le=1)],
        num_polish_steps: NonNegativeInt,
    ) -> None:
        super().__init__(site)
        self.num_search_swaps, self.num_polish_steps = num_search_swaps, num_polish_steps
        self.num_descent_steps, self.swap_share = num_descent_steps, swap_share

    def search(self, inputs: SearchInputs) -> Int64[Tensor, " n"]:
        return search_reconstruction(inputs, num_swaps=self.num_search_swaps)
