import pytest
from tiny_models import tiny, vim, vit
from torch import nn
from transformers import LlamaModel

from permlab.sparsity.stream_site import stream_site


def test_the_stream_is_read_by_all_layers_behind_norms():
    site = stream_site(vim())
    assert [reader.module for reader in site.readers] == ["blocks.0.mixer.in_proj", "blocks.1.mixer.in_proj"]
    assert site.num_items == 24
    assert {(move.tensor, move.axis) for move in site.moves} == {
        ("patch_embed.weight", 0), ("patch_embed.bias", 0), ("cls_token", 2), ("pos_embed", 2), ("norm.weight", 0),
        ("blocks.0.norm.weight", 0), ("blocks.1.norm.weight", 0), ("blocks.0.mixer.out_proj.weight", 0),
        ("blocks.1.mixer.out_proj.weight", 0), ("head.weight", 1),
    }  # fmt: skip


def test_streams_that_cannot_be_permuted_are_refused():
    with pytest.raises(ValueError, match="more than one residual stream"):
        stream_site(tiny("qwen_vl"))
    causal = tiny("transformers_llama")
    assert isinstance(causal.model, LlamaModel)
    with pytest.raises(ValueError, match=r"it is not known how embed_tokens\.weight lies"):
        stream_site(causal.model)
    model = vit()
    model.adapter = nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"it is not known how adapter\.weight lies"):
        stream_site(model)
    model = vit()
    model.head = nn.Identity()
    with pytest.raises(ValueError, match="Vit has no head"):
        stream_site(model)


@pytest.mark.parametrize(("name", "axis"), [("llama_text", 1), ("llama_image", 0), ("transformers_tied", 1)])
def test_an_embedding_is_a_projection_or_has_a_row_for_every_token(name, axis):
    moves = {move.tensor: move.axis for move in stream_site(tiny(name)).moves}
    (embedding,) = [tensor for tensor in moves if tensor.endswith(("embedding.weight", "embed_tokens.weight"))]
    assert moves[embedding] == axis
    head = "head.weight" if name.startswith("llama") else "lm_head.weight"
    assert moves[head] == 1
    assert ("embedding.bias" in moves) == (name == "llama_image")
    assert "head.bias" not in moves
