"""Input channels of linear layers that are permuted together, and what moves along for their order to cost nothing."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from permlab.permutation import check_order


@dataclass(frozen=True)
class Reader:
    """Rows of a linear layer whose input axis a site permutes.

    Args:
        module: dotted path of the `nn.Linear` in the model.
        rows: half-open range of its weight's rows; None for all.
    """

    module: str
    rows: tuple[int, int] | None


@dataclass(frozen=True)
class Move:
    """A stretch of a parameter that moves with the items when an order is folded into the model.

    Args:
        tensor: dotted name of the parameter.
        axis: along which the items lie.
        start: first index of the stretch; its length is the site's `num_items`.
    """

    tensor: str
    axis: int
    start: int = 0


@dataclass(frozen=True)
class WeightSite:
    """Input channels that are permuted together, and how the permutation is carried out.

    A site with `moves` has its order folded into the weights, and the model computes what it did. A site
    without has its channels gathered in front of each reader at run time.

    In grouped-query attention several query heads read the values of one key-value head. An item is then a
    channel of a key-value head, and stands for `repeats` columns of the readers. Groups of m consecutive
    items are groups of m consecutive columns only where m divides `num_items / num_heads`.

    Args:
        name: path of the block and kind, as in `blocks.0.mlp.fc2`.
        kind: name of the site within its block, as in `mlp.fc2`; the same in all blocks.
        readers: layers that read the channels.
        num_items: what the order permutes: the readers' input width over `repeats`.
        moves: parameters that move along; empty if the order cannot be folded.
        num_heads: equal consecutive blocks that no item may leave if the order is to fold.
        repeats: query heads of each key-value head.
        optional: a narrow layer that is pruned only where its width allows.
    """

    name: str
    kind: str
    readers: tuple[Reader, ...]
    num_items: int
    moves: tuple[Move, ...]
    num_heads: int = 1
    repeats: int = 1
    optional: bool = False

    def to_items(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "r k"]:
        """Bring the columns of a reader's weight, or of its scores, into the layout of items.

        Returns:
            All rows with the columns of every first query head, then all rows with those of every second, and so on.
        Raises:
            ValueError: if the weight's width is not that of the readers.
        """
        self._check_width(weight.shape[1], self.num_items * self.repeats)
        heads = weight.unflatten(1, (self.num_heads, self.repeats, -1))
        return heads.permute(2, 0, 1, 3).flatten(2).flatten(0, 1)

    def from_items(self, weight: Float[Tensor, "r k"]) -> Float[Tensor, "o i"]:
        """Undo `to_items`."""
        self._check_width(weight.shape[1], self.num_items)
        heads = weight.unflatten(1, (self.num_heads, -1)).unflatten(0, (self.repeats, -1))
        return heads.permute(1, 2, 0, 3).flatten(1)

    def column_order(self, order: Int64[Tensor, " k"]) -> Int64[Tensor, " i"]:
        """Order of the readers' input columns that an order of the items amounts to.

        Raises:
            ValueError: if the order is no permutation of this site's items.
        Example:
            >>> site = WeightSite("o", "o", (), num_items=4, moves=(), num_heads=2, repeats=2)
            >>> site.column_order(torch.tensor([1, 0, 2, 3]))
            tensor([1, 0, 3, 2, 4, 5, 6, 7])
        """
        check_order(order)
        if order.shape != (self.num_items,):
            raise ValueError(f"site {self.name} has {self.num_items} items, got an order of shape {tuple(order.shape)}")
        width = self.num_items // self.num_heads
        head, channel = (order.view(self.num_heads, 1, width) // width, order.view(self.num_heads, 1, width) % width)
        repeat = torch.arange(self.repeats, device=order.device).view(1, -1, 1)
        return ((head * self.repeats + repeat) * width + channel).flatten()

    def _check_width(self, width: int, expected: int) -> None:
        if width != expected:
            raise ValueError(f"site {self.name} has {expected} columns, got {width}")
