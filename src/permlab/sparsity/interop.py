"""Turn models of ours into those of timm and transformers, which compute the same."""

from typing import Any

import torch
from torch import nn

from permlab.sparsity.causal_lm import as_causal_lm
from permlab.sparsity.export_folder import copy_state

__all__ = ["as_causal_lm", "as_timm"]


@torch.no_grad()
def as_timm(backbone: nn.Module) -> Any:
    """Turn a `Vit` of ours into timm's `VisionTransformer`, which computes the same logits.

    Args:
        backbone: a `Vit` with `position=item` and `readout=cls`, folded or not.
    Returns:
        A copy, in evaluation mode, without drop path; the orders of gathers are in its state dict.
    Raises:
        ValueError: if it is not such a model.
    """
    from timm.models.vision_transformer import VisionTransformer

    from permlab.model.vit import Vit

    if not isinstance(backbone, Vit) or (backbone.position, backbone.readout) != ("item", "cls"):
        options = f"position={getattr(backbone, 'position', '?')}, readout={getattr(backbone, 'readout', '?')}"
        raise ValueError(
            f"timm's model is a Vit with position=item, readout=cls, got {type(backbone).__name__}, {options}"
        )
    block: Any = backbone.blocks[0]
    patches: Any = backbone.patch_embed
    head: Any = backbone.head
    width = backbone.num_features
    model = VisionTransformer(
        img_size=patches.img_size,
        patch_size=patches.patch_size,
        in_chans=patches.proj.in_channels,
        num_classes=head.out_features,
        embed_dim=width,
        depth=len(backbone.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=(block.mlp.fc1.out_features + 0.5) / width,  # timm rounds the product down
    )
    model.to(head.weight.device, head.weight.dtype)
    copy_state(model, backbone)
    return model.eval()
