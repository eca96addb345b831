import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from permlab.data.text_folder import LONG_PASSAGE, PASSAGE, TextFolder, passages

LENGTH = 16  # of a sample, whose window has one more
SPLITS = ("train", "val", "test")


def make(root: Path, **options: Any) -> TextFolder:
    defaults = {"separator": "\n\n", "tokenizer": "byte", "vocab_size": None, "sequence_length": LENGTH}
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2, "on_corrupt": "stop"}
    return TextFolder(root=str(root), **defaults | fractions | options)


def document(number: int, num_windows: int = 1) -> str:
    """Text that fills windows of LENGTH + 1 bytes."""
    return f"{number:03d} is a number. ".ljust(num_windows * (LENGTH + 1), "x")


def lines(numbers: range) -> bytes:
    return "".join(json.dumps({"text": document(number)}) + "\n" for number in numbers).encode()


def make_files(root: Path) -> dict[str, Any]:
    """What the battery of every data set reads; settings that go with it.

    Windows end where documents do, so that what is read without one of them is a part of the whole.
    """
    (root / "more").mkdir()
    (root / "a.jsonl").write_bytes(lines(range(11)))
    (root / "more" / "b.jsonl.gz").write_bytes(gzip.compress(lines(range(11, 30))))
    return {"sequence_length": LENGTH, "separator": "", "val_fraction": 0.3, "test_fraction": 0.3}


def text_of(data: TextFolder, split: str, seed: int = 0) -> str:
    dataset = data.dataset(split, seed)
    inputs, targets = dataset.__getitems__(range(len(dataset)))
    return bytes(np.concatenate([inputs.numpy(), targets.numpy()[:, -1:]], axis=1).ravel().tolist()).decode()


def documents_of(root: Path, split: str, seed: int = 0, **options: Any) -> list[int]:
    found = text_of(make(root, separator="", **options), split, seed)
    return [int(number) for number in re.findall(r"(\d+) is a number", found)]


def test_documents_are_divided_whole_and_by_seed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(range(40)))
    found = {split: documents_of(tmp_path, split) for split in SPLITS}
    assert [len(found[split]) for split in SPLITS] == [24, 8, 8]
    assert sorted(itertools.chain(*found.values())) == list(range(40))
    assert all(numbers == sorted(numbers) for numbers in found.values())
    assert documents_of(tmp_path, "val", 1) != found["val"]


@pytest.mark.parametrize("name", ["val.jsonl", "val/any.jsonl"])
def test_what_is_called_by_a_split_is_it_and_the_rest_is_drawn(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(range(20)))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(lines(range(90, 95)))
    data = make(tmp_path)
    assert documents_of(tmp_path, "val") == documents_of(tmp_path, "val", 1) == [90, 91, 92, 93, 94]
    found = {split: documents_of(tmp_path, split) for split in ("train", "test")}
    assert [len(found["train"]), len(found["test"])] == [16, 4]
    assert [option for option, _ in data.idle()] == ["val_fraction"]
    assert data.where("val") == str(tmp_path / name)
    assert data.where("test") == str(tmp_path / "a.jsonl")


def test_with_a_file_for_every_split_the_texts_are_read_as_they_are(tmp_path: Path) -> None:
    texts = {split: f"{split} text\n\n\n\nwith gaps, " * 200 for split in SPLITS}
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_text(text)
    for split in SPLITS:
        found = text_of(make(tmp_path), split)
        assert texts[split].startswith(found)
        assert len(texts[split]) - len(found) <= LENGTH
    assert [option for option, _ in make(tmp_path).idle()] == ["test_fraction", "val_fraction", "on_corrupt"]


def test_a_single_text_is_divided_into_passages(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}: " + "some words of it, " * 60 for number in range(60)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = {split: text_of(make(tmp_path), split) for split in SPLITS}
    seen = {split: [p for p in paragraphs if p in found[split]] for split in SPLITS}
    assert 57 <= sum(map(len, seen.values())) <= 60  # the end of a split is cut off
    assert len(set().union(*seen.values())) == sum(map(len, seen.values()))
    total = sum(map(len, found.values()))
    assert 0.15 * total < len(found["val"]) <= 0.2 * total + LENGTH
    assert text_of(make(tmp_path), "test", 1) != found["test"]


def test_passages_keep_every_line_and_end_where_a_text_does() -> None:
    rng = np.random.default_rng(0)
    text = "".join(
        ("x" * size + "\n") if size else "\n" for size in rng.integers(0, 200, 2000) * (rng.random(2000) > 0.1)
    )
    found = passages(text)
    assert [line for p in found for line in p.split("\n") if line] == [line for line in text.split("\n") if line]
    assert all(len(passage) >= PASSAGE - 5 for passage in found[:-1])
    assert max(map(len, found)) < LONG_PASSAGE + 200


def test_documents_that_are_the_same_lie_in_one_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(range(12)) * 3)
    for seed in range(3):
        found = [set(documents_of(tmp_path, split, seed)) for split in SPLITS]
        assert sum(map(len, found)) == 12


def test_a_split_into_which_nothing_fits_has_the_shortest(tmp_path: Path) -> None:
    for number, size in enumerate((9, 2, 9, 1, 9)):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": document(number, size)}))
    found = {split: documents_of(tmp_path, split, test_fraction=0.01, val_fraction=0.01) for split in SPLITS}
    assert found == {"train": [0, 2, 4], "val": [1], "test": [3]}


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(range(20)))
    (tmp_path / ".cache").mkdir()
    for name in (".b.txt", ".cache/c.txt", "notes.md"):
        (tmp_path / name).write_text("")
    make(tmp_path).spec()  # which refuses an empty file
    found = [documents_of(tmp_path, split) for split in SPLITS]
    assert sorted(itertools.chain(*found)) == list(range(20))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no text to train on"),
        (["val.txt"], "holds no text to train on"),
        (["a.txt", "b/c.txt"], "c.txt: is empty"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "c" in name else "text")
    with pytest.raises(ValueError, match=message):
        make(tmp_path).spec()


def test_too_little_text_names_the_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words")
    with pytest.raises(ValueError, match=r"test split of .*a\.txt: 0 tokens are less than"):
        make(tmp_path).dataset("test", 0)


@pytest.mark.parametrize("option", ["val_fraction", "test_fraction"])
def test_a_part_that_cannot_be_is_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} 0.6"):
        make(tmp_path, **{option: 0.6})
