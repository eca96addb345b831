"""GGUF: a LLaMA as llama.cpp keeps it, its weights in few bits and its tokenizer among its settings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# What llama.cpp calls a block's tensors, and transformers.
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Marks of tokens that are no pieces of text: those that steer, and those that a user defined.
CONTROL, USER_DEFINED = 3, 4
SPECIAL = ("bos", "eos", "unknown", "padding")
# How a text is cut up before its pieces are merged, by llama.cpp's names: whether each digit stands alone.
LONE_DIGITS = {"smollm": True, "gpt-2": False}


def convert(path: Path, folder: Path) -> None:
    """Write a LLaMA with its tokenizer as a folder of transformers.

    Weights are kept in single precision, which holds what the few bits stand for without a second rounding.

    Raises:
        ValueError: if the file is no GGUF, is cut off, holds another architecture or another kind of tokenizer, or
            its settings and its tensors disagree.
    Source: the GGUF format of llama.cpp, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, through its
        own package `gguf`.
    Differs from source: llama.cpp turns pairs of neighbouring channels of a head, transformers pairs half a head
        apart; the rows of queries and keys are put back into the order of the latter.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    try:
        reader = GGUFReader(path)
        about = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # a file that is cut off or no GGUF fails in as many ways as it has bytes
        raise ValueError(f"{path.name}: is no whole GGUF ({type(error).__name__}: {error})") from error
    config = _config(about, path.name)
    tensors = dict(_tensors(reader.tensors, config, path.name))
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    _check_shapes({name: tensor.shape for name, tensor in tensors.items()}, config, path.name)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)
    _write_tokenizer(about, config["max_position_embeddings"], folder)


def _config(about: dict[str, Any], file: str) -> dict[str, Any]:
    """Settings by transformers' names."""
    architecture = about.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{file}: holds a {architecture}, expected a llama")
    kind, cut = about.get("tokenizer.ggml.model"), about.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in LONE_DIGITS:
        known = ", ".join(LONE_DIGITS)
        raise ValueError(f"{file}: its tokenizer is {kind} with {cut}, expected gpt2 with one of {known}")
    try:
        width, num_heads = about["llama.embedding_length"], about["llama.attention.head_count"]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(about["tokenizer.ggml.tokens"]),
            "hidden_size": width,
            "num_hidden_layers": about["llama.block_count"],
            "num_attention_heads": num_heads,
            "num_key_value_heads": about.get("llama.attention.head_count_kv", num_heads),
            "head_dim": width // num_heads,
            "intermediate_size": about["llama.feed_forward_length"],
            "max_position_embeddings": about["llama.context_length"],
            "rms_norm_eps": _shortest(about["llama.attention.layer_norm_rms_epsilon"]),
            "rope_theta": _shortest(about.get("llama.rope.freq_base", 10000.0)),
            "hidden_act": "silu",
            "dtype": "float32",
            "bos_token_id": about.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": about.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": about.get("tokenizer.ggml.padding_token_id"),
        }
    except KeyError as error:
        raise ValueError(f"{file}: has no setting {error.args[0]}") from error


def _shortest(value: float) -> float:
    """The shortest decimal that is the same in single precision, in which GGUF keeps it."""
    return float(str(np.float32(value)))


def _tensors(tensors: Any, config: dict[str, Any], file: str) -> Iterator[tuple[str, np.ndarray]]:
    from gguf.quants import dequantize

    for tensor in tensors:
        name = _name(tensor.name)
        if name is None:
            raise ValueError(f"{file}: there is no place for its tensor {tensor.name}")
        try:
            weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError as error:
            raise ValueError(f"{file}: its tensor {tensor.name} is {tensor.tensor_type.name}, unknown here") from error
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _half_apart(weight, config["head_dim"])
        yield name, weight


def _name(theirs: str) -> str | None:
    stem, _, kind = theirs.rpartition(".")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in IN_BLOCK:
        return f"model.layers.{parts[1]}.{IN_BLOCK[parts[2]]}.{kind}"
    return None


def _half_apart(weight: np.ndarray, head_width: int) -> np.ndarray:
    """Rows of queries or keys whose rotated pairs are neighbours, as rows whose pairs are half a head apart."""
    pairs = weight.reshape(-1, head_width // 2, 2, weight.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _check_shapes(found: dict[str, tuple[int, ...]], config: dict[str, Any], file: str) -> None:
    expected = _shapes(config)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(f"{file}: {name} is {found.get(name)}, and {expected.get(name)} by its settings")


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, mlp_width = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    ends = ["model.embed_tokens"] + ([] if config["tie_word_embeddings"] else ["lm_head"])
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (config["vocab_size"], width) for name in ends}
    shapes["model.norm.weight"] = (width,)
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (mlp_width, width),
        "mlp.up_proj": (mlp_width, width),
        "mlp.down_proj": (width, mlp_width),
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def _write_tokenizer(about: dict[str, Any], longest: int, folder: Path) -> None:
    """Byte pairs, as transformers reads them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces, kinds = about["tokenizer.ggml.tokens"], about.get("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ", 1)) for merge in about["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges))
    bytes_apart = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lone_digits = LONE_DIGITS[about.get("tokenizer.ggml.pre", "gpt-2")]
    digits = [pre_tokenizers.Digits(individual_digits=True)] if lone_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_apart])
    tokenizer.decoder = decoders.ByteLevel()
    for piece, kind in zip(pieces, kinds, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(piece, special=kind == CONTROL, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unknown": "unk", "padding": "pad"}
    numbers = {names.get(name, name): about.get(f"tokenizer.ggml.{name}_token_id") for name in SPECIAL}
    settings = {f"{name}_token": pieces[number] for name, number in numbers.items() if number is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest}
    settings |= {"clean_up_tokenization_spaces": False, "add_prefix_space": False}
    if "tokenizer.chat_template" in about:
        settings["chat_template"] = about["tokenizer.chat_template"]
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
