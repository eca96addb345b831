"""Documents in local files: a `.txt` is one, a `.jsonl` has one per line."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

EXTENSIONS = (".txt", ".jsonl", ".jsonl.gz")


def local_file(root: Path, split: str) -> Path:
    """The one file of a split, `root/<split>` with one of the extensions.

    Raises:
        ValueError: if there is none, more than one, or it is empty.
    """
    found = [path for path in (root / f"{split}{extension}" for extension in EXTENSIONS) if path.is_file()]
    if not found:
        raise ValueError(f"{root / split}: no such file; expected one ending in {', '.join(EXTENSIONS)}")
    if len(found) > 1:
        raise ValueError(f"{found[0]}: there is also {found[1].name}; only one file per split is read")
    if found[0].stat().st_size == 0:
        raise ValueError(f"{found[0]}: is empty")
    return found[0]


def read_documents(path: Path, num_documents: int | None, bad: list[str] | None) -> list[str]:
    """Documents of a file.

    Args:
        num_documents: read no more than this many lines; None for all.
        bad: what is wrong with a line goes there; None to raise it.
    Raises:
        ValueError: naming the file.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            if path.suffix == ".txt":
                return [file.read().decode()]
            return list(islice(_json_lines(file, bad), num_documents))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({brief(error)})") from error


def join(documents: Iterable[str], separator: str, where: str) -> str:
    """One text of all documents.

    Raises:
        ValueError: naming `where`, if there is half a character, which JSON can hold and UTF-8 cannot.
    """
    text = separator.join(documents)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: holds half a character ({error.reason} at {error.start})") from error
    return text


def brief(error: Exception) -> str:
    """The message of an error on one line, without a library's page of advice."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _json_lines(file: Iterable[bytes], bad: list[str] | None) -> Iterator[str]:
    """The field `text` of every line that is not blank."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield _document(line)
        except ValueError as error:
            problem = f"line {number}: {brief(error)}"
            if bad is None:
                raise ValueError(problem) from error
            bad.append(problem)


def _document(line: bytes) -> str:
    document = json.loads(line.decode())
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise ValueError("no field text that holds text")
    return document["text"]
