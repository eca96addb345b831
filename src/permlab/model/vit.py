"""Vision Transformer, from timm."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import timm
import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from permlab.data.spec import DataSpec
from permlab.model.base import Backbone, free_of_decay
from permlab.model.pretrained import check_equal, tensor_names
from permlab.option import Checkpoint, Divides, Dropout, PositiveFloat, PositiveInt, Side

# (width, depth, num_heads) of the sizes that timm has ImageNet weights for, all with an MLP ratio of 4.
_PRETRAINED = {
    (192, 12, 3): "vit_tiny_patch16_224",
    (384, 12, 6): "vit_small_patch16_224",
    (768, 12, 12): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
}


class Vit(Backbone):
    """Pre-norm transformer encoder over patches, each attending to all.

    A checkpoint may have more than that, and keeps it: scales behind the branches of a block, a class token that is
    no image's, registers beside it.

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
        pretrained: start from weights, resampled to the patch size, the grid and the channels of the data; the
            head is kept only if the number of classes is the same. A folder in timm's format, or the name of a
            model of timm's, such as `vit_small_patch14_dinov2.lvd142m`; or true for those of timm's ImageNet
            weights that are of the given size, which were trained on images scaled to [-1, 1]. Names are
            downloaded on first use. None, false: random weights.
    Raises:
        ValueError: if the patch size does not divide the image, the heads do not divide the width, or
            pretrained weights are wanted in a size that has none, cannot be had, do not fit the other options or
            are of no plain vision transformer; if `readout=cls` and the weights know no class token.
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
    checkpoints = "timm"
    from_checkpoint: ClassVar[dict[str, tuple]] = {
        "patch_size": ("patch_size", 16),
        "width": ("embed_dim", 768),
        "depth": ("depth", 12),
        "num_heads": ("num_heads", 12),
        "mlp_ratio": ("mlp_ratio", 4.0),
    }

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
        pretrained: bool | Checkpoint | None,
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
        size = {"width": width, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        if isinstance(pretrained, str):
            network: Any = _load_checkpoint(pretrained, shape)
            check_equal(pretrained, _sizes(network, size))
        elif pretrained:
            network = _load_pretrained(_pretrained_name(width, depth, num_heads, mlp_ratio), shape)
        else:
            network = VisionTransformer(embed_dim=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, **shape)
        # What a checkpoint has in front of its items stays there, whatever is read.
        whole = isinstance(pretrained, str)
        if readout == "cls" and network.cls_token is None:
            raise ValueError(f"readout=cls: pretrained={pretrained} has no class token; nearest valid choice: mean")
        self._take(network, has_class=network.cls_token is not None and (whole or readout == "cls"))

    @property
    def order_matters(self) -> bool:
        """Through a table added by slot, or through whichever item is read last; attention knows no order."""
        return self.position == "slot" or self.readout == "last"

    def _take(self, network: Any, *, has_class: bool) -> None:
        """Keep the parts of timm's network that are used, under timm's names."""
        self.patch_embed, self.blocks, self.norm = network.patch_embed, network.blocks, network.norm
        self.head = network.head
        self.cls_token = self.reg_token = self.pos_embed = None
        if has_class:
            self.cls_token = free_of_decay(network.cls_token)
            if network.reg_token is not None:
                self.reg_token = free_of_decay(network.reg_token)
        if self.position != "none":
            # timm's table mostly has an entry for the class token in front.
            table = network.pos_embed if has_class else network.pos_embed[:, -self.num_items :]
            self.pos_embed = free_of_decay(nn.Parameter(table.detach().clone()))

    def embed(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        items = self.patch_embed(inputs)
        return self._add_positions(items) if self.position == "item" else items

    def encode(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        return self.pool(self.tokens(items))

    def tokens(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b t d"]:
        tokens = self._add_positions(items) if self.position == "slot" else items
        front = [token.expand(len(tokens), -1, -1) for token in self._front()]
        return self.norm(self.blocks(torch.cat([*front, tokens], dim=1)))

    def pool(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b d"]:
        if self.readout == "mean":
            return self.items_of(tokens).mean(1)
        return tokens[:, 0 if self.readout == "cls" else -1]

    def items_of(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
        return tokens[:, sum(token.shape[1] for token in (self.cls_token, self.reg_token) if token is not None) :]

    @property
    def stages(self) -> Sequence[nn.Module]:
        return tuple(self.blocks)

    @property
    def item_positions(self) -> tuple[str, int, int] | None:
        return None if self.pos_embed is None else ("pos_embed", self.pos_embed.shape[1] - self.num_items, 0)

    def _add_positions(self, items: Tensor) -> Tensor:
        assert self.pos_embed is not None
        return items + self.pos_embed[:, -self.num_items :]

    def _front(self) -> Iterator[Tensor]:
        """What stands before the items: the class token and the registers, at their places in the table if it has any.

        A table has places for all of them or for the items alone.
        """
        front = [token for token in (self.cls_token, self.reg_token) if token is not None]
        start = 0
        for token in front:
            stop = start + token.shape[1]
            has_places = self.pos_embed is not None and self.pos_embed.shape[1] > self.num_items
            yield token + self.pos_embed[:, start:stop] if has_places else token  # type: ignore[index]
            start = stop


def _load_checkpoint(name: str, shape: dict[str, Any]) -> Any:
    """Timm's network for images of another shape, with the weights of a folder or a name.

    Raises:
        ValueError: if there are none, they are not of the network that they come with, or that is none of those
            which `Vit` computes.
    """
    folder = Path(name) if Path(name).is_dir() else None
    try:
        network: Any = timm.create_model(f"local-dir:{folder}" if folder else name, pretrained=True, **shape)
    except Exception as error:  # a broken file, an unknown name, no hub, tensors of another shape
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise ValueError(f"pretrained={name}: cannot be loaded ({type(error).__name__}: {reason})") from error
    unlike = _unlike(network)
    if unlike:
        raise ValueError(f"pretrained={name}: {unlike}, which is no plain vision transformer")
    if folder is not None:
        missing = [key for key in network.state_dict() if not key.startswith("head.")]
        missing = sorted(set(missing) - set(tensor_names(name, folder)))
        if missing:
            raise ValueError(f"pretrained={name}: it has no tensor for {missing[0]}")
    return network


def _unlike(network: Any) -> str | None:
    """What a network has that `Vit` does not compute; None if nothing."""
    if type(network) is not VisionTransformer:
        return f"is a {type(network).__name__}"
    for part in ("norm_pre", "fc_norm", "attn_pool"):
        module = getattr(network, part, None)
        if module is not None and not isinstance(module, nn.Identity):
            return f"has a {part}"
    return "has no position table" if network.pos_embed is None else None


def _sizes(network: Any, ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Sizes of a network and ours, by the names of options."""
    block = network.blocks[0]
    theirs = {"width": network.embed_dim, "depth": len(network.blocks), "num_heads": block.attn.num_heads}
    theirs["mlp_ratio"] = ours["mlp_ratio"]
    if block.mlp.fc2.in_features != int(network.embed_dim * ours["mlp_ratio"]):
        theirs["mlp_ratio"] = block.mlp.fc2.in_features / network.embed_dim
    return {option: (theirs[option], value) for option, value in ours.items()}


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
