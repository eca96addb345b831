"""Weights from transformers' checkpoints, and what is refused as such."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from permlab.config.build import build
from permlab.config.schema import CONF
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError
from permlab.model.llama import Llama
from permlab.sparsity.export import as_causal_lm
from permlab.sparsity.site import read_sites

TEXT = DataSpec(kind="text", num_classes=40, channels=1, height=1, width=12)
IMAGES = DataSpec(kind="image", num_classes=5, channels=1, height=4, width=4)
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
STRETCHED = PLAIN | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED |= {"original_max_position_embeddings": 8192}


def save(folder, *, tied=False, rope=PLAIN, model_type="llama", settings=None, **how):
    """A checkpoint of transformers, and the model in it."""
    shape = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        "rope_parameters": rope, "sliding_window": None, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **(shape | (settings or {})))
    oracle = AutoModelForCausalLM.from_config(config)
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    oracle.save_pretrained(folder, **how)
    return oracle


def llama(pretrained, spec=TEXT, **changes):
    options = {"patch_size": 1, "width": 16, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 24}
    options |= {"norm_eps": 1e-5, "rope_theta": 500000.0, "rope_factor": 1.0, "position": "slot"}
    options |= {"readout": "last", "tie_embeddings": False}
    return Llama(spec, pretrained=str(pretrained), **(options | changes))


def edit_config(folder, **changes):
    path = folder / "config.json"
    settings = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(settings))


def assert_same_logits(model, oracle):
    tokens = torch.randint(40, (3, 12))
    found = model(tokens)
    torch.testing.assert_close(getattr(found, "logits", found), oracle(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_are_those_of_the_model_that_was_saved(tied, sharded, tmp_path):
    oracle = save(tmp_path, tied=tied, max_shard_size="4KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == sharded
    model = llama(tmp_path, tie_embeddings=tied)
    assert (model.head.weight is model.embedding.weight) == tied
    assert_same_logits(model, oracle)


def test_stretched_wavelengths(tmp_path):
    oracle = save(tmp_path, rope=STRETCHED)
    assert_same_logits(llama(tmp_path, rope_factor=8.0), oracle)


def test_an_older_config_names_the_rotation_otherwise(tmp_path):
    oracle = save(tmp_path, rope=STRETCHED)
    old = {key: value for key, value in STRETCHED.items() if key != "rope_theta"}
    edit_config(tmp_path, rope_parameters=None, rope_theta=500000.0, rope_scaling=old)
    assert_same_logits(llama(tmp_path, rope_factor=8.0), oracle)
    # LLaMA 1 and 2 name none, and mean this.
    edit_config(tmp_path, rope_scaling=None, rope_theta=None)
    llama(tmp_path, rope_theta=10000.0)


def test_half_precision_becomes_the_default_one(tmp_path):
    oracle = save(tmp_path)
    oracle.bfloat16().save_pretrained(tmp_path)
    model = llama(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_logits(model, oracle.float())


def test_wavelengths_stored_in_an_old_checkpoint_are_passed_over(tmp_path):
    oracle = save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(state, tmp_path / "model.safetensors")
    assert_same_logits(llama(tmp_path), oracle)


def test_a_tied_table_may_be_stored_under_the_name_of_the_head(tmp_path):
    oracle = save(tmp_path, tied=True)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors")
    assert_same_logits(llama(tmp_path, tie_embeddings=True), oracle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 32}, "its width is 16, not 32"),
        ({"depth": 3}, "its depth is 2, not 3"),
        ({"num_heads": 2, "num_kv_heads": 1}, "its num_heads is 4, not 2"),
        ({"num_kv_heads": 4}, "its num_kv_heads is 2, not 4"),
        ({"mlp_width": 32}, "its mlp_width is 24, not 32"),
        ({"norm_eps": 1e-6}, "its norm_eps is 1e-05, not 1e-06"),
        ({"rope_theta": 10000.0}, r"its rope_theta is 500000\.0, not 10000\.0"),
        ({"rope_factor": 8.0}, r"its rope_factor is 1\.0, not 8\.0"),
        ({"tie_embeddings": True}, "its tie_embeddings is False, not True"),
        ({"width": 32, "depth": 3}, "its width is 16, not 32"),
        ({"position": "none"}, "these weights rotate by slot, not position=none"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(change, message, tmp_path):
    save(tmp_path)
    with pytest.raises(ValueError, match=f"^pretrained=.*: {message}$"):
        llama(tmp_path, **change)


def test_another_vocabulary_is_refused(tmp_path):
    save(tmp_path)
    spec = DataSpec(kind="text", num_classes=256, channels=1, height=1, width=12)
    with pytest.raises(ValueError, match="its vocabulary is 40, not 256"):
        llama(tmp_path, spec)


def test_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="these weights read text, the data is image"):
        llama(tmp_path, IMAGES)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"head_dim": 8}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
        ("llama", {"rope_parameters": PLAIN | {"rope_type": "linear", "factor": 4.0}}),
        ("mistral", {}),
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("qwen3", {"head_dim": 8}),
    ],
)
def test_what_no_option_says_is_as_the_checkpoint_has_it(model_type, settings, tmp_path):
    oracle = save(tmp_path, model_type=model_type, settings=settings)
    factor = settings.get("rope_parameters", {}).get("factor", 1.0)
    model = llama(tmp_path, architecture=model_type, rope_factor=factor)
    assert_same_logits(model, oracle)
    assert {site.kind for site in read_sites(model, select="foldable")} > {"stream", "mlp.down_proj"}
    assert_same_logits(as_causal_lm(model), oracle)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"head_dim": 8}, r"k_proj\.weight is \[8, 16\], not \[16, 16\]"),
        ({"attention_bias": True}, r"it has no tensor for network\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"model_type": "mistral"}, "its model_type is mistral, not llama"),
        ({"hidden_size": "wide"}, r"no readable config\.json"),
    ],
)
def test_a_configuration_that_disagrees_with_its_tensors_is_refused(setting, message, tmp_path):
    save(tmp_path)
    edit_config(tmp_path, **setting)
    with pytest.raises(ValueError, match=message):
        llama(tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle, which is not read"):
        llama(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"there is no \.safetensors file in it"):
        llama(tmp_path)


def test_missing_superfluous_and_misshapen_tensors_are_refused(tmp_path):
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    bias, norm = "model.layers.1.mlp.up_proj.bias", "model.norm.weight"
    save_file(state | {bias: torch.zeros(24)}, file)
    with pytest.raises(ValueError, match=f"there is no place for its tensor {bias}"):
        llama(tmp_path)
    save_file(state | {norm: torch.zeros(8)}, file)
    with pytest.raises(ValueError, match=rf"its tensor {norm} is \[8\], not \[16\]"):
        llama(tmp_path)
    del state[norm]
    save_file(state, file)
    with pytest.raises(ValueError, match=r"it has no tensor for network\.norm\.weight"):
        llama(tmp_path)


def test_broken_files_are_refused_in_one_line(tmp_path):
    save(tmp_path, max_shard_size="4KB")
    shard = next(tmp_path.glob("model-00002-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model-00002-.* cannot be read \(SafetensorError") as caught:
        llama(tmp_path)
    assert "\n" not in str(caught.value)
    shard.unlink()
    with pytest.raises(ValueError, match=r"model-00002-.* cannot be read"):
        llama(tmp_path)
    shard.write_bytes(whole)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no readable model\.safetensors\.index\.json"):
        llama(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no readable config\.json \(FileNotFoundError"):
        llama(tmp_path)


def test_a_name_that_is_no_folder_is_fetched_from_the_hub(tmp_path, monkeypatch):
    oracle = save(tmp_path)
    asked = []

    def download(name, *, allow_patterns):
        asked.append(name)
        # No pickle and no copy of the weights in another format is fetched.
        for file in ("pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth"):
            assert not any(Path(file).match(pattern) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same_logits(llama("meta-llama/Llama-3.2-1B"), oracle)
    assert asked == ["meta-llama/Llama-3.2-1B"]


def test_a_failure_of_the_hub_is_one_line(monkeypatch):
    def download(name, **_):
        raise OSError("cannot reach the hub\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = r"no such folder, and none from the hub \(OSError: cannot reach the hub\)$"
    with pytest.raises(ValueError, match=rf"^pretrained=meta-llama/Nothing: {message}"):
        llama("meta-llama/Nothing")


def test_a_configuration_reaches_it(tmp_path):
    oracle = save(tmp_path, tied=True, rope=PLAIN | {"rope_theta": 10000.0})
    with initialize_config_dir(str(CONF / "model"), version_base="1.3"):
        settings = OmegaConf.to_container(compose("llama_nano"))
    assert settings["pretrained"] is None
    settings |= {"patch_size": 1, "pretrained": str(tmp_path)}
    with pytest.raises(ConfigError, match="its width is 16, not 32"):
        build("model", settings, TEXT)
    settings |= {"width": 16, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 24}
    assert_same_logits(build("model", settings, TEXT), oracle)
