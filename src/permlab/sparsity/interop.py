"""Turn models of ours into those of timm and transformers, which compute the same."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from permlab.sparsity.export_folder import CONFIG, MODEL, file_of, load_export, load_state
from permlab.sparsity.fold import find_gathers, install_gather


@torch.no_grad()
def as_causal_lm(source: str | Path | nn.Module) -> Any:
    """Turn a text model of ours into transformers' `LlamaForCausalLM`, which computes the same logits.

    A model whose sites are all folded is like any other: `save_pretrained` and `from_pretrained` keep it whole.
    A model with gathers works in memory, but `from_pretrained` would build it without them, its columns then in
    the wrong order: this function reads it back from its export.

    Args:
        source: a `Llama` backbone on text with `position=slot`, or the folder of its export, whose
            `config.json` has the backbone's options, under `model` if it is the configuration of a run.
    Returns:
        A copy, in evaluation mode.
    Raises:
        ValueError: if it is no `Llama` on text with `position=slot`, or the folder is no export of one.
    Example:
        >>> from permlab.data.spec import DataSpec
        >>> from permlab.model.llama import Llama
        >>> spec = DataSpec(kind="text", num_classes=10, channels=1, height=1, width=8)
        >>> backbone = Llama(spec, patch_size=1, width=8, depth=1, num_heads=2, num_kv_heads=1, mlp_width=16,
        ...                  norm_eps=1e-5, rope_theta=1e4, rope_factor=1.0, position="slot", readout="last",
        ...                  tie_embeddings=True)
        >>> tokens = torch.arange(4).unsqueeze(0)
        >>> torch.allclose(as_causal_lm(backbone)(tokens).logits, backbone(tokens), atol=1e-6)
        True
    """
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from permlab.model.llama import Llama

    backbone = source if isinstance(source, nn.Module) else _load_llama(Path(source))
    if not isinstance(backbone, Llama) or backbone.kind != "text" or backbone.position != "slot":
        kind = f"{type(backbone).__name__} of {getattr(backbone, 'kind', '?')}"
        position = getattr(backbone, "position", "?")
        raise ValueError(f"LlamaForCausalLM is a Llama of text with position=slot, got a {kind} with {position}")
    head = backbone.head.weight
    assert isinstance(head, Tensor)
    config = copy.deepcopy(backbone.network.config)
    config.vocab_size = len(head)
    config.tie_word_embeddings = head is backbone.embedding.weight
    config.use_cache = True
    model: Any = LlamaForCausalLM(config)
    model.to(head.dtype)
    # A cast to bfloat16 has rounded the angles of late slots away.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.to(head.device)
    names = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    _copy_into(model, backbone, lambda name: names.get(name, name.replace("network.", "model.", 1)))
    return model.eval()


def _load_llama(folder: Path) -> nn.Module:
    """Our backbone from its export."""
    from permlab.config.build import build
    from permlab.data.spec import DataSpec

    config = json.loads(file_of(folder, CONFIG).read_text(encoding="utf-8"))
    options = config.get("model", config)
    if options.get("component", "llama") != "llama":
        raise ValueError(f"{folder} holds a {options['component']}, not a llama")
    with safe_open(file_of(folder, MODEL), framework="pt") as file:
        vocabulary = file.get_slice("embedding.weight").get_shape()[0]
    # The length matters only for learned positions, which transformers' model has not.
    spec = DataSpec(kind="text", num_classes=vocabulary, channels=1, height=1, width=1)
    backbone = build("model", {**options, "component": "llama", "patch_size": 1, "pretrained": None}, spec)
    return load_export(folder, backbone)


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
    _copy_into(model, backbone, lambda name: name)
    return model.eval()


def _copy_into(model: nn.Module, backbone: nn.Module, rename: Callable[[str], str]) -> None:
    """State and gathers of a backbone, into the same network under other names."""
    for name, module in find_gathers(backbone).items():
        splits = module.splits if module.input_order.ndim == 2 else None
        install_gather(model, rename(name), module.input_order, splits=splits)
    load_state(model, {rename(name): value for name, value in backbone.state_dict().items()}, "the backbone")
