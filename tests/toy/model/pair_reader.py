"""A reader of numbers that sees every number beside the one before it."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from permlab.data.spec import DataSpec
from permlab.model.base import Backbone
from permlab.option import PositiveInt


class PairReader(Backbone):
    """Maps each pair of neighbouring slots to a number, the one that should be in the latter slot.

    Args:
        spec: shape of the data.
        width: of the features of a pair.
    """

    reads: ClassVar[tuple[str, ...]] = ("numbers",)

    def __init__(self, spec: DataSpec, *, width: PositiveInt) -> None:
        super().__init__()
        self.set_grid(spec, 1)
        self.num_features = 1
        self.pairs = nn.Linear(2, width)
        self.head = nn.Linear(width, 1)

    def embed(self, inputs: Float[Tensor, "b n"]) -> Float[Tensor, "b n 1"]:
        return inputs.unsqueeze(-1)

    def encode(self, items: Float[Tensor, "b n 1"]) -> Float[Tensor, "b n f"]:
        return torch.relu(self.pairs(torch.cat([items.roll(1, dims=-2), items], dim=-1)))
