"""Small models of every family, in double precision, with weights large enough for every part to show."""

import functools
from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from permlab.data.spec import DataSpec
from permlab.model.llama import Llama
from permlab.model.vim import Vim
from permlab.model.vit import Vit

IMAGES = DataSpec(kind="image", num_classes=5, channels=2, height=4, width=4)
TEXT = DataSpec(kind="text", num_classes=40, channels=1, height=1, width=6)
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
DECODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
LLAMA = {"width": 16, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 24, "norm_eps": 1e-5}
LLAMA |= {"rope_theta": 100.0, "rope_factor": 1.0, "position": "slot", "readout": "last", "tie_embeddings": False}


def vit(**changes):
    options = {"patch_size": 2, "width": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5, "drop_path": 0.0}
    options |= {"position": "item", "readout": "cls", "pretrained": False}
    return Vit(IMAGES, **(options | changes))


def vim(**changes):
    options = {"patch_size": 2, "width": 24, "depth": 2, "num_states": 3, "expand": 2, "conv_kernel": 3}
    options |= {"drop_path": 0.0, "position": "item", "readout": "cls", "direction": "bidirectional"}
    return Vim(IMAGES, **(options | changes))


def llama(spec=TEXT, **changes):
    return Llama(spec, **(LLAMA | {"patch_size": 1 if spec is TEXT else 2} | changes))


def timm_vit(**changes):
    options = {"img_size": 4, "patch_size": 2, "in_chans": 2, "num_classes": 5, "embed_dim": 16, "depth": 2}
    return VisionTransformer(**(options | {"num_heads": 2, "mlp_ratio": 1.5} | changes))


def qwen_vl():
    text = DECODER | NO_TOKENS | {"num_hidden_layers": 1}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 0, 1], "rope_theta": 100.0}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"patch_size": 2, "temporal_patch_size": 1, "spatial_merge_size": 2, "in_channels": 1, "window_size": 8}
    tokens = {"image_token_id": 38, "video_token_id": 37, "vision_start_token_id": 36, "vision_end_token_id": 35}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision | {"fullatt_block_indexes": [0]}, **(tokens | NO_TOKENS)
    )
    return Qwen2_5_VLForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "vit_mean_slot": functools.partial(vit, position="slot", readout="mean"),
    "vim": vim,
    "vim_forward": functools.partial(vim, direction="forward", readout="last", position="none"),
    "llama_text": llama,
    "llama_tied": functools.partial(llama, tie_embeddings=True),
    "llama_image": functools.partial(llama, IMAGES, position="item", readout="mean"),
    "timm": timm_vit,
    "timm_norms": functools.partial(
        timm_vit, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=0.1, reg_tokens=2
    ),
    "transformers_llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, **NO_TOKENS, attention_bias=True)),
    "transformers_tied": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, **NO_TOKENS, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER, **NO_TOKENS)),
    "qwen_vl": qwen_vl,
}


def tiny(name):
    return scatter(BUILDERS[name]())


def scatter(model):
    """Random parameters in double precision; transformers' norms, which compute in single, exchanged for torch's."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            exact = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            model.set_submodule(path, exact)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def inputs_of(model):
    """A batch that the model reads, as keywords where it needs several tensors."""
    if isinstance(model, Qwen2_5_VLForConditionalGeneration):
        tokens = torch.tensor([[1, 2, 36, 38, 38, 38, 38, 35, 5, 6]])
        pixels = torch.randn(16, 4, dtype=next(model.parameters()).dtype)
        grid, is_image = torch.tensor([[1, 4, 4]]), (tokens == 38).int()
        return {"input_ids": tokens, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": is_image}
    if hasattr(model, "patch_embed") or getattr(model, "kind", "") == "image":
        return torch.rand(3, 2, 4, 4, dtype=next(model.parameters()).dtype)
    return torch.randint(40, (2, 6))


@torch.no_grad()
def outputs(model, inputs):
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


def random_order(site):
    """Within the heads where the site folds; anything otherwise."""
    heads = site.num_heads if site.moves else 1
    width = site.num_items // heads
    order = torch.cat([head * width + torch.randperm(width) for head in range(heads)])
    return order if (order.diff() != 1).any() else order.flip(0)  # never the identity
