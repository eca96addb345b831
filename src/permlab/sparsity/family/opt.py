"""OPT, with the names of transformers; its norms come before the layers, as in all sizes but 350M."""

from permlab.sparsity.block_family import Family, Line

FAMILY = Family(
    models=("OPT",),
    needs="self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    writes="self_attn.out_proj fc2",
    norms="self_attn_layer_norm final_layer_norm",
    lines=(
        Line("qkv", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", coupling="shared", behind_norm=True),
        Line("self_attn.q_proj", "self_attn.q_proj", coupling="independent", behind_norm=True),
        Line("self_attn.k_proj", "self_attn.k_proj", coupling="independent", behind_norm=True),
        Line("self_attn.v_proj", "self_attn.v_proj", coupling="independent", behind_norm=True),
        Line("self_attn.out_proj", "self_attn.out_proj", "self_attn.v_proj", attention="self_attn"),
        Line("fc1", "fc1", behind_norm=True),
        Line("fc2", "fc2", "fc1"),
    ),
    ends={0: "decoder.embed_tokens decoder.embed_positions decoder.final_layer_norm"},
    head="lm_head",
)
