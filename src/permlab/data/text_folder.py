"""Text of your own: the files of a folder, divided by their names or by seed."""

import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from permlab.data.document import EXTENSIONS, join, read_documents
from permlab.data.spec import DataSpec, text_spec
from permlab.data.tokenizer import BYTE, encode, load_tokenizer, usual_batch, usual_length, vocabulary
from permlab.option import Checkpoint, Fraction, PositiveInt, Verbatim

if TYPE_CHECKING:
    from permlab.data.text import TokenWindows

# Characters: a passage ends at the first empty line after so many, or at the first line end after so many more.
PASSAGE, LONG_PASSAGE = 1000, 4000


class TextFolder:
    """Every `.txt`, `.jsonl` and `.jsonl.gz` in a folder and below it, UTF-8, in the order of their paths.

    A `.jsonl` has a document per line, in its field `text`; a `.txt` is one document. What is called
    `val` or `test`, a file or a folder right below `root`, is that split. Everything else is there to train on, and
    a split without a file of its own is taken from there: whole documents, of a `.txt` passages of a thousand
    characters or more, drawn by seed. Documents that are the same lie in one split.

    Documents and passages come in an order drawn from the seed; each goes to test where it fits into
    `test_fraction`, else to validation where it fits, else to training. So a fraction is an upper
    bound, except where nothing would fit: then the split has the shortest.

    Args:
        root: the folder.
        separator: text between two documents or passages.
        tokenizer: `byte`, a local folder, or a name on the hub for `transformers.AutoTokenizer`; null for that of
            the checkpoint that the model starts from, or `byte` without one.
        vocab_size: number of tokens, at least the tokenizer's own; null where it can be read.
        sequence_length: tokens per sample, on which depends how well the next one is predicted; null for 128 bytes,
            or 512 tokens of another tokenizer.
        val_fraction: part of the characters on which models are picked, where there are no files for it.
        test_fraction: part of the characters that is looked at once, at the end, where there are no files for it.
        on_corrupt: at a line of a `.jsonl` that holds no document, `stop`, or `skip` it and count it.
    Raises:
        ValueError: naming the tokenizer, if its folder or vocabulary cannot be found, or
            `vocab_size` is too small for it; if a fraction is not in (0, 0.5].
    """

    kind: ClassVar[str] = "text"
    leaves_open: ClassVar[tuple[str, ...]] = ("batch_size",)
    known_by_place: ClassVar[bool] = True

    def __init__(
        self,
        *,
        root: Verbatim,
        separator: str,
        tokenizer: Checkpoint | None,
        vocab_size: PositiveInt | None,
        sequence_length: PositiveInt | None,
        val_fraction: Fraction,
        test_fraction: Fraction,
        on_corrupt: Literal["stop", "skip"],
    ) -> None:
        for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < fraction <= 0.5:
                raise ValueError(f"{name} {fraction}: expected more than 0 and at most 0.5")
        self.root, self.separator, self.tokenizer = Path(root), separator, tokenizer or BYTE
        self.sequence_length, self.on_corrupt = sequence_length or usual_length(self.tokenizer), on_corrupt
        self.fractions = {"test": test_fraction, "val": val_fraction}
        self.vocab_size = vocabulary(self.tokenizer, vocab_size)
        self._skipped: dict[Path, int] = {}

    @property
    def num_skipped(self) -> int:
        """Lines left out of the files that were read."""
        return sum(self._skipped.values())

    def complete(self) -> dict[str, Any]:
        """What options that were left null stand for."""
        return {
            "tokenizer": self.tokenizer, "sequence_length": self.sequence_length,
            "batch_size": usual_batch(self.tokenizer),
        }  # fmt: skip

    def idle(self) -> Iterator[tuple[str, str]]:
        """Options without effect, with the reason."""
        files = self._files()
        for split in self.fractions:
            if files[split]:
                yield f"{split}_fraction", f"{files[split][0]}"
        if all(path.suffix == ".txt" for paths in files.values() for path in paths):
            yield "on_corrupt", "text in .txt files"

    def spec(self) -> DataSpec:
        """Vocabulary and length of a sample, once it is known that there is text.

        Raises:
            ValueError: naming the folder that is missing or has no text, or the file that is empty.
        """
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder")
        files = self._files()
        if not files["train"]:
            raise ValueError(
                f"{self.root}: holds no text to train on; expected files ending in {', '.join(EXTENSIONS)}"
            )
        for path in (path for paths in files.values() for path in paths):
            if path.stat().st_size == 0:
                raise ValueError(f"{path}: is empty")
        return text_spec(self.vocab_size, self.sequence_length)

    def dataset(self, split: str, seed: int) -> "TokenWindows":
        """Token windows of `train`, `val` or `test`.

        Raises:
            ValueError: naming the file that cannot be read, or the split that is shorter than one sample; naming
                the tokenizer, if it cannot be loaded or has more tokens than `vocab_size`.
        """
        from permlab.data.text import TokenWindows

        files = self._files()
        drawn = [name for name in self.fractions if not files[name]]
        if files[split] and (split != "train" or not drawn):
            documents = list(self._read(files[split], cut=False))
        else:
            documents = self._draw(self._read(files["train"], cut=True), drawn, seed)[split]
        where = f"{split} split of {self.where(split)}"
        tokens = encode(self.tokenizer, join(documents, self.separator, where), self.vocab_size)
        return TokenWindows(tokens, sequence_length=self.sequence_length, where=where)

    def load_tokenizer(self, seed: int) -> Any:
        """What gave the tokens, as transformers' own; the seed has no say.

        Raises:
            ValueError: naming the tokenizer, if it cannot be loaded.
        """
        return load_tokenizer(self.tokenizer, sequence_length=self.sequence_length)

    def where(self, split: str) -> str:
        """The only file of a split, or the folder, for messages."""
        files = self._files()
        paths = files[split] or files["train"]
        return str(paths[0]) if len(paths) == 1 else str(self.root)

    def _files(self) -> dict[str, list[Path]]:
        """Files by split; those of `val` and `test` may be none, which are then drawn from those of `train`."""
        files: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if name[0] != "."]
            for path in (Path(folder, name) for name in names if name.endswith(EXTENSIONS) and name[0] != "."):
                called = path.relative_to(self.root).parts[0].partition(".")[0]
                files[called if called in self.fractions else "train"].append(path)
        return {split: sorted(paths) for split, paths in files.items()}

    def _read(self, paths: list[Path], *, cut: bool) -> tuple[str, ...]:
        """Documents of files, each `.txt` whole or cut into passages."""
        versions = tuple((path, path.stat().st_mtime_ns) for path in paths)
        documents, bad = _read_files(versions, cut, self.on_corrupt == "skip")
        for path, problems in bad.items():
            self._skipped[path] = len(problems)
            message = f"{len(problems)} lines of {path} left out; the first: {problems[0]}"
            warnings.warn(f"data.on_corrupt=skip: {message}", stacklevel=2)
        return documents

    def _draw(self, documents: tuple[str, ...], splits: list[str], seed: int) -> dict[str, list[str]]:
        """Documents by split, in their own order."""
        places: dict[str, list[int]] = {}
        for place, document in enumerate(documents):
            places.setdefault(document, []).append(place)
        families = list(places.items())
        sizes = np.array([len(document) * len(same) for document, same in families])
        room = {split: self.fractions[split] * sizes.sum() for split in splits} | {"train": float("inf")}
        chosen: dict[str, list[int]] = {split: [] for split in room}
        for family in np.random.default_rng(seed).permutation(len(families)):
            split = next(split for split in room if sizes[family] <= room[split])
            chosen[split].append(family)
            room[split] -= sizes[family]
        for split in splits:
            if not chosen[split] and len(chosen["train"]) > 1:
                chosen[split] = [min(chosen["train"], key=lambda family: sizes[family])]
                chosen["train"].remove(chosen[split][0])
        order = {
            split: sorted(place for f in families_ for place in families[f][1]) for split, families_ in chosen.items()
        }
        return {split: [documents[place] for place in found] for split, found in order.items()}


@lru_cache(maxsize=3)
def _read_files(
    versions: tuple[tuple[Path, int], ...], cut: bool, skip: bool
) -> tuple[tuple[str, ...], dict[Path, list[str]]]:
    """Documents of files, and by file what was wrong with lines that were left out; kept for the other splits."""
    documents: list[str] = []
    left_out: dict[Path, list[str]] = {}
    for path, _ in versions:
        bad: list[str] = []
        found = read_documents(path, None, bad if skip else None)
        documents += passages(found[0]) if cut and path.suffix == ".txt" else found
        if bad:
            left_out[path] = bad
    return tuple(documents), left_out


def passages(text: str) -> list[str]:
    """Pieces of a text that end at an empty line, or in long paragraphs at the end of a line.

    Example:
        >>> paragraphs = ["word " * 300, "short.", "one more line.\\n" * 400]
        >>> [len(passage) for passage in passages("\\n\\n".join(paragraphs))]
        [1500, 4012, 1994]
    """
    found: list[list[str]] = [[]]
    size = 0
    for line in text.splitlines(keepends=True):
        found[-1].append(line)
        size += len(line)
        if size >= LONG_PASSAGE or (size >= PASSAGE and not line.strip()):
            found.append([])
            size = 0
    whole = ("".join(lines).strip("\r\n") for lines in found)
    return [passage for passage in whole if passage.strip()]
