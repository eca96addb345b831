"""What every backbone has in common: embed into items, read items in a given order."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from permlab.data.spec import DataSpec


class Backbone(nn.Module):
    """A network cut in two at the place where its items can be permuted.

    `embed` turns a batch of samples into items; the order is applied in between; `read` turns
    the items, now in slots, into logits. A backbone knows nothing of methods. `read` is
    `head(encode(items))`, `encode` ending in the features that distillation may match: pooled to one
    vector for images, one per slot for text.

    Parameters that weight decay would only pull towards an arbitrary zero are marked by `free_of_decay`.

    Attributes:
        reads: kinds of data it reads, such as `image` and `text`; a literal tuple.
        blocks_of: family of the blocks it is built of, a file of `permlab.sparsity.family`; a literal, None for
            blocks of its own.
        num_items: number of items per sample.
        num_features: length of an item's feature vector.
        height, width: rows and columns of the grid of items; for a sequence 1 and its length.
    """

    reads: ClassVar[tuple[str, ...]] = ("image",)
    blocks_of: ClassVar[str | None] = None
    head: nn.Module
    num_items: int
    num_features: int
    height: int
    width: int

    @property
    def order_matters(self) -> bool:
        """Whether logits depend on the order in which the same items are read, under this model's options.

        True unless a model says otherwise. One for which it is false has the same logits under every
        order, so that nothing can be learned of it by way of its loss.
        """
        return True

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

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits with the items in their own (raster) order."""
        return self.read(self.embed(inputs))


def free_of_decay(parameter: nn.Parameter) -> nn.Parameter:
    """The same parameter, marked for the optimiser to leave out of weight decay whatever its shape."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


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
