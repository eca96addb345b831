import gzip
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from permlab.config.build import build
from permlab.config.compose import resolve_train
from permlab.data.hub_text import HubText
from permlab.data.loader import data_errors
from permlab.errors import ConfigError

SPLITS = ("train", "val", "test")
DOCUMENTS = {
    "train": ["The naïve café — one.", "", "Two\nlines\r\nand a tab\t."] * 10,
    "val": ["Some other words, somewhat fewer."] * 9,
    "test": ["日本語 and English in one line"] * 8,
}
NOWHERE = "/nowhere/at/all"


def make(root: Path | str, **options) -> HubText:
    defaults = {
        "root": str(root),
        "repository": "someone/something",
        "subset": "some-subset",
        "revision": "abc123",
        "train_file": None,
        "val_file": None,
        "test_file": None,
        "streaming": False,
        "num_documents": None,
        "separator": "\n\n",
        "tokenizer": "byte",
        "vocab_size": None,
        "sequence_length": 16,
    }
    return HubText(**defaults | options)


def write(root: Path, extension: str = ".jsonl", splits: tuple[str, ...] = SPLITS) -> Path:
    """The documents in files; in a .txt they are joined as in a sample's text."""
    for split, documents in ((split, DOCUMENTS[split]) for split in splits):
        lines = "".join(json.dumps({"url": "x", "text": document}) + "\n" for document in documents)
        content = ("\n\n".join(documents) if extension == ".txt" else lines).encode()
        content = gzip.compress(content) if extension.endswith(".gz") else content
        (root / f"{split}{extension}").write_bytes(content)
    return root


def make_files(root: Path) -> dict[str, Any]:
    """What the battery of every data set reads, a split in each format; settings that go with it."""
    for split, extension in zip(SPLITS, (".jsonl.gz", ".jsonl", ".txt"), strict=True):
        write(root, extension, (split,))
    return {"sequence_length": 16}


def tokens_of(dataset) -> list[int]:
    inputs, targets = dataset.__getitems__(range(len(dataset)))
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    return np.concatenate([inputs.numpy(), targets.numpy()[:, -1:]], axis=1).ravel().tolist()


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets` that serves DOCUMENTS and remembers what it was asked for."""
    calls = []

    def load_dataset(path, name=None, *, data_files, split, revision, streaming):
        calls.append({"path": path, "name": name, "data_files": data_files, "split": split} | {"revision": revision})
        rows = [{"text": document} for document in DOCUMENTS["val" if split == "validation" else split]]
        if not streaming:
            return rows

        def stream():
            for row in rows:
                calls.append(row)
                yield row

        return stream()

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    module.calls = calls
    yield module
    clear()


def clear() -> None:
    from permlab.data import hub_text

    hub_text._read_hub.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer's folder: byte pairs learned from the documents, with a token for the beginning of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator([document for documents in DOCUMENTS.values() for document in documents], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


# Local files


def test_shape_is_known_before_torch_is_imported(tmp_path: Path, folder: Path) -> None:
    write(tmp_path)
    code = (
        "import sys; from permlab.data.hub_text import HubText;"
        f"[print(HubText(root={str(tmp_path)!r}, repository='a/b', subset=None, revision=None, train_file=None,"
        "val_file=None, test_file=None, streaming=False, num_documents=None, separator='', vocab_size=None,"
        f"tokenizer=name, sequence_length=32).spec()) for name in ('byte', {str(folder)!r})];"
        "assert not {'torch', 'tokenizers', 'transformers', 'datasets'} & set(sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    num_tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    assert "kind='text', num_classes=256, channels=1, height=1, width=32, patch_size=1" in output
    assert f"num_classes={num_tokens}, channels=1, height=1, width=32" in output


@pytest.mark.parametrize("extension", [".txt", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("split", SPLITS)
def test_bytes_are_those_of_the_documents(tmp_path: Path, extension: str, split: str) -> None:
    data = make(write(tmp_path, extension))
    expected = "\n\n".join(DOCUMENTS[split]).encode()
    seen = bytes(tokens_of(data.dataset(split, 0)))
    assert expected.startswith(seen)
    assert len(expected) - len(seen) < 17
    assert tokens_of(data.dataset(split, 1)) == tokens_of(data.dataset(split, 0))


def test_splits_may_differ_in_format_and_lines_may_be_blank(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"abcd")
    (tmp_path / "val.jsonl").write_bytes(b'\n{"text": "ab"}\n\n  \n{"text": "cd"}')
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abcd"}'))
    data = make(tmp_path, separator="", sequence_length=3)
    assert data.spec().width == 3
    assert {bytes(tokens_of(data.dataset(split, 0))) for split in SPLITS} == {b"abcd"}


def test_number_of_documents_and_separator(tmp_path: Path) -> None:
    data = make(write(tmp_path), num_documents=2, separator="||", sequence_length=5)
    assert bytes(tokens_of(data.dataset("val", 0))).decode() == "||".join(DOCUMENTS["val"][:2])[: 11 * 6]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    data = make(write(tmp_path, ".txt"), sequence_length=3)
    before = tokens_of(data.dataset("val", 0))
    (tmp_path / "val.txt").write_bytes(b"another text")
    assert bytes(tokens_of(data.dataset("val", 0))) == b"another text"
    assert before != tokens_of(data.dataset("val", 0))


def test_local_files_take_precedence_over_the_hub(tmp_path: Path, hub) -> None:
    make(write(tmp_path)).dataset("train", 0)
    assert hub.calls == []


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    lone = json.dumps({"text": "\ud800" * 40}).encode()
    cases = [
        (".txt", b"caf\xe9 " * 40, r"'utf-8' codec can't decode byte 0xe9"),
        (".txt", b"too short", "9 tokens are less than the 17"),
        (".jsonl", b'{"text": "one"}\n{"text": caf\xe9}\n', r"line 2: 'utf-8' codec"),
        (".jsonl", b'{"text": "one"}\n\nnot JSON\n', "line 3: Expecting value"),
        (".jsonl", b'{"text": "one"}\n{"content": "two"}\n', "line 2: no field text"),
        (".jsonl", b'{"text": 1}\n', "line 1: no field text"),
        (".jsonl", b'["text"]\n', "line 1: no field text"),
        (".jsonl", lone, "half a character"),
        (".jsonl", b"\n\n", "0 tokens"),
        (".jsonl.gz", b'{"text": "one"}\n', "cannot be read"),
        (".jsonl.gz", gzip.compress(np.random.default_rng(0).bytes(500))[:300], "cannot be read"),
    ]
    for extension, content, message in cases:
        path = tmp_path / f"train{extension}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"train{extension}: .*{message}") as caught:
            make(tmp_path).dataset("train", 0)
        assert "\n" not in str(caught.value)
        path.unlink()


def test_files_that_are_missing_empty_or_twofold_are_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train: no such file; expected one ending in \.txt, \.jsonl, \.jsonl\.gz"):
        make(tmp_path).spec()
    write(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="test: no such file"):
        make(tmp_path).spec()
    (tmp_path / "test.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test\.txt: is empty"):
        make(tmp_path).spec()
    write(tmp_path, ".txt")
    with pytest.raises(ValueError, match=r"train\.txt: there is also train\.jsonl"):
        make(tmp_path).spec()


# Tokenizers and vocabulary


def test_a_folder_of_a_tokenizer(tmp_path: Path, folder: Path) -> None:
    data = make(write(tmp_path), tokenizer=str(folder), sequence_length=8)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for split in SPLITS:
        expected = "\n\n".join(DOCUMENTS[split])
        tokens = tokens_of(data.dataset(split, 0))
        assert tokens == tokenizer.encode(expected).ids[: len(tokens)]
        assert tokens[0] == 0  # the beginning of the text, once
        assert 0 not in tokens[1:]
        # The last window may end inside a character.
        assert expected.startswith(tokenizer.decode(tokens).rstrip("\ufffd"))
        assert max(tokens) < data.spec().num_classes


@pytest.mark.parametrize(
    ("model", "added", "config", "expected"),
    [
        ({"vocab": {"a": 0, "b": 1, "c": 2}}, [], None, 3),
        ({"vocab": {"a": 0, "b": 7}}, [], None, 8),
        ({"vocab": [["a", 0.0], ["b", -1.0]]}, [], None, 2),
        ({"vocab": {"a": 0, "b": 1}}, [{"id": 5, "content": "<s>"}, {"id": 1, "content": "b"}], None, 6),
        ({"vocab": {"a": 0, "b": 1}}, [], {"vocab_size": 64}, 64),
        ({"vocab": {"a": 0, "b": 99}}, [], {"vocab_size": 64}, 100),
        ({"vocab": {"a": 0, "b": 1}}, [], {"hidden_size": 8}, 2),
    ],
)
def test_vocabulary_is_read_from_the_files(tmp_path: Path, model, added, config, expected: int) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert make(tmp_path, tokenizer=str(tmp_path)).vocab_size == expected
    assert make(tmp_path, tokenizer=str(tmp_path), vocab_size=expected + 3).vocab_size == expected + 3
    with pytest.raises(ValueError, match=f"vocab_size {expected - 1}: tokenizer .* has {expected} tokens"):
        make(tmp_path, tokenizer=str(tmp_path), vocab_size=expected - 1)


def test_vocabulary_that_cannot_be_read_has_to_be_given(tmp_path: Path) -> None:
    for name in ("meta-llama/Llama-3.2-1B", "gpt2", str(tmp_path)):
        with pytest.raises(ValueError, match=f"tokenizer {name}: its vocabulary cannot be read beforehand; set vocab_"):
            make(tmp_path, tokenizer=name)
        assert make(tmp_path, tokenizer=name, vocab_size=128256).vocab_size == 128256
    with pytest.raises(ValueError, match="vocab_size 255: tokenizer byte has 256 tokens"):
        make(tmp_path, vocab_size=255)
    assert make(write(tmp_path), vocab_size=300).spec().num_classes == 300


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model": {"vocab": {}}}', '{"model": {"vocab": {"a": "b"}}}']
)
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"tokenizer {tmp_path}: tokenizer.json cannot be read"):
        make(tmp_path, tokenizer=str(tmp_path))


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("/nowhere/tokenizer", "a/b/c", "some name", "./tokenizer"):
        with pytest.raises(ValueError, match=f"tokenizer {name}: no such folder, and no name on the hub"):
            make(tmp_path, tokenizer=name)
    (tmp_path / "empty").mkdir()
    for name in ("nobody/nothing-of-the-kind", str(tmp_path / "empty")):
        with pytest.raises(ValueError, match=f"tokenizer {name}: cannot be loaded") as caught:
            make(write(tmp_path), tokenizer=name, vocab_size=9).dataset("val", 0)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_tokenizer_with_more_tokens_than_were_said_is_named(tmp_path: Path, folder: Path) -> None:
    """What no file tells beforehand: here the folder's file is taken away until the vocabulary was settled."""
    hidden = tmp_path / "tokenizer"
    hidden.mkdir()
    data = make(write(tmp_path), tokenizer=str(hidden), vocab_size=10)
    (hidden / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=r"tokenizer .*: gave token \d+, vocab_size is 10"):
        data.dataset("val", 0)


# The hub


def test_a_dataset_with_splits(hub) -> None:
    data = make(NOWHERE)
    assert data.spec().num_classes == 256
    for split in SPLITS:
        expected = "\n\n".join(DOCUMENTS[split]).encode()
        assert expected.startswith(bytes(tokens_of(data.dataset(split, 0))))
    asked = {"path": "someone/something", "name": "some-subset", "data_files": None, "revision": "abc123"}
    assert hub.calls == [asked | {"split": name} for name in ("train", "validation", "test")]
    data.dataset("test", 0)
    assert len(hub.calls) == 3  # not fetched again


def test_a_dataset_of_files_is_streamed_no_further_than_needed(hub) -> None:
    data = make(NOWHERE, streaming=True, num_documents=4, val_file="en/some.json.gz", subset=None, revision=None)
    seen = bytes(tokens_of(data.dataset("val", 0))).decode()
    assert "\n\n".join(DOCUMENTS["val"][:4]).startswith(seen)
    assert len(seen) > len("\n\n".join(DOCUMENTS["val"][:3]))
    call, *rows = hub.calls
    assert call["data_files"] == {"validation": "en/some.json.gz"}
    assert call["split"] == "validation"
    assert rows == [{"text": document} for document in DOCUMENTS["val"][:4]]


def test_every_option_of_the_hub_reaches_it(hub) -> None:
    """A second instance with another value asks again; none is taken for the other."""
    base = {"num_documents": 5}
    changes = [{}, {"repository": "a/b"}, {"subset": "c"}, {"revision": "d"}, {"train_file": "e"}, {"num_documents": 6}]
    for change in changes:
        make(NOWHERE, **base | change).dataset("train", 0)
    assert len(hub.calls) == len(changes)
    assert len({json.dumps(call) for call in hub.calls}) == len(changes) - 1  # the number is not the hub's matter


def test_failures_of_the_hub_are_named_on_one_line(hub, monkeypatch) -> None:
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub\n\nCheck your connection\n" + "and so on " * 100)

    monkeypatch.setattr(hub, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="someone/something test, as there is no folder /nowhere/at/all") as caught:
        make(NOWHERE).dataset("test", 0)
    assert "\n" not in str(caught.value)
    assert "Couldn't reach the Hub Check" in str(caught.value)
    assert len(str(caught.value)) < 400
    for rows, message in (
        ([{"content": "x"}], "KeyError|'text'"),
        ([{"text": 3}], "does not hold text"),
        ([], "0 tokens are less than the 17"),
    ):
        monkeypatch.setattr(hub, "load_dataset", lambda *arguments, rows=rows, **options: rows)
        with pytest.raises(ValueError, match=f"someone/something test.*({message})"):
            make(NOWHERE).dataset("test", 0)


def test_the_missing_package_is_named_before_anything_is_loaded(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"/nowhere/at/all: no such folder, .* package datasets \(extra llm\)"):
        make(NOWHERE).spec()
    with pytest.raises(ValueError, match="train, as there is no folder /nowhere/at/all: cannot be loaded"):
        make(NOWHERE).dataset("train", 0)


# The configuration


def settings(*words: str) -> dict:
    return dict(resolve_train(["task=lm", "model=llama_nano", *words])[0].config["data"])


def test_files_of_the_configuration_compose(hub, tmp_path: Path) -> None:
    here = [f"paths.data={tmp_path}", "data.sequence_length=16"]
    wikitext = settings("data=wikitext2", *here)
    build("data", wikitext).dataset("val", 0)
    build("data", settings("data=c4", *here)).dataset("val", 0)
    first, second, *rows = hub.calls
    assert (first["path"], first["name"], first["data_files"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1", None)
    assert (second["path"], second["name"]) == ("allenai/c4", None)
    assert second["data_files"] == {"validation": "en/c4-validation.00001-of-00008.json.gz"}
    assert len(rows) == len(DOCUMENTS["val"])  # streamed
    assert all(len(call["revision"]) == 40 for call in (first, second))
    write(tmp_path, ".txt")
    num_calls = len(hub.calls)
    assert build("data", settings("data=c4", f"data.root={tmp_path}", *here)).dataset("val", 0)
    assert len(hub.calls) == num_calls


def test_what_is_wrong_ends_a_run_with_one_line(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"data\.root=nowhere/wikitext2: .*package datasets"):
        settings("data=wikitext2", "paths.data=nowhere")
    with pytest.raises(ConfigError, match=r"data=wikitext2: tokenizer gpt2: .*set vocab_size"):
        settings("data=wikitext2", "data.tokenizer=gpt2")
    (write(tmp_path, ".txt") / "train.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"^data: .*train\.txt: cannot be read"), data_errors():
        make(tmp_path).dataset("train", 0)
