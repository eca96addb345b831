"""A tiny LLaMA in GGUF, written by llama.cpp's own package, and what is refused as one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from permlab.data.fast_tokenizer import byte_tokenizer
from permlab.model.convert.gguf import IN_BLOCK, OUTSIDE, convert

gguf = pytest.importorskip("gguf", reason="the extra models is not installed")
LLAMA = LlamaConfig(
    vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=48,
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
)  # fmt: skip
SETTINGS = {"context_length": 48, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96}


def oracle() -> Any:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LLAMA)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def neighbours(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp has them: the two of a rotated pair one after the other."""
    half = len(weight) // num_heads // 2
    rows = [h * 2 * half + part * half + i for h in range(num_heads) for i in range(half) for part in range(2)]
    return weight[rows]


def write(path: Path, model: Any, *, architecture: str = "llama", kind: str = "F32", pre: str = "smollm", **changes):
    """A GGUF of a model; `changes` are tensors in place of its own, None to leave one out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in SETTINGS.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1000.0)
    vocabulary = byte_tokenizer().get_vocab()
    pieces = [*sorted(vocabulary, key=lambda piece: vocabulary[piece]), "<|end|>", "th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(pieces)
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(256)
    writer.add_chat_template("{{ messages }}")
    for name, tensor in tensors(model, changes).items():
        array = tensor if isinstance(tensor, np.ndarray) else tensor.detach().numpy()
        if kind != "F32" and array.ndim == 2:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(model: Any, changes: dict[str, Any]) -> dict[str, Any]:
    theirs = {ours: llama for llama, ours in {**IN_BLOCK, **OUTSIDE}.items()}
    found = {}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem == "lm_head":
            continue
        *block, part = [stem] if stem in theirs else [*stem.split(".", 3)[:3], stem.split(".", 3)[3]]
        array = tensor.numpy()
        if part.endswith(("q_proj", "k_proj")):
            array = neighbours(array, 4 if part.endswith("q_proj") else 2)
        found[f"blk.{block[2]}.{theirs[part]}.weight" if block else f"{theirs[part]}.weight"] = array
    return {name: value for name, value in (found | changes).items() if value is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gguf")
    convert(write(place / "x.gguf", oracle()), place / "x")
    return place / "x"


@torch.no_grad()
def test_transformers_opens_the_folder_and_computes_the_same(folder: Path) -> None:
    model, tokens = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.randint(258, (2, 9))
    torch.testing.assert_close(model(tokens).logits, oracle()(tokens).logits)
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["rms_norm_eps"], settings["rope_theta"], settings["tie_word_embeddings"]) == (1e-5, 1000.0, True)


def test_the_tokenizer_comes_with_it(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Digits stand alone, blanks before a number are their own.
    assert tokenizer.convert_ids_to_tokens(tokenizer("the 12<|end|>")["input_ids"]) == [
        "th", "e", "Ġ", "1", "2", "<|end|>"
    ]  # fmt: skip
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|end|>", 48)
    assert tokenizer.decode(tokenizer("né\n  x")["input_ids"]) == "né\n  x"
    assert tokenizer.chat_template == "{{ messages }}"


def test_few_bits_become_what_they_stand_for(tmp_path: Path) -> None:
    model = oracle()
    convert(write(tmp_path / "x.gguf", model, kind="Q8_0"), tmp_path / "x")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "x").state_dict()
    for name, weight in model.state_dict().items():
        assert (found[name] - weight).abs().max() <= weight.abs().max() / 127


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gemma"}, "holds a gemma, expected a llama"),
        ({"pre": "tekken"}, "its tokenizer is gpt2 with tekken, expected gpt2 with one of smollm, gpt-2"),
        ({"blk.1.ffn_up.weight": None}, r"model\.layers\.1\.mlp\.up_proj\.weight is None, and \(96, 64\)"),
        ({"blk.1.ffn_up.weight": np.zeros((95, 64), np.float32)}, r"up_proj\.weight is \(95, 64\), and \(96, 64\)"),
        ({"rope_freqs.weight": np.ones(8, np.float32)}, r"there is no place for its tensor rope_freqs\.weight"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(write(tmp_path / "x.gguf", oracle(), **change), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("length", [0, 3, 200, 20_000])
def test_a_file_that_is_cut_off_is_refused_in_one_line(tmp_path: Path, folder: Path, length: int) -> None:
    (tmp_path / "x.gguf").write_bytes((folder.parent / "x.gguf").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"x\.gguf: is no whole GGUF") as caught:
        convert(tmp_path / "x.gguf", tmp_path / "x")
    assert "\n" not in str(caught.value)
