import pytest
import torch
from tiny_models import IMAGES, inputs_of, outputs, random_order, scatter, tiny, vim, vit
from torch import nn
from transformers import LlamaModel

from permlab.model.qwen_vl import QwenVl
from permlab.sparsity.fold import fold
from permlab.sparsity.read_sites import read_sites
from permlab.sparsity.stream_site import stream_sites


def test_the_stream_is_read_by_all_layers_behind_norms():
    (site,) = stream_sites(vim())
    assert [reader.module for reader in site.readers] == ["blocks.0.mixer.in_proj", "blocks.1.mixer.in_proj"]
    assert site.num_items == 24
    assert {(move.tensor, move.axis) for move in site.moves} == {
        ("patch_embed.weight", 0), ("patch_embed.bias", 0), ("cls_token", 2), ("pos_embed", 2), ("norm.weight", 0),
        ("blocks.0.norm.weight", 0), ("blocks.1.norm.weight", 0), ("blocks.0.mixer.out_proj.weight", 0),
        ("blocks.1.mixer.out_proj.weight", 0), ("head.weight", 1),
    }  # fmt: skip


def test_streams_that_cannot_be_permuted_are_refused():
    causal = tiny("transformers_llama")
    assert isinstance(causal.model, LlamaModel)
    with pytest.raises(ValueError, match="LlamaModel has no head"):
        stream_sites(causal.model)
    model = vit()
    model.adapter = nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"it is not known how adapter\.weight lies"):
        stream_sites(model)
    model = vit()
    model.head = nn.Identity()
    with pytest.raises(ValueError, match="Vit has no head"):
        stream_sites(model)
    model = vit()
    model.vim = tiny("vim")
    with pytest.raises(ValueError, match=r"more than one residual stream, and cls_token is of any"):
        stream_sites(model)


def test_a_vision_tower_and_its_language_model_have_a_stream_each():
    vision, language = stream_sites(tiny("qwen_vl"))
    assert (vision.name, vision.kind, language.name) == (
        "model.visual.stream", "stream", "model.language_model.stream",
    )  # fmt: skip
    # Four patches are merged, their features lying after each other.
    merged = [move.start for move in vision.moves if move.tensor == "model.visual.merger.mlp.0.weight"]
    assert merged == [0, 16, 32, 48]
    ends = {(move.tensor, move.axis) for move in vision.moves if "blocks" not in move.tensor}
    assert ends - {("model.visual.merger.mlp.0.weight", 1)} == {
        ("model.visual.patch_embed.proj.weight", 0), ("model.visual.merger.ln_q.weight", 0),
    }  # fmt: skip
    assert {(move.tensor, move.axis) for move in language.moves if "layers" not in move.tensor} == {
        ("model.visual.merger.mlp.2.weight", 0), ("model.visual.merger.mlp.2.bias", 0), ("lm_head.weight", 1),
        ("model.language_model.embed_tokens.weight", 1), ("model.language_model.norm.weight", 0),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "axis"), [("llama_text", 1), ("llama_image", 0), ("transformers_tied", 1)])
def test_an_embedding_is_a_projection_or_has_a_row_for_every_token(name, axis):
    moves = {move.tensor: move.axis for (site,) in [stream_sites(tiny(name))] for move in site.moves}
    (embedding,) = [tensor for tensor in moves if tensor.endswith(("embedding.weight", "embed_tokens.weight"))]
    assert moves[embedding] == axis
    head = "head.weight" if name.startswith("llama") else "lm_head.weight"
    assert moves[head] == 1
    assert ("embedding.bias" in moves) == (name == "llama_image")
    assert "head.bias" not in moves


def test_our_tower_and_language_model_fold_as_transformers_do():
    options = {"patch_size": 1, "merge_size": 2, "width": 16, "depth": 1, "num_heads": 2, "num_kv_heads": 1}
    options |= {"vision_width": 8, "vision_depth": 1, "vision_heads": 2, "vision_mlp_width": 12, "mlp_width": 24}
    model = scatter(QwenVl(IMAGES, norm_eps=1e-6, rope_theta=100.0, tie_embeddings=True, **options))
    inputs = inputs_of(model)
    expected = outputs(model, inputs)
    sites = read_sites(model, select="foldable")
    assert [site.name for site in sites[:2]] == ["visual.stream", "language_model.stream"]
    assert set(fold(model, sites, {site.name: random_order(site) for site in sites}).values()) == {"folded"}
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-10)
