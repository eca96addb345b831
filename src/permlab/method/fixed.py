"""The starting order, kept: the control that every learned order is compared with."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from permlab.method.base import Method
from permlab.permutation import PermutationSample, Site


class Fixed(Method):
    """Reads items in the site's starting order, in every phase; has no parameters.

    Args:
        site: where the permutation acts; its order is the one that is kept.
    Cost: nothing beyond the gather.
    Example:
        >>> Fixed(Site(name="patches", order=torch.tensor([2, 0, 1])))().order
        tensor([2, 0, 1])
    """

    permutes: ClassVar[tuple[str, ...]] = ("items", "weights", "nothing")

    def __init__(self, site: Site) -> None:
        super().__init__(site)

    def sample(self, items: Tensor | None, generator: torch.Generator | None) -> PermutationSample:
        return PermutationSample(order=self.best(items), soft=None, log_prob=None, estimator="none")

    def best(self, items: Float[Tensor, "*b n d"] | None = None) -> Int64[Tensor, "*c n"]:
        return self.start_order
