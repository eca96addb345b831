"""Vision transformers, with the names of timm's `VisionTransformer`."""

from permlab.sparsity.block_family import FUSED_ATTENTION, Family, Line

FAMILY = Family(
    models=("ViT",),
    needs="attn.qkv attn.proj mlp.fc1 mlp.fc2",
    writes="attn.proj mlp.fc2",
    norms="norm1 norm2 ls1 ls2",
    others="attn.q_norm attn.k_norm",
    lines=(
        *FUSED_ATTENTION,
        Line("mlp.fc1", "mlp.fc1", behind_norm=True),
        Line("mlp.fc2", "mlp.fc2", "mlp.fc1 mlp.norm"),
    ),
    ends={0: "patch_embed patch_embed.proj norm norm_pre fc_norm", 2: "cls_token reg_token pos_embed"},
    head="head",
)
