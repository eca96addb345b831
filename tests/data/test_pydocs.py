import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pydoc_data.topics import topics

import numpy as np
import pytest
import regex

from permlab.data import pydocs
from permlab.data.pydocs import Pydocs

SPLITS = ("train", "val", "test")


def make(**options) -> Pydocs:
    defaults = {
        "sequence_length": 128,
        "tokenizer": "byte",
        "vocab_size": 512,
        "val_fraction": 0.1,
        "test_fraction": 0.1,
        "split_seed": None,
    }
    return Pydocs(**defaults | options)


def text_of(data: Pydocs, split: str, seed: int) -> str:
    """Texts of a split's topics, from Python's own module."""
    return "\n".join(topics[title] for title in sorted(data.topics(split, seed)))


def tokens_of(dataset) -> list[int]:
    """Tokens of every window, put back together."""
    inputs, targets = dataset.__getitems__(range(len(dataset)))
    return np.concatenate([inputs.numpy(), targets.numpy()[:, -1:]], axis=1).ravel().tolist()


def test_shape_is_known_before_torch_is_imported() -> None:
    code = (
        "import sys; from permlab.data.pydocs import Pydocs;"
        "print(*(Pydocs(sequence_length=64, tokenizer=name, vocab_size=300, val_fraction=0.1, test_fraction=0.1,"
        " split_seed=None).spec()"
        " for name in ('byte', 'bpe')));"
        "assert not {'torch', 'tokenizers', 'transformers'} & set(sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "kind='text', num_classes=256, channels=1, height=1, width=64, patch_size=1" in output
    assert "kind='text', num_classes=300, channels=1, height=1, width=64, patch_size=1" in output


@pytest.mark.parametrize("seed", range(6))
def test_every_topic_is_in_one_split(seed: int) -> None:
    parts = [make().topics(split, seed) for split in SPLITS]
    assert sorted(title for part in parts for title in part) == sorted(topics)
    assert all(parts)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_seed_of_the_split_takes_the_place_of_the_runs(tokenizer: str) -> None:
    own, shared = (make(tokenizer=tokenizer, split_seed=seed) for seed in (None, 4))
    for split in SPLITS:
        assert {shared.topics(split, seed) for seed in range(3)} == {own.topics(split, 4)}
    assert tokens_of(shared.dataset("test", 1)) == tokens_of(own.dataset("test", 4))
    assert tokens_of(own.dataset("test", 1)) != tokens_of(own.dataset("test", 4))


@pytest.mark.parametrize("seed", range(3))
def test_no_split_repeats_what_another_says(seed: int) -> None:
    """Looks for every 13 words of a topic in the texts of the other splits, as one looks for a string in a file."""
    texts = {split: [topics[title] for title in make().topics(split, seed)] for split in SPLITS}
    rows = {split: "".join(f" {' '.join(text.split())} |" for text in texts[split]) for split in SPLITS}
    for here, there in (("val", "train"), ("test", "train"), ("test", "val")):
        for text in texts[here]:
            words = text.split()
            passages = (" ".join(words[i : i + 13]) for i in range(len(words) - 12))
            assert [passage for passage in passages if f" {passage} " in rows[there]] == []


def test_without_families_topics_would_repeat_each_other() -> None:
    """The reason for them: whole topics are also sections of others."""
    assert topics["else"] == topics["if"]
    paragraph = topics["if"].split("\n\n")[1]
    assert paragraph in topics["compound"]
    family = next(part for part in pydocs._families() if "if" in part)
    assert {"else", "compound"} <= set(family)


@pytest.mark.parametrize(("val", "test"), [(0.1, 0.1), (0.2, 0.05), (0.15, 0.15)])
def test_splits_are_about_as_large_as_asked(val: float, test: float) -> None:
    whole = sum(len(text.encode()) for text in topics.values())
    for seed in range(4):
        data = make(val_fraction=val, test_fraction=test)
        size = {split: sum(len(topics[title].encode()) for title in data.topics(split, seed)) for split in SPLITS}
        assert val - 0.01 < size["val"] / whole <= val
        assert test - 0.01 < size["test"] / whole <= test
        assert sum(size.values()) == whole


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("length", [1, 64, 300])
def test_bytes_are_those_of_the_topics(split: str, length: int) -> None:
    data = make(sequence_length=length)
    expected = text_of(data, split, 3).encode()
    seen = bytes(tokens_of(data.dataset(split, 3)))
    assert expected.startswith(seen)
    assert len(expected) - len(seen) <= length


@pytest.mark.parametrize("split", SPLITS)
def test_byte_pairs_decode_to_the_topics(split: str) -> None:
    data = make(tokenizer="bpe", sequence_length=10)
    dataset = data.dataset(split, 1)
    tokens = tokens_of(dataset)
    assert max(tokens) < 512
    tokenizer = pydocs._bpe(text_of(data, "train", 1), 512)
    spelled = {char: byte for byte, char in byte_alphabet().items()}
    seen = bytes(spelled[char] for token in tokens for char in tokenizer.id_to_token(token))
    expected = text_of(data, split, 1).encode()
    assert expected.startswith(seen)
    assert len(expected) - len(seen) < 11 * 60
    assert len(seen) > 2 * len(tokens)  # or nothing would be gained over bytes


def byte_alphabet() -> dict[int, str]:
    """The printable stand-ins of byte-level vocabularies: a printable byte is itself, the others follow from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def test_byte_pairs_are_learned_from_the_training_topics_of_the_seed() -> None:
    data = make(tokenizer="bpe")
    vocabularies = [pydocs._bpe(text_of(data, "train", seed), 512).get_vocab() for seed in (0, 1)]
    assert vocabularies[0] != vocabularies[1]
    assert all(sorted(vocabulary.values()) == list(range(512)) for vocabulary in vocabularies)
    train = text_of(data, "train", 0).encode()
    spelled = {char: byte for byte, char in byte_alphabet().items()}
    merged = [bytes(spelled[char] for char in token) for token in vocabularies[0] if len(token) > 1]
    assert len(merged) == 256
    assert all(piece in train for piece in merged)
    # The first pair to be merged is the most frequent one within the pieces that GPT-2's pattern cuts a text into.
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    pairs = Counter()
    for piece in regex.findall(pattern, train.decode()):
        pairs.update(pairwise(piece))
    first = next(token for token, number in vocabularies[0].items() if number == 256)
    assert "".join(pairs.most_common(1)[0][0]).encode() == bytes(spelled[char] for char in first)


def test_byte_pairs_are_the_same_in_every_process() -> None:
    code = (
        "from permlab.data.pydocs import Pydocs; import hashlib;"
        "data = Pydocs(sequence_length=8, tokenizer='bpe', vocab_size=400, val_fraction=0.1, test_fraction=0.1,"
        " split_seed=None);"
        "print(hashlib.sha256(data._tokens('val', 0).tobytes()).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_split_is_a_function_of_the_seed() -> None:
    first = make().topics("test", 4)
    pydocs._split.cache_clear()
    assert make().topics("test", 4) == first
    assert make().topics("test", 5) != first


def test_fingerprint_is_of_the_whole_text(monkeypatch) -> None:
    before = make().fingerprint()
    assert before == make(tokenizer="bpe", val_fraction=0.3).fingerprint()
    assert len(before) == 16
    changed = topics | {"if": topics["if"].replace("conditional", "Conditional", 1)}
    monkeypatch.setattr(pydocs, "_topics", lambda: changed)
    assert make().fingerprint() != before
    monkeypatch.setattr(pydocs, "_topics", lambda: dict(reversed(topics.items())))
    assert make().fingerprint() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.5, "test_fraction": 0.46}, "val_fraction 0.5 and test_fraction 0.46"),
        ({"val_fraction": 0.0}, "val_fraction 0.0"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "vocab_size 256: expected more than the 256 bytes"),
    ],
)
def test_values_that_cannot_be_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_what_the_text_cannot_give_is_refused() -> None:
    with pytest.raises(ValueError, match=r"val split of pydoc_data\.topics: .* sequence_length 100000 needs"):
        make(sequence_length=100_000).dataset("val", 0)
    with pytest.raises(ValueError, match="vocab_size 50000: the training text has only"):
        make(tokenizer="bpe", vocab_size=50_000).dataset("train", 0)


def test_a_python_without_the_texts_is_named(monkeypatch) -> None:
    pydocs._topics.cache_clear()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"without its module pydoc_data\.topics"):
        make().spec()


def test_vocabulary_size_means_nothing_to_bytes() -> None:
    small, large = make(vocab_size=5), make(vocab_size=5000)
    assert small.spec() == large.spec()
    assert tokens_of(small.dataset("val", 0)) == tokens_of(large.dataset("val", 0))
