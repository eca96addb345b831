"""Vision Transformer, from timm."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import timm
import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from permlab.data.spec import DataSpec
from permlab.model.base import Backbone, free_of_decay
from permlab.option import Divides, Dropout, PositiveFloat, PositiveInt, Side

# (width, depth, num_heads) of the sizes that timm has ImageNet weights for, all with an MLP ratio of 4.
_PRETRAINED = {
    (192, 12, 3): "vit_tiny_patch16_224",
    (384, 12, 6): "vit_small_patch16_224",
    (768, 12, 12): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
}


class Vit(Backbone):
    """Pre-norm transformer encoder over patches, each attending to all.

    Attention and the layers between know no order. So with a position table that travels with the
    item, or with none, the logits do not depend on the order when the class token or the mean is read;
    they do with `position=slot`, and with `readout=last`, through whichever item comes last.

    Shapes:
        b: images.  n: patches.  d: width.
    Args:
        spec: shape of the images.
        patch_size: side of a patch in pixels.
        width: length of a token's feature vector, a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the MLP in a block, in multiples of `width`.
        drop_path: probability of leaving out the last block's branches in training; linear from 0 at the first.
        position: where the learned position table is added: to the item, to the slot, or nowhere.
        readout: features of the class token, mean over the patches, or features of the last slot.
        pretrained: start from timm's ImageNet weights, resampled to the patch size, the grid and the
            channels of the data; the head is kept only if the number of classes is the same. They were
            trained on images scaled to [-1, 1]. Downloads on first use.
    Raises:
        ValueError: if the patch size does not divide the image, the heads do not divide the width, or
            pretrained weights are wanted in a size that has none, or cannot be had.
    Source: Dosovitskiy et al. 2021, arXiv:2010.11929, through timm's `VisionTransformer`.
    Differs from source: the position table may be added by slot or left out; there is a class token only
        where it is read, and the final norm comes before the pooling in every read-out.
    Cost: O(b depth n d (n + d)) time.
    Example:
        >>> spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)
        >>> vit = Vit(spec, patch_size=2, width=16, depth=2, num_heads=2, mlp_ratio=2.0, drop_path=0.0,
        ...           position="item", readout="cls", pretrained=False)
        >>> vit(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    stem = "patch_embed.proj"
    blocks_of = "vit"

    def __init__(
        self,
        spec: DataSpec,
        *,
        patch_size: Side,
        width: PositiveInt,
        depth: PositiveInt,
        num_heads: Annotated[PositiveInt, Divides("width")],
        mlp_ratio: PositiveFloat,
        drop_path: Dropout,
        position: Literal["item", "slot", "none"],
        readout: Literal["cls", "mean", "last"],
        pretrained: bool,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide width={width}")
        self.set_grid(spec, patch_size)
        self.num_features = width
        self.position, self.readout = position, readout
        shape: dict[str, Any] = {
            "img_size": (spec.height, spec.width),
            "patch_size": patch_size,
            "in_chans": spec.channels,
            "num_classes": spec.num_classes,
            "drop_path_rate": drop_path,
        }
        if pretrained:
            name = _pretrained_name(width, depth, num_heads, mlp_ratio)
            network: Any = _load_pretrained(name, shape)
        else:
            network = VisionTransformer(embed_dim=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, **shape)
        self._take(network)

    @property
    def order_matters(self) -> bool:
        """Through a table added by slot, or through whichever item is read last; attention knows no order."""
        return self.position == "slot" or self.readout == "last"

    def _take(self, network: Any) -> None:
        """Keep the parts of timm's network that are used, under timm's names."""
        self.patch_embed, self.blocks, self.norm = network.patch_embed, network.blocks, network.norm
        self.head = network.head
        self.cls_token = self.pos_embed = None
        if self.readout == "cls":
            self.cls_token = free_of_decay(network.cls_token)
        if self.position != "none":
            # timm's table has an entry for the class token in front.
            table = network.pos_embed if self.readout == "cls" else network.pos_embed[:, 1:]
            self.pos_embed = free_of_decay(nn.Parameter(table.detach().clone()))

    def embed(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        items = self.patch_embed(inputs)
        return self._add_positions(items) if self.position == "item" else items

    def encode(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        return self.pool(self.tokens(items))

    def tokens(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b t d"]:
        tokens = self._add_positions(items) if self.position == "slot" else items
        if self.cls_token is not None:
            tokens = torch.cat([self._class_token().expand(len(tokens), -1, -1), tokens], dim=1)
        return self.norm(self.blocks(tokens))

    def pool(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b d"]:
        if self.readout == "mean":
            return tokens.mean(1)
        return tokens[:, 0 if self.readout == "cls" else -1]

    def items_of(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
        return tokens if self.cls_token is None else tokens[:, 1:]

    @property
    def stages(self) -> Sequence[nn.Module]:
        return tuple(self.blocks)

    @property
    def item_positions(self) -> tuple[str, int, int] | None:
        return None if self.pos_embed is None else ("pos_embed", int(self.cls_token is not None), 0)

    def _add_positions(self, items: Tensor) -> Tensor:
        assert self.pos_embed is not None
        return items + self.pos_embed[:, -self.num_items :]

    def _class_token(self) -> Tensor:
        assert self.cls_token is not None
        return self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]


def _load_pretrained(name: str, shape: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, pretrained=True, **shape)
    except Exception as error:  # the hub's errors are many; all mean that there are no weights
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"pretrained=true: no weights of {name} ({type(error).__name__}: {reason})") from error


def _pretrained_name(width: int, depth: int, num_heads: int, mlp_ratio: float) -> str:
    name = _PRETRAINED.get((width, depth, num_heads))
    if name is None or mlp_ratio != 4:
        sizes = "; ".join(f"{size[0]}, {size[1]}, {size[2]}" for size in _PRETRAINED)
        raise ValueError(
            f"no pretrained weights for width, depth, num_heads = {width}, {depth}, {num_heads} "
            f"and mlp_ratio {mlp_ratio:g}; sizes which have: {sizes}, with mlp_ratio 4"
        )
    return name
