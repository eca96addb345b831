"""From text to tokens: bytes, or a tokenizer of a folder or the hub, whose vocabulary is known beforehand."""

import json
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from permlab.data.document import brief

BYTE = "byte"
# Tokenizers that are made here; all others belong to a published model.
OWN = (BYTE, "bpe")
NUM_BYTES = 256
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def vocabulary(tokenizer: str, vocab_size: int | None) -> int:
    """Number of tokens that a model needs, without loading the tokenizer.

    Args:
        tokenizer: `byte`, a local folder, or a name on the hub for `transformers.AutoTokenizer`.
        vocab_size: what was asked for; None where it can be read from the tokenizer's files.
    Raises:
        ValueError: if it cannot be told, or `vocab_size` is too small.
    """
    own = _own_vocabulary(tokenizer)
    wanted = own if vocab_size is None else vocab_size
    if wanted is None:
        raise ValueError(f"tokenizer {tokenizer}: its vocabulary cannot be read beforehand; set vocab_size")
    if own is not None and wanted < own:
        raise ValueError(f"vocab_size {vocab_size}: tokenizer {tokenizer} has {own} tokens")
    return wanted


def has_tokenizer(name: str) -> bool:
    """Whether a checkpoint comes with a tokenizer: a folder that holds its files, or a name on the hub."""
    folder = Path(name)
    if not folder.is_dir():
        return HUB_NAME.fullmatch(name) is not None
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def usual_length(tokenizer: str) -> int:
    """Tokens of a sample where nothing else is said: a line of bytes, or a page of a published model's tokens."""
    return 128 if tokenizer in OWN else 512


def usual_batch(tokenizer: str) -> int:
    """Samples of a batch where nothing else is said: about as many tokens either way."""
    return 16 if tokenizer in OWN else 4


def encode(tokenizer: str, text: str, vocab_size: int) -> np.ndarray:
    """Tokens of a text.

    Raises:
        ValueError: if the tokenizer cannot be loaded, or has a token that is not below `vocab_size`.
    """
    tokens = _encode(tokenizer, text)
    if tokens.max(initial=0) >= vocab_size:
        raise ValueError(f"tokenizer {tokenizer}: gave token {tokens.max()}, vocab_size is {vocab_size}")
    return tokens


def load_tokenizer(tokenizer: str, *, sequence_length: int) -> Any:
    """Transformers' own tokenizer that gives the same tokens.

    Args:
        sequence_length: tokens that a model was trained to read.
    Raises:
        ValueError: if it cannot be loaded.
    """
    from permlab.data.fast_tokenizer import as_pretrained, byte_tokenizer

    if tokenizer == BYTE:
        return as_pretrained(byte_tokenizer(), sequence_length=sequence_length)
    return _load_tokenizer(tokenizer)


def _own_vocabulary(tokenizer: str) -> int | None:
    """Number of tokens that a tokenizer's files tell; None where they lie on the hub or do not say."""
    if tokenizer == BYTE:
        return NUM_BYTES
    folder = Path(tokenizer)
    if not folder.is_dir():
        if not HUB_NAME.fullmatch(tokenizer):
            raise ValueError(f"tokenizer {tokenizer}: no such folder, and no name on the hub; or use {BYTE}")
        return None
    path = folder / "tokenizer.json"
    return _count_tokens(path, path.stat().st_mtime_ns) if path.is_file() else None


@cache
def _count_tokens(path: Path, modified: int) -> int:
    """One more than the largest token of a `tokenizer.json`, or the `vocab_size` of the model beside it if larger."""
    try:
        content = json.loads(path.read_bytes())
        pieces = content["model"]["vocab"]
        # Unigram models list their pieces, the others map them to tokens.
        tokens = range(len(pieces)) if isinstance(pieces, list) else pieces.values()
        added = (token["id"] for token in content.get("added_tokens", []))
        own = 1 + max([*tokens, *added])
        config = path.with_name("config.json")
        beside = json.loads(config.read_bytes()).get("vocab_size") if config.is_file() else None
        return max(own, beside or 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"tokenizer {path.parent}: {path.name} cannot be read ({brief(error)})") from error


@lru_cache(maxsize=3)
def _encode(tokenizer: str, text: str) -> np.ndarray:
    """Tokens of a text; those of three splits are kept, as a large one takes a while."""
    if tokenizer == BYTE:
        return np.frombuffer(text.encode(), dtype=np.uint8)
    # No warning that the text is longer than the model's context: it is about to be cut up.
    return np.array(_load_tokenizer(tokenizer)(text, verbose=False)["input_ids"], dtype=np.int32)


@cache
def _load_tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a missing file, network or package, or a licence that was not accepted
        raise ValueError(f"tokenizer {name}: cannot be loaded ({brief(error)})") from error
