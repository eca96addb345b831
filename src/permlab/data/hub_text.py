"""Text from local files, or from the Hugging Face hub: WikiText-2, C4, or your own."""

import importlib.util
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from permlab.data.document import brief, join, local_file, read_documents
from permlab.data.spec import DataSpec, text_spec
from permlab.data.tokenizer import BYTE, encode, load_tokenizer, vocabulary
from permlab.option import Checkpoint, PositiveInt, Verbatim

if TYPE_CHECKING:
    from permlab.data.text import TokenWindows

SPLITS = ("train", "val", "test")
# What says which part of the hub is read.
HUB_OPTIONS = ("repository", "subset", "revision", "train_file", "val_file", "test_file", "streaming")


class HubText:
    """Documents joined to one text per split, encoded in one go and cut into samples.

    Where the folder `root` exists, its files `train`, `val` and `test` are read, each ending in
    `.txt` (one document), or `.jsonl` or `.jsonl.gz` (a document per line, in its field `text`);
    all are UTF-8. Otherwise the documents are the field `text` of the rows of a dataset on the
    hub, which needs the package `datasets`. The seed has no say.

    The tokenizer adds its special tokens once per split, as it does to any text.

    The vocabulary has to be known before anything slow is imported. It is 256 for bytes; for a
    local folder it is read from `tokenizer.json` and, in a model's folder, from `config.json`,
    whose embedding may be padded; a tokenizer on the hub needs `vocab_size`.

    Args:
        root: folder of local files, which takes precedence.
        repository: dataset on the hub, such as `Salesforce/wikitext`.
        subset: its configuration, such as `wikitext-2-raw-v1`; null for a dataset of one.
        revision: commit, tag or branch of the dataset; null for the newest, which may change.
        train_file, val_file, test_file: the one file of the dataset that makes up the split; null
            for the dataset's own split (`val` is its `validation`).
        streaming: fetch documents as they are read, instead of downloading the dataset first.
        num_documents: read no more than this many per split; null for all. Without effect on `.txt`.
        separator: text between two documents.
        tokenizer: `byte`, a local folder, or a name on the hub for `transformers.AutoTokenizer`; null for that of
            the checkpoint that the model starts from, or `byte` without one.
        vocab_size: number of tokens, at least the tokenizer's own; null where it can be read.
        sequence_length: tokens per sample; how well the next one is predicted depends on it.
        on_corrupt: at a line of a local `.jsonl` that holds no document, `stop`, or `skip` it and count it.
            Without effect on `.txt`, which is one document, and on the hub.
    Raises:
        ValueError: naming the tokenizer, if its folder or vocabulary cannot be found, or
            `vocab_size` is too small for it.
    Source: WikiText-2: Merity et al. 2016, arXiv:1609.07843. C4: Raffel et al. 2020, arXiv:1910.10683.
    Differs from source: a window has sequence_length + 1 tokens and as many predictions as
        sequence_length; papers that report on these texts usually predict one less from windows of sequence_length.
    """

    kind: ClassVar[str] = "text"
    known_by_place: ClassVar[bool] = True

    def __init__(
        self,
        *,
        root: Verbatim,
        repository: str,
        subset: str | None,
        revision: str | None,
        train_file: str | None,
        val_file: str | None,
        test_file: str | None,
        streaming: bool,
        num_documents: PositiveInt | None,
        separator: str,
        tokenizer: Checkpoint | None,
        vocab_size: PositiveInt | None,
        sequence_length: PositiveInt,
        on_corrupt: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.root, self.repository, self.subset, self.revision = Path(root), repository, subset, revision
        self.files = {"train": train_file, "val": val_file, "test": test_file}
        self.streaming, self.num_documents, self.separator = streaming, num_documents, separator
        self.tokenizer, self.sequence_length = tokenizer or BYTE, sequence_length
        self.on_corrupt = on_corrupt
        self._skipped: dict[str, int] = {}
        self.vocab_size = vocabulary(self.tokenizer, vocab_size)

    @property
    def num_skipped(self) -> int:
        """Lines left out of the splits that were asked for."""
        return sum(self._skipped.values())

    def complete(self) -> dict[str, Any]:
        """What options that were left null stand for."""
        return {"tokenizer": self.tokenizer}

    def idle(self) -> Iterator[tuple[str, str]]:
        """Options without effect, with the reason."""
        if not self.root.is_dir():
            yield "on_corrupt", "text from the hub"
            return
        for option in HUB_OPTIONS:
            yield option, f"the folder {self.root}"
        if all((self.root / f"{split}.txt").is_file() for split in SPLITS):
            for option in ("on_corrupt", "num_documents", "separator"):
                yield option, "text in .txt files"

    def spec(self) -> DataSpec:
        """Vocabulary and length of a sample, once the local files, or else the package for the hub, are there.

        Raises:
            ValueError: naming the file that is missing or empty, or the missing package.
        """
        if self.root.is_dir():
            for split in SPLITS:
                local_file(self.root, split)
        elif sys.modules.get("datasets") is None and importlib.util.find_spec("datasets") is None:
            raise ValueError(
                f"{self.root}: no such folder, and without the package datasets (extra llm) "
                f"{self.repository} cannot be loaded from the hub"
            )
        return text_spec(self.vocab_size, self.sequence_length)

    def dataset(self, split: str, seed: int) -> "TokenWindows":
        """Token windows of `train`, `val` or `test`; the seed has no say.

        Raises:
            ValueError: naming what was read, if it cannot be, or is shorter than one sample; naming
                the tokenizer, if it cannot be loaded or has more tokens than `vocab_size`.
        """
        from permlab.data.text import TokenWindows

        where, documents = self._documents(split)
        tokens = encode(self.tokenizer, join(documents, self.separator, where), self.vocab_size)
        return TokenWindows(tokens, sequence_length=self.sequence_length, where=where)

    def load_tokenizer(self, seed: int) -> Any:
        """What gave the tokens, as transformers' own; the seed has no say.

        Raises:
            ValueError: naming the tokenizer, if it cannot be loaded.
        """
        return load_tokenizer(self.tokenizer, sequence_length=self.sequence_length)

    def _documents(self, split: str) -> tuple[str, Iterable[str]]:
        """A split's documents, and what to call the place they come from."""
        if self.root.is_dir():
            path = local_file(self.root, split)
            return str(path), self._read_local(path, split)
        where = f"{self.repository} {self.files[split] or split}, as there is no folder {self.root}"
        name = "validation" if split == "val" else split
        arguments = (self.repository, self.subset, self.revision, name, self.files[split])
        return where, _read_hub(where, *arguments, self.streaming, self.num_documents)

    def _read_local(self, path: Path, split: str) -> list[str]:
        bad: list[str] = []
        documents = read_documents(path, self.num_documents, bad if self.on_corrupt == "skip" else None)
        self._skipped[split] = len(bad)
        if bad:
            warnings.warn(
                f"data.on_corrupt=skip: {len(bad)} lines of {path} left out; the first: {bad[0]}", stacklevel=2
            )
        return documents


@lru_cache(maxsize=len(SPLITS))
def _read_hub(
    where: str,
    repository: str,
    subset: str | None,
    revision: str | None,
    split: str,
    file: str | None,
    streaming: bool,
    num_documents: int | None,
) -> list[str]:
    """The first documents of a split on the hub; kept, as fetching them again is slow."""
    data_files = {split: file} if file else None
    try:
        import datasets

        rows = datasets.load_dataset(
            repository, subset, data_files=data_files, split=split, revision=revision, streaming=streaming
        )
        documents = [row["text"] for row in islice(rows, num_documents)]
    except Exception as error:  # the package passes on whatever its many dependencies raise
        raise ValueError(f"{where}: cannot be loaded from the hub ({brief(error)})") from error
    if not all(isinstance(document, str) for document in documents):
        raise ValueError(f"{where}: its field text does not hold text")
    return documents
