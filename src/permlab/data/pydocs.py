"""The language reference that ships with every CPython: half a megabyte of English, nothing to download."""

import hashlib
import json
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np

from permlab.data.spec import DataSpec, text_spec
from permlab.data.tokenizer import BYTE, NUM_BYTES, OWN, encode, load_tokenizer, usual_batch, usual_length, vocabulary
from permlab.option import AddedLater, Checkpoint, Fraction, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from permlab.data.text import TokenWindows

# Tokens of `bpe` where nothing else is said.
NUM_PAIRS = 1024
# Words in a row that two topics may not share and lie in different splits; as usual when test text is searched for.
NUM_SHARED_WORDS = 13


class Pydocs:
    """Texts behind Python's `help("if")`, split by seed into whole topics, with bytes or byte pairs as tokens.

    Topics overlap: `if` is also a section of `compound`, for instance, and `else` repeats `if`. Topics
    that share 13 words in a row therefore form a family, and a family lies in one split. A split is
    its topics in the order of their titles, with an empty line in between.

    Families come in an order drawn from the seed; each goes to test where it fits into
    `test_fraction`, else to validation where it fits, else to training. So a fraction is an upper
    bound, kept to within a percent of the text up to 0.15: the largest family has a good third of the
    text, and is always trained on where no fraction is as large.

    The texts differ between minor versions of Python; `fingerprint` tells them apart.

    Args:
        sequence_length: tokens per sample; null for 128, or 512 of a published tokenizer.
        tokenizer: `byte`; `bpe` for a byte-level byte-pair encoding learned from the training topics of the
            seed; a local folder, or a name on the hub for `transformers.AutoTokenizer`; null for that of the
            checkpoint that the model starts from, or `byte` without one.
        vocab_size: number of tokens of `bpe`, more than 256, null for 1024; of another tokenizer at least its own,
            null where it can be read; without effect for `byte`, which has 256.
        val_fraction: part of the bytes on which models are picked.
        test_fraction: part of the bytes that is looked at once, at the end.
        split_seed: of the split and of `bpe`, for runs whose seeds are to share them: then the run's own draws
            the order of batches and the samples for calibration alone. Null for the run's own.
    Raises:
        ValueError: if a fraction is below 0.01, both leave less than 0.05 to train on, or `vocab_size` is too small.
    Source: `pydoc_data.topics` of the running Python, made from the Python Language Reference.
    """

    kind: ClassVar[str] = "text"
    leaves_open: ClassVar[tuple[str, ...]] = ("batch_size",)

    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "vocab_size": ("tokenizer", ["byte"]),
    }

    def __init__(
        self,
        *,
        sequence_length: PositiveInt | None,
        tokenizer: Literal["byte", "bpe"] | Checkpoint | None,
        vocab_size: PositiveInt | None,
        val_fraction: Fraction,
        test_fraction: Fraction,
        split_seed: Annotated[NonNegativeInt | None, AddedLater(None)],
    ) -> None:
        if min(val_fraction, test_fraction) < 0.01 or val_fraction + test_fraction > 0.95:
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} must each be at least 0.01 "
                "and leave 0.05 for training"
            )
        self.tokenizer = tokenizer or BYTE
        if self.tokenizer in OWN:
            self.vocab_size = vocab_size or NUM_PAIRS
        else:
            self.vocab_size = vocabulary(self.tokenizer, vocab_size)
        if self.tokenizer == "bpe" and self.vocab_size <= NUM_BYTES:
            raise ValueError(f"vocab_size {vocab_size}: expected more than the {NUM_BYTES} bytes that bpe starts from")
        self.sequence_length = sequence_length or usual_length(self.tokenizer)
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed

    def spec(self) -> DataSpec:
        """Vocabulary and length of a sample.

        Raises:
            ValueError: if this Python comes without its topics.
        """
        _topics()
        num_tokens = NUM_BYTES if self.tokenizer == BYTE else self.vocab_size
        return text_spec(num_tokens, self.sequence_length)

    def complete(self) -> dict[str, Any]:
        """What options that were left null stand for."""
        return {
            "tokenizer": self.tokenizer, "sequence_length": self.sequence_length, "vocab_size": self.vocab_size,
            "batch_size": usual_batch(self.tokenizer),
        }  # fmt: skip

    def dataset(self, split: str, seed: int) -> "TokenWindows":
        """Token windows of `train`, `val` or `test` under this seed's split.

        Raises:
            ValueError: if the split is shorter than one sample, or the training text too short for `vocab_size`.
        """
        from permlab.data.text import TokenWindows

        tokens = self._tokens(split, seed)
        return TokenWindows(tokens, sequence_length=self.sequence_length, where=f"{split} split of pydoc_data.topics")

    def load_tokenizer(self, seed: int) -> "PreTrainedTokenizerFast":
        """What gave the tokens of this seed's splits, as transformers' own."""
        from permlab.data.fast_tokenizer import as_pretrained, byte_tokenizer

        if self.tokenizer not in OWN:
            return load_tokenizer(self.tokenizer, sequence_length=self.sequence_length)
        own = byte_tokenizer() if self.tokenizer == BYTE else _bpe(self._text("train", seed), self.vocab_size)
        return as_pretrained(own, sequence_length=self.sequence_length)

    def topics(self, split: str, seed: int) -> tuple[str, ...]:
        """Sorted titles of the topics of a split."""
        own = seed if self.split_seed is None else self.split_seed
        return _split(own, self.val_fraction, self.test_fraction)[split]

    def fingerprint(self) -> str:
        """Sixteen hex digits of the titles and texts of all topics, before any split."""
        return hashlib.sha256(json.dumps(sorted(_topics().items())).encode()).hexdigest()[:16]

    def _text(self, split: str, seed: int) -> str:
        return "\n".join(_topics()[title] for title in self.topics(split, seed))

    def _tokens(self, split: str, seed: int) -> np.ndarray:
        text = self._text(split, seed)
        if self.tokenizer not in OWN:
            return encode(self.tokenizer, text, self.vocab_size)
        if self.tokenizer == BYTE:
            return np.frombuffer(text.encode(), dtype=np.uint8)
        return _encode(text, self._text("train", seed), self.vocab_size)


@cache
def _topics() -> dict[str, str]:
    """Text of every topic by title."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(f"this Python comes without its module pydoc_data.topics ({error})") from error
    return dict(topics)


@cache
def _families() -> list[list[str]]:
    """Titles of the topics that share text with each other, directly or through others; sorted throughout."""
    parent = {title: title for title in _topics()}

    def root(title: str) -> str:
        while parent[title] != title:
            title = parent[title]
        return title

    first_with: dict[tuple[str, ...], str] = {}
    for title, text in sorted(_topics().items()):
        words = text.split()
        for start in range(len(words) - NUM_SHARED_WORDS + 1):
            other = first_with.setdefault(tuple(words[start : start + NUM_SHARED_WORDS]), title)
            parent[root(title)] = root(other)
    families: dict[str, list[str]] = {}
    for title in sorted(parent):
        families.setdefault(root(title), []).append(title)
    return sorted(families.values())


@cache
def _split(seed: int, val_fraction: float, test_fraction: float) -> dict[str, tuple[str, ...]]:
    """Sorted titles of `train`, `val` and `test`."""
    num_bytes = {title: len(text.encode()) for title, text in _topics().items()}
    room = {"test": test_fraction, "val": val_fraction, "train": 1.0}
    room = {split: fraction * sum(num_bytes.values()) for split, fraction in room.items()}
    chosen: dict[str, list[str]] = {split: [] for split in room}
    families = _families()
    for index in np.random.default_rng(seed).permutation(len(families)):
        size = sum(num_bytes[title] for title in families[index])
        split = next(split for split in room if size <= room[split])
        chosen[split] += families[index]
        room[split] -= size
    return {split: tuple(sorted(titles)) for split, titles in chosen.items()}


@cache
def _bpe(text: str, vocab_size: int) -> "Tokenizer":
    """Byte-level byte-pair encoding learned from a text; the same for the same text.

    Raises:
        ValueError: if the text has too few different pairs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that no text is unknown
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(f"vocab_size {vocab_size}: the training text has only {tokenizer.get_vocab_size()} tokens")
    return tokenizer


@cache
def _encode(text: str, train_text: str, vocab_size: int) -> np.ndarray:
    return np.array(_bpe(train_text, vocab_size).encode(text).ids, dtype=np.int32)
