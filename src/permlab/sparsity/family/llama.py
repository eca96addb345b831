"""LLaMA, Qwen2 and the language layers of Qwen2.5-VL, with the names of transformers; and our `Llama`."""

from permlab.sparsity.block_family import GATED_MLP, Family, Line

FAMILY = Family(
    models=("LLaMA", "Qwen2"),
    needs="self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    writes="self_attn.o_proj mlp.down_proj",
    norms="input_layernorm post_attention_layernorm",
    others="self_attn.q_norm self_attn.k_norm",
    lines=(
        Line(
            "self_attn.qkv",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            coupling="shared",
            behind_norm=True,
        ),
        Line("self_attn.q_proj", "self_attn.q_proj", coupling="independent", behind_norm=True),
        Line("self_attn.k_proj", "self_attn.k_proj", coupling="independent", behind_norm=True),
        Line("self_attn.v_proj", "self_attn.v_proj", coupling="independent", behind_norm=True),
        # Rotation ties the rows of q and k to their places in the head; those of v are free within it.
        Line("self_attn.o_proj", "self_attn.o_proj", "self_attn.v_proj", attention="self_attn"),
        *GATED_MLP,
    ),
    # Our `embedding` is an `nn.Embedding` of tokens or a projection of patches. Behind a vision tower, what merges
    # its patches writes to the stream of the language model.
    ends={
        0: "embedding network.norm embed_tokens norm language_model.embed_tokens language_model.norm "
        "visual.merger.mlp.2",
        1: "position_table",
    },
    head="head lm_head",
)
