"""What makes an export of a ViT a folder of timm's: its `config.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from permlab.sparsity.fold import find_gathers
from permlab.sparsity.layout import CONFIG, Layout

# Any of timm's plain ViTs will do, every size being given; its name says what the sizes are near to.
ARCHITECTURE = "vit_tiny_patch16_224"
_POOLS = {"cls": "token", "mean": "avg"}


def layout(model: nn.Module, tokenizer: object, normalisation: Mapping[str, Any] | None = None) -> Layout | None:
    """Layout of a folded ViT."""
    config = timm_config(model, normalisation)
    if not config:
        return None

    def write(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    return Layout("timm's VisionTransformer, by timm.create_model('local-dir:<folder>', pretrained=True)", write)


def timm_config(model: nn.Module, normalisation: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Contents of the `config.json` by which timm builds a folded ViT and reads its weights.

    The weights are those of `model.safetensors`, which have timm's names. Two ways lead to the model:
    `timm.create_model("local-dir:<folder>", pretrained=True)`, and `timm.create_model(config["architecture"],
    checkpoint_path="<folder>/model.safetensors", **config["model_args"])`.

    Args:
        model: folded.
        normalisation: `mean` and `std` by channel of the images that it reads, on the scale 0..1, for timm's
            transforms; zero and one if absent.
    Returns:
        Nothing where timm has no such model: another backbone, one that reads the last slot or has other activations
        than timm's usual one, or one with gathers, whose weights timm refuses for their orders' names.
    Example:
        >>> from permlab.data.spec import DataSpec
        >>> from permlab.model.vit import Vit
        >>> spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)
        >>> vit = Vit(spec, patch_size=2, width=16, depth=2, num_heads=2, mlp_ratio=2.0, drop_path=0.0,
        ...           position="item", readout="cls", pretrained=False)
        >>> timm_config(vit)["model_args"]["embed_dim"], timm_config(torch.nn.Linear(2, 2))
        (16, {})
    """
    if find_gathers(model) or not _is_vit(model):
        return {}
    vit: Any = model
    patches, block = vit.patch_embed, vit.blocks[0]
    width, classes, channels = vit.num_features, vit.head.out_features, patches.proj.in_channels
    pool = _POOLS[vit.readout]
    args = {
        "img_size": list(patches.img_size),
        "patch_size": list(patches.patch_size),
        "in_chans": channels,
        "embed_dim": width,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": (block.mlp.fc1.out_features + 0.5) / width,  # timm rounds the product down
        "class_token": vit.cls_token is not None,
        "reg_tokens": 0 if vit.reg_token is None else vit.reg_token.shape[1],
        "no_embed_class": vit.pos_embed is not None and vit.pos_embed.shape[1] == vit.num_items,
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1.0,  # the scales are among the weights
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "global_pool": pool,
        "fc_norm": False,
        "pos_embed": "none" if vit.pos_embed is None else "learn",
    }
    scale = {"mean": [0.0] * channels, "std": [1.0] * channels} | dict(normalisation or {})
    return {
        "architecture": ARCHITECTURE,
        "num_classes": classes,
        "num_features": width,
        "global_pool": pool,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [channels, *patches.img_size],
            "fixed_input_size": True,
            "num_classes": classes,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(scale["mean"]),
            "std": list(scale["std"]),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _is_vit(model: nn.Module) -> bool:
    from permlab.model.vit import Vit  # seconds to import

    # Items are read in raster order here, so that a table added by slot is one added by item.
    return isinstance(model, Vit) and model.readout in _POOLS and type(model.blocks[0].mlp.act) is nn.GELU
