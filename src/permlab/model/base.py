"""What every backbone has in common: embed into items, read items in a given order."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from permlab.data.spec import DataSpec


class Backbone(nn.Module):
    """A network cut in two at the place where its items can be permuted.

    `embed` turns a batch of samples into items; the order is applied in between; `read` turns
    the items, now in slots, into logits. A backbone knows nothing of methods. `read` is
    `head(encode(items))`, `encode` ending in the features that distillation may match: pooled to one
    vector for images, one per slot for text.

    Parameters that weight decay would only pull towards an arbitrary zero are marked by `free_of_decay`.

    What other libraries ask of a backbone it may tell: the features of every token (`tokens`, of which
    `encode` is the `pool`), the modules that each give tokens (`stages`), where its position table is.

    Attributes:
        stem: name of the module that reads the pixels; a literal.
        reads: kinds of data it reads, such as `image` and `text`; a literal tuple.
        blocks_of: family of the blocks it is built of, a file of `permlab.sparsity.family`; a literal, None for
            blocks of its own.
        num_items: number of items per sample.
        num_features: length of an item's feature vector.
        height, width: rows and columns of the grid of items; for a sequence 1 and its length.
        position: `item` or `slot`, to which the position table is added, where there is one.
        moves_positions: whether `position` may be changed between the two at any time, the table being the same; a
            literal.
    """

    reads: ClassVar[tuple[str, ...]] = ("image",)
    stem: ClassVar[str] = ""
    blocks_of: ClassVar[str | None] = None
    moves_positions: ClassVar[bool] = True
    head: nn.Module
    num_items: int
    num_features: int
    height: int
    width: int
    position: str

    @property
    def order_matters(self) -> bool:
        """Whether logits depend on the order in which the same items are read, under this model's options.

        True unless a model says otherwise. One for which it is false has the same logits under every
        order, so that nothing can be learned of it by way of its loss.
        """
        return True

    @property
    def reversal_matters(self) -> bool:
        """Whether logits change when the items are read from the last one to the first.

        They do where the order matters, unless a model says otherwise. One for which this is false learns an order
        up to its direction.
        """
        return self.order_matters

    @property
    def idle_parameters(self) -> tuple[str, ...]:
        """Names of the parameters on which no logit depends under this model's options.

        None unless a model says otherwise. They stay where a published checkpoint has them.
        """
        return ()

    def set_grid(self, spec: DataSpec, patch_size: int) -> None:
        """Take the number of items from the data's shape.

        Raises:
            ValueError: if the patch size does not divide the image.
        """
        self.height, self.width = spec.grid(patch_size)
        self.num_items = self.height * self.width

    def embed(self, inputs: Tensor) -> Float[Tensor, "b n d"]:
        raise NotImplementedError(f"{type(self).__name__} defines no embed")

    def encode(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b *slots f"]:
        raise NotImplementedError(f"{type(self).__name__} defines no encode")

    def read(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b *slots k"]:
        return self.head(self.encode(items))

    def tokens(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b *tokens f"]:
        """Features of the items in their slots and of what a model adds to them, before they are pooled.

        Those that `encode` gives where a model pools as it reads.
        """
        return self.encode(items)

    def pool(self, tokens: Float[Tensor, "b *tokens f"]) -> Float[Tensor, "b *slots f"]:
        """What `encode` makes of tokens."""
        return tokens

    def items_of(self, tokens: Float[Tensor, "b *tokens f"]) -> Float[Tensor, "b *slots f"]:
        """Tokens without those that a model adds to the items, such as a class token."""
        return tokens

    @property
    def stages(self) -> Sequence[nn.Module]:
        """Modules one after the other, each of which gives tokens."""
        return ()

    @property
    def item_positions(self) -> tuple[str, int, int] | None:
        """Name of the learned position table, and how many rows in front and behind are not an item's."""
        return None

    def adapt(self, state: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """A state dict of this model for another grid as this one has it: the position table interpolated.

        Args:
            state: tensors by name.
            grid: rows and columns that it was made for; None where they are as many as here, or form a square.
        Raises:
            ValueError: if the rows of the table are not as many as the grid has places.
        """
        adapted = dict(state)
        if self.item_positions is not None and self.item_positions[0] in state:
            name, front, behind = self.item_positions
            table = state[name]
            end = table.shape[-2] - behind
            rows = [table[..., :front, :], table[..., front:end, :], table[..., end:, :]]
            rows[1] = resample(rows[1], grid, (self.height, self.width))
            adapted[name] = torch.cat(rows, dim=-2)
        return adapted

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits with the items in their own (raster) order."""
        return self.read(self.embed(inputs))


def free_of_decay(parameter: nn.Parameter) -> nn.Parameter:
    """The same parameter, marked for the optimiser to leave out of weight decay whatever its shape."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def resample(
    table: Float[Tensor, "*b n d"], source: tuple[int, int] | None, target: tuple[int, int]
) -> Float[Tensor, "*b m d"]:
    """Interpolate a position table to another grid, bicubically and without aliasing.

    Shapes:
        n, m: places of the two grids, in raster order.
    Args:
        source: rows and columns of the table's grid; None: of the target's, if they are as many, or of a square.
        target: rows and columns wanted.
    Raises:
        ValueError: if the source grid has not n places, or is not given and n is no square.
    Example:
        >>> resample(torch.ones(1, 4, 3), None, (3, 5)).shape
        torch.Size([1, 15, 3])
    """
    count = table.shape[-2]
    if source is None:
        side = math.isqrt(count)
        source = target if count == target[0] * target[1] else (side, side)
    if source[0] * source[1] != count:
        raise ValueError(f"a position table of {count} rows has no {source[0]}x{source[1]} grid to be fitted from")
    if source == target:
        return table
    images = table.mT.reshape(-1, table.shape[-1], *source).float()
    resized = functional.interpolate(images, size=target, mode="bicubic", antialias=True)
    return resized.flatten(2).mT.reshape(*table.shape[:-2], -1, table.shape[-1]).to(table.dtype)


def patchify(images: Float[Tensor, "b c h w"], patch_size: int) -> Float[Tensor, "b n d"]:
    """Cut images into square patches in raster order, each flattened channel-first.

    Shapes:
        n: (h / patch_size) * (w / patch_size).  d: c * patch_size^2.
    Example:
        >>> patchify(torch.arange(4.0).reshape(1, 1, 2, 2), 1).flatten()
        tensor([0., 1., 2., 3.])
    """
    blocks = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return blocks.movedim(1, 3).flatten(3).flatten(1, 2)
