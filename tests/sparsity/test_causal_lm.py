"""Text models of ours as transformers' own: the same outputs, whole or from an export."""

import json

import pytest
import torch
from pruned_models import case, prune
from safetensors.torch import save_file
from tiny_models import LLAMA, llama, outputs, tiny
from torch import nn
from transformers import LlamaForCausalLM

from permlab.sparsity.causal_lm import as_causal_lm
from permlab.sparsity.export_folder import export, load_export
from permlab.sparsity.fold import find_gathers, fold


@pytest.mark.parametrize("name", ["llama_text", "llama_tied"])
def test_a_folded_text_model_is_transformers_own(tmp_path, name):
    setting = case(name, select="foldable")
    fold(setting["pruned"], setting["sites"], setting["orders"])
    expected = outputs(setting["pruned"], setting["inputs"])
    as_causal_lm(setting["pruned"]).save_pretrained(tmp_path)
    restored = LlamaForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    torch.testing.assert_close(outputs(restored, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)
    assert restored.config.tie_word_embeddings == (name == "llama_tied")
    tokens = setting["inputs"][:1]
    steps = restored.generate(tokens, max_new_tokens=2, do_sample=False)[0, 6:]
    for step in steps:  # with the cache that our model does not keep
        assert step == outputs(setting["pruned"], tokens)[0, -1].argmax()
        tokens = torch.cat([tokens, step.view(1, 1)], dim=1)


@pytest.mark.parametrize("nested", [True, False])
def test_the_export_of_a_text_model_becomes_transformers_own(tmp_path, nested):
    torch.manual_seed(3)
    setting = case("llama_tied")
    options = LLAMA | {"component": "llama", "tie_embeddings": True, "lr": 0.1, "patch_size": None}
    setting["config"] = {"model": options, "seed": 0} if nested else options
    dense = llama(tie_embeddings=True).eval()
    nn.init.normal_(dense.embedding.weight, std=0.3)
    setting |= {"dense": dense, "pruned": prune(dense, setting["sites"], setting["orders"], n=2, m=4)}
    assert export(tmp_path / "x", **setting)["num_gathered"] == 6
    restored = as_causal_lm(tmp_path / "x")
    expected = outputs(setting["pruned"], setting["inputs"])
    torch.testing.assert_close(outputs(restored, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)


def test_the_angles_of_a_half_precision_copy_are_not_rounded():
    backbone = llama().bfloat16()
    copied = as_causal_lm(backbone)
    assert torch.equal(copied.model.rotary_emb.inv_freq, backbone.network.rotary_emb.inv_freq)
    assert copied.lm_head.weight.dtype == torch.bfloat16


@pytest.fixture
def earlier(tmp_path):
    """What earlier versions wrote of a model with gathers: our names alone, options in `config.json`."""
    setting = case("llama_text")
    fold(setting["pruned"], setting["sites"], setting["orders"])
    gathers = {name: module.splits for name, module in find_gathers(setting["pruned"]).items()}
    save_file(setting["pruned"].state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "sparsity.json").write_text(json.dumps({"gathers": gathers, "tied": {}}))
    options = LLAMA | {"component": "llama", "lr": 0.1, "patch_size": None}
    (tmp_path / "config.json").write_text(json.dumps({"model": options}))
    return tmp_path, setting


def test_an_export_of_an_earlier_version_is_read(earlier):
    folder, setting = earlier
    expected = outputs(setting["pruned"], setting["inputs"]).float()
    for model in (as_causal_lm(folder), load_export(folder, llama().eval())):
        torch.testing.assert_close(outputs(model, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)


def test_an_export_of_transformers_own_model_is_read(tmp_path):
    setting = case("transformers_tied")
    assert export(tmp_path / "x", **setting)["num_gathered"] == 6
    expected = outputs(setting["pruned"], setting["inputs"])
    restored = as_causal_lm(tmp_path / "x")
    torch.testing.assert_close(outputs(restored, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)
    export(tmp_path / "qwen_vl", **case("qwen_vl"))
    with pytest.raises(ValueError, match="a Qwen2_5_VLForConditionalGeneration, which is no language model alone"):
        as_causal_lm(tmp_path / "qwen_vl")


def test_models_that_transformers_has_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a Llama of image with item"):
        as_causal_lm(tiny("llama_image"))
    with pytest.raises(ValueError, match="got a Vit of"):
        as_causal_lm(tiny("vit"))
    with pytest.raises(ValueError, match="is no export"):
        as_causal_lm(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {"component": "vit"}}')
    with pytest.raises(ValueError, match="holds a vit, not a llama"):
        as_causal_lm(str(tmp_path))
    export(tmp_path / "x", **case("vit"))
    with pytest.raises(ValueError, match="holds no language model"):
        as_causal_lm(tmp_path / "x")
