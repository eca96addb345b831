"""What a search for a channel order is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SearchInputs:
    """Weights, statistics and scores of the linear layers that share one input, and the pattern to prune them to.

    The mask of a layer keeps, in every row, the n highest scores of every m consecutive channels.

    Shapes:
        r: rows of a layer, which differ.  k: input channels, the items.
    Args:
        weights: one matrix for each layer.
        hessians: one for each layer, `X^T X` summed over the calibration inputs X `[tokens, k]`.
        scores: importance of every weight, not negative, for each layer.
        n, m: n kept of every m, under the order that is searched.
        num_groups: equal consecutive blocks of channels that no channel may leave.
        seed: of the searches.
        updates_weights: whether what is kept will be updated to make up for what is lost; the loss of a
            mask alone is then no guide to the result.
    """

    weights: Sequence[Float[Tensor, "_ k"]]
    hessians: Sequence[Float[Tensor, "k k"]]
    scores: Sequence[Float[Tensor, "_ k"]]
    n: int
    m: int
    num_groups: int = 1
    seed: int = 0
    updates_weights: bool = False

    def joint_scores(self) -> Float[Tensor, "_ k"]:
        """Scores of all layers, one below the other."""
        return torch.cat(list(self.scores))
