"""The vision tower of Qwen2.5-VL; its language layers are those of `llama`."""

from permlab.sparsity.block_family import FUSED_ATTENTION, GATED_MLP, Family

FAMILY = Family(
    models=("Qwen2.5-VL",),
    needs="attn.qkv attn.proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    writes="attn.proj mlp.down_proj",
    norms="norm1 norm2",
    lines=(*FUSED_ATTENTION, *GATED_MLP),
    ends={0: "visual.patch_embed.proj visual.merger.ln_q"},
    head="visual.merger.mlp.0[*]",
)
