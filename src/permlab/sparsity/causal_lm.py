"""Turn text models of ours, and exports of them, into the language models of transformers, which compute the same."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from permlab.sparsity.export_folder import OWN_CONFIG, copy_state, file_of, load_export
from permlab.sparsity.layout import CONFIG, WEIGHTS

# Longest text in exports of earlier versions, which do not say it.
_MAX_SLOTS = 131072


@torch.no_grad()
def as_causal_lm(source: str | Path | nn.Module) -> Any:
    """Turn a text model of ours into the language model of transformers that computes the same logits.

    It is a `LlamaForCausalLM` or `Qwen2ForCausalLM`. One whose sites are all folded is like any other. One with
    gathers works in memory only, and refuses `save_pretrained`, as `from_pretrained` would build it without
    them: its export is what keeps it, and is read by this function.

    Args:
        source: a `Llama` with `position=slot` or a `QwenVl`, on text; or the folder of its export.
    Returns:
        A copy, in evaluation mode.
    Raises:
        ValueError: if it is no such model, or the folder is no export of one.
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
    if isinstance(source, nn.Module):
        return _convert(source)
    folder = Path(source)
    settings = json.loads(file_of(folder, CONFIG).read_text(encoding="utf-8"))
    if "architectures" in settings:
        return load_export(folder, _build(settings, folder)).eval()
    if (folder / OWN_CONFIG).is_file():
        raise ValueError(f"{folder} holds no language model but a {settings['model_type']}")
    return _convert(_load_earlier(folder, settings))


def _convert(backbone: nn.Module) -> Any:
    described: Any = getattr(backbone, "causal_lm", None)
    if described is None:
        kind = getattr(backbone, "kind", "images")
        raise ValueError(f"a language model is a Llama or QwenVl of text, got a {type(backbone).__name__} of {kind}")
    from transformers import AutoModelForCausalLM

    config, rename = described()
    model: Any = AutoModelForCausalLM.from_config(config)
    copy_state(model.to(next(backbone.parameters()).device), backbone, rename)
    return model.eval()


def _build(settings: dict[str, Any], folder: Path) -> Any:
    """A model of the architecture that an export names, whose `model_type` may be a note instead."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = settings["architectures"][0]
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(f"{folder} holds a {name}, which is no language model alone; load_export reads it into one")
    own = {key: value for key, value in settings.items() if key != "model_type"}
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name).config_class.from_dict(own))


def _load_earlier(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Our backbone from an export of an earlier version, whose `config.json` has its options."""
    from permlab.config.build import build
    from permlab.data.spec import DataSpec

    options = config.get("model", config)
    if options.get("component", "llama") != "llama":
        raise ValueError(f"{folder} holds a {options['component']}, not a llama")
    with safe_open(file_of(folder, WEIGHTS), framework="pt") as file:
        vocabulary = file.get_slice("embedding.weight").get_shape()[0]
    spec = DataSpec(kind="text", num_classes=vocabulary, channels=1, height=1, width=_MAX_SLOTS)
    backbone = build("model", {**options, "component": "llama", "patch_size": 1, "pretrained": None}, spec)
    return load_export(folder, backbone)
