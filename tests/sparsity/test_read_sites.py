from collections import Counter

import pytest
import torch
from tiny_models import BUILDERS, tiny, vit
from torch import nn

from permlab.sparsity.block import block_names
from permlab.sparsity.read_sites import read_sites
from permlab.sparsity.weight_site import Move, Reader

# What each family's blocks have: kind -> (readers, number of items, moves as (tensor, start)), by hand.
VIT_SHARED = {
    "attn.qkv": (["attn.qkv"], 16, []),
    "attn.proj": (["attn.proj"], 16, []),
    "mlp.fc1": (["mlp.fc1"], 16, []),
    "mlp.fc2": (["mlp.fc2"], 24, [("mlp.fc1.weight", 0), ("mlp.fc1.bias", 0)]),
}
GATED = {
    "mlp.gate_up": (["mlp.gate_proj", "mlp.up_proj"], 16, []),
    "mlp.down_proj": (["mlp.down_proj"], 24, [("mlp.gate_proj.weight", 0), ("mlp.up_proj.weight", 0)]),
}
LLAMA_SHARED = {
    "self_attn.qkv": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], 16, []),
    "self_attn.o_proj": (["self_attn.o_proj"], 16, []),
    **GATED,
}
VIM_SHARED = {
    "mixer.in_proj": (["mixer.in_proj"], 24, []),
    "mixer.inner": (
        ["mixer.x_proj", "mixer.x_proj_b", "mixer.out_proj"],
        48,
        [
            ("mixer.in_proj.weight", 0), ("mixer.in_proj.weight", 48), ("mixer.A_log", 0), ("mixer.A_b_log", 0),
            ("mixer.D", 0), ("mixer.D_b", 0), ("mixer.conv1d.weight", 0), ("mixer.conv1d.bias", 0),
            ("mixer.conv1d_b.weight", 0), ("mixer.conv1d_b.bias", 0), ("mixer.dt_proj.weight", 0),
            ("mixer.dt_proj.bias", 0), ("mixer.dt_proj_b.weight", 0), ("mixer.dt_proj_b.bias", 0),
        ],
    ),
    "mixer.dt_proj": (["mixer.dt_proj"], 2, [("mixer.x_proj.weight", 0)]),
    "mixer.dt_proj_b": (["mixer.dt_proj_b"], 2, [("mixer.x_proj_b.weight", 0)]),
}  # fmt: skip
EXPECTED = {
    "vit": ("blocks", VIT_SHARED),
    "timm": ("blocks", VIT_SHARED),
    "vim": ("blocks", VIM_SHARED),
    "llama_text": ("network.layers", LLAMA_SHARED),
    "transformers_tied": ("model.layers", LLAMA_SHARED),
    "qwen2": ("model.layers", LLAMA_SHARED),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sites_of_a_family(name):
    prefix, kinds = EXPECTED[name]
    sites = read_sites(tiny(name))
    assert sorted(site.name for site in sites) == sorted(f"{prefix}.{i}.{kind}" for i in range(2) for kind in kinds)
    for site in sites:
        block = site.name.removesuffix(f".{site.kind}")
        readers, num_items, moves = kinds[site.kind]
        assert site.readers == tuple(Reader(f"{block}.{reader}", None) for reader in readers)
        assert {(move.tensor, move.start) for move in site.moves} == {(f"{block}.{t}", start) for t, start in moves}
        assert all(move.axis == 0 for move in site.moves)
        assert (site.num_items, site.num_heads, site.repeats) == (num_items, 1, 1)
        assert site.optional == ("dt_proj" in site.kind)


def test_the_vision_language_model_has_both_towers():
    model = tiny("qwen_vl")
    assert block_names(model) == ["model.visual.blocks.0", "model.language_model.layers.0"]
    kinds = Counter(site.kind for site in read_sites(model))
    assert kinds == {
        "attn.qkv": 1, "attn.proj": 1, "self_attn.qkv": 1, "self_attn.o_proj": 1, "mlp.gate_up": 2, "mlp.down_proj": 2,
    }  # fmt: skip
    (vision,) = read_sites(model, select=["model.visual.blocks.0.mlp.down_proj"])
    moved = {
        f"model.visual.blocks.0.mlp.{layer}.{leaf}" for layer in ("gate_proj", "up_proj") for leaf in ("weight", "bias")
    }
    assert {move.tensor for move in vision.moves} == moved


def test_independent_layers_have_a_site_each():
    kinds = [site.kind for site in read_sites(tiny("vit"), coupling="independent")[:6]]
    assert kinds == ["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    thirds = [site.readers[0] for site in read_sites(tiny("vit"), coupling="independent")[:3]]
    assert thirds == [Reader("blocks.0.attn.qkv", rows) for rows in ((0, 16), (16, 32), (32, 48))]
    kinds = [site.kind for site in read_sites(tiny("llama_text"), coupling="independent")[:7]]
    assert kinds == [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    sites = read_sites(tiny("vim"), coupling="independent")
    assert [(site.kind, bool(site.moves)) for site in sites[:6]] == [
        ("mixer.in_proj", False), ("mixer.x_proj", False), ("mixer.x_proj_b", False), ("mixer.out_proj", False),
        ("mixer.dt_proj", True), ("mixer.dt_proj_b", True),
    ]  # fmt: skip


def test_one_direction_has_no_backward_parts():
    names = {site.kind for site in read_sites(tiny("vim_forward"))}
    assert names == {"mixer.in_proj", "mixer.inner", "mixer.dt_proj"}
    (site, _) = read_sites(tiny("vim_forward"), select="mixer.inner")
    assert [reader.module for reader in site.readers] == ["blocks.0.mixer.x_proj", "blocks.0.mixer.out_proj"]
    assert len(site.moves) == 8


def test_within_heads_the_values_alone_move():
    (site, _) = read_sites(tiny("vit"), select=["attn.proj"], within_heads=True)
    assert site.moves == (Move("blocks.0.attn.qkv.weight", 0, 32), Move("blocks.0.attn.qkv.bias", 0, 32))
    assert (site.num_items, site.num_heads, site.repeats) == (16, 2, 1)
    (site, _) = read_sites(tiny("transformers_llama"), select=["self_attn.o_proj"], within_heads=True)
    values = "model.layers.0.self_attn.v_proj"
    assert site.moves == (Move(f"{values}.weight", 0), Move(f"{values}.bias", 0))
    assert (site.num_items, site.num_heads, site.repeats) == (8, 2, 2)


@pytest.mark.parametrize("name", BUILDERS)
def test_foldable_are_the_streams_and_what_moves_within_heads(name):
    model = tiny(name)
    foldable = read_sites(model, select="foldable")
    streams = [site for site in foldable if site.kind == "stream"]
    assert len(streams) == (2 if name == "qwen_vl" else 1)
    assert foldable == streams + [site for site in read_sites(model, within_heads=True) if site.moves]
    assert foldable == read_sites(model, select="foldable", coupling="independent")
    assert all(site.moves for site in foldable)


def test_selection_by_name_and_kind_keeps_the_models_order():
    sites = read_sites(tiny("vit"), select=["mlp.fc2", "blocks.1.attn.qkv", "stream"])
    assert [site.name for site in sites] == ["stream", "blocks.0.mlp.fc2", "blocks.1.attn.qkv", "blocks.1.mlp.fc2"]


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (["mlp.fc3"], r"no site is called mlp\.fc3; nearest valid choice: mlp\.fc[12]$"),
        ("folding", r"folding; nearest valid choice: foldable"),
        (["blocks.7.mlp.fc2"], r"nearest valid choice: blocks\.[01]\.mlp\.fc2"),
        (["attn.q"], r"attn\.q; nearest valid choice: attn\.qkv"),
        (["streem"], r"streem; nearest valid choice: stream"),
        (["visual.stream"], r"no site is called visual\.stream; nearest valid choice: stream"),
        ([], "no sites are selected"),
    ],
)
def test_unknown_names_are_refused(select, message):
    with pytest.raises(ValueError, match=message):
        read_sites(tiny("vit"), select=select)


def test_unknown_coupling_is_refused():
    with pytest.raises(ValueError, match="coupling=share; nearest valid choice: shared"):
        read_sites(tiny("vit"), coupling="share")


def test_parameters_that_would_be_left_behind_are_refused():
    model = vit()
    model.blocks[1].attn.q_bias = nn.Parameter(torch.zeros(16))
    with pytest.raises(ValueError, match=r"block blocks\.1 has a parameter .* attn\.q_bias"):
        read_sites(model)
    model = vit()
    model.blocks[0].mlp.fc1 = nn.Linear(16, 48)  # twice the width, as where one half gates the other
    with pytest.raises(ValueError, match=r"mlp\.fc1\.weight has 48 entries along axis 0, not the 24"):
        read_sites(model)
