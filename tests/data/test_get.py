"""The command `python -m permlab.data`."""

import hashlib
import struct
from pathlib import Path

import pytest

from permlab.config.schema import component_names
from permlab.data import __main__ as door
from permlab.data import fetch as fetching


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = door.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_every_data_set_is_listed_with_whether_it_is_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "get", "--list", f"paths.data={tmp_path}")
    assert (code, err) == (0, "")
    head, *rows = [line.split() for line in out.splitlines()]
    assert head[:4] == ["data=", "here", "size", "licence"]
    assert {row[0]: row[1] for row in rows} == {
        name: "yes" if name in ("digits", "shuffled_digits", "pydocs") else "no" for name in component_names("data")
    }
    assert call(capsys, "list", f"paths.data={tmp_path}")[1] == out


def test_what_comes_with_a_package_is_already_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "get", "digits") == (0, "digits: already here, installs with scikit-learn\n", "")
    code, out, _ = call(capsys, "check", "digits")
    assert (code, out) == (0, "digits: is read as 10 classes, 1x8x8 pixels; no hashes are known to compare\n")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """KMNIST whose files are small, installed on this machine under a name of its own."""
    folder = tmp_path / "system" / "small"
    folder.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 10)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4B3I", 0, 0, 8, 3, count, 4, 4) + bytes(16 * count)
        )
        labels = bytes(number % 2 for number in range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels)
    hashes = {path.name: (hashlib.sha256(path.read_bytes()).hexdigest(),) for path in folder.iterdir()}
    read = door.read_source

    def small(path: Path):
        found = read(path)
        return type(found)(path.stem, "", "1 kB", "MIT", "elsewhere", debian=("package", "small"), hashes=hashes)

    monkeypatch.setattr(door, "read_source", small)
    monkeypatch.setattr(door, "read_settings", lambda *given: read_settings(*given) | {"num_val": 10, "patch_size": 2})
    monkeypatch.setattr(fetching, "SYSTEM", tmp_path / "system")
    return folder


read_settings = door.read_settings


def test_a_data_set_is_fetched_and_checked(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("kmnist", f"paths.data={tmp_path}/data")
    code, out, err = call(capsys, "get", *words)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == (
        f"kmnist: installed, {tmp_path}/data/kmnist (4 files, SHA-256 as published; licence: MIT)"
    )
    assert "already here" in call(capsys, "get", *words)[1]
    assert call(capsys, "check", *words)[1].startswith("kmnist: whole")
    assert call(capsys, "check", "kmnist", f"data.root={tmp_path}/data/kmnist")[0] == 0
    path = tmp_path / "data" / "kmnist" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = call(capsys, "check", *words)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: kmnist: {path}: is not the file that was published")
    assert err.count("\n") == 1
    assert call(capsys, "get", *words)[0] == 0
    assert call(capsys, "check", *words)[0] == 0


def test_what_cannot_be_fetched_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "get", "imagenet", f"paths.data={tmp_path}")
    assert (code, out) == (1, "")
    assert err.startswith("error: imagenet: is not fetched from here. Get it: https://image-net.org")
    assert err.endswith(f"Put it into {tmp_path}/imagenet\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fetch", "mnist"], "fetch: no such command; nearest valid choice: get"),
        (["get", "mnst"], "data=mnst: no such choice; nearest valid choice: mnist"),
        (["get"], "get: of which data set; valid choices: c4, cifar10"),
        (["get", "mnist", "path.data=x"], "path.data=x: unknown key; nearest valid choice: paths.data"),
        (["get", "mnist", "kmnist", "data.root=x"], "data.root=x: is the folder of one data set, and 2 are given"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_without_words_it_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys)[0] == 0
    assert "get fashion_mnist" in call(capsys, "--help")[1]


def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(door, "fetch", interrupt)
    assert call(capsys, "get", "mnist", "paths.data=/nowhere")[0] == 130
