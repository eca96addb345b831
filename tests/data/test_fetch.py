import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from permlab.data import fetch as fetching
from permlab.data.fetch import Unavailable, fetch
from permlab.data.source import Source
from permlab.errors import RunError

CONTENT = {"images.gz": b"pixels", "labels.gz": b"numbers"}
HASHES = {name: (hashlib.sha256(content).hexdigest(),) for name, content in CONTENT.items()}
PLACE = "usr/share/datasets/mine"
SOURCE = Source(
    "mine", "", "1 kB", "MIT", "two files of example.org", ("dataset-mine", PLACE), torchvision="Mine", hashes=HASHES
)
Way = Callable[[Source, Path], Path]


def write(folder: Path, content: dict[str, bytes] = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in content.items():
        (folder / name).write_bytes(part)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included, and empty folders as None."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return found | {str(p.relative_to(folder)): None for p in folder.rglob("*") if p.is_dir() and not any(p.iterdir())}


@pytest.fixture(autouse=True)
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing is installed, and no way leads out of it."""
    monkeypatch.setattr(fetching, "SYSTEM", tmp_path / "system")

    def nothing(command: list[str], folder: Path) -> None:
        raise Unavailable("Unable to locate package dataset-mine")

    monkeypatch.setattr(fetching, "call", nothing)
    only(monkeypatch, _installed=fetching._installed, _debian=fetching._debian)
    return tmp_path / "system"


def only(monkeypatch: pytest.MonkeyPatch, **ways: Way) -> None:
    monkeypatch.setattr(fetching, "WAYS", {name.lstrip("_"): way for name, way in ways.items()})


def test_what_a_package_has_installed_is_copied(system: Path, tmp_path: Path) -> None:
    write(system / PLACE)
    assert fetch(SOURCE, tmp_path / "data" / "mine") == "installed"
    assert tree(tmp_path / "data") == {f"mine/{name}": content for name, content in CONTENT.items()}
    assert fetch(SOURCE, tmp_path / "data" / "mine") == "already here"


def test_a_package_is_downloaded_and_unpacked_but_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def call(command: list[str], folder: Path) -> None:
        called.append([word for word in command if not word.startswith("--option")])
        if command[0] == "apt-get":
            (folder / "dataset-mine_1_all.deb").write_bytes(b"package")
        else:
            write(folder / "unpacked" / PLACE)

    monkeypatch.setattr(fetching, "call", call)
    assert fetch(SOURCE, tmp_path / "data" / "mine") == "debian"
    assert called == [
        ["apt-get", "download", "dataset-mine"],
        ["dpkg-deb", "--extract", "dataset-mine_1_all.deb", "unpacked"],
    ]
    assert tree(tmp_path / "data") == {f"mine/{name}": content for name, content in CONTENT.items()}


def test_torchvision_downloads_what_debian_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(root: str, download: bool) -> None:
        assert download
        write(Path(root, "Mine", "raw"), {**CONTENT, "images": b"unpacked"})

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(Mine=download)))
    only(monkeypatch, _debian=fetching._debian, _torchvision=fetching._torchvision)
    assert fetch(SOURCE, tmp_path / "data" / "mine") == "torchvision"
    assert tree(tmp_path / "data") == {f"mine/{name}": content for name, content in CONTENT.items()}


def test_without_a_way_one_line_says_what_to_get_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(root: str, download: bool) -> None:
        raise RuntimeError("Error downloading images.gz:\nTried http://x, got:\n<urlopen error no route>\n")

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(Mine=unreachable)))
    only(monkeypatch, _installed=fetching._installed, _debian=fetching._debian, _torchvision=fetching._torchvision)
    root = tmp_path / "data" / "mine"
    with pytest.raises(RunError) as caught:
        fetch(SOURCE, root)
    assert str(caught.value) == (
        f"mine: cannot be fetched (installed: no folder {tmp_path}/system/{PLACE}; debian: Unable to locate package "
        "dataset-mine; torchvision: <urlopen error no route>). Get it: two files of example.org. "
        f"Put images.gz, labels.gz into {root}"
    )
    assert not (tmp_path / "data").exists()


def test_without_hashes_nothing_is_tried(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"mine: is not fetched from here\. Get it: a disk\. Put it into .*data"):
        fetch(Source("mine", "", "1 GB", "none", "a disk"), tmp_path / "data")


def test_a_wrong_file_is_not_taken_and_the_next_way_is_tried(
    system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(system / PLACE, CONTENT | {"labels.gz": b"numb"})
    with pytest.raises(RunError, match=r"installed: labels\.gz: is not the file that was published"):
        fetch(SOURCE, tmp_path / "data" / "mine")
    assert not (tmp_path / "data").exists()
    only(monkeypatch, _installed=fetching._installed, _other=lambda source, stage: write(stage))
    assert fetch(SOURCE, tmp_path / "data" / "mine") == "other"


def test_a_damaged_copy_is_replaced_and_other_files_stay(system: Path, tmp_path: Path) -> None:
    write(system / PLACE)
    root = write(tmp_path / "mine", {"images.gz": b"pix", "notes.txt": b"mine"})
    fetch(SOURCE, root)
    assert tree(root) == {**CONTENT, "notes.txt": b"mine"}


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), ValueError("a bug")]
)
def test_an_interrupted_fetch_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def half(source: Source, stage: Path) -> Path:
        write(stage, {"images.gz": b"pixels"})
        raise stop

    only(monkeypatch, _half=half)
    with pytest.raises(RunError if isinstance(stop, OSError) else type(stop)):
        fetch(SOURCE, tmp_path / "data" / "mine")
    assert not (tmp_path / "data").exists()


def test_what_a_killed_fetch_has_left_is_thrown_away(system: Path, tmp_path: Path) -> None:
    write(tmp_path / "data" / ".mine.part" / "1", {"images.gz": b"pix"})
    write(system / PLACE)
    fetch(SOURCE, tmp_path / "data" / "mine")
    assert tree(tmp_path / "data") == {f"mine/{name}": content for name, content in CONTENT.items()}


def test_too_little_room_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    only(monkeypatch, _never=lambda source, stage: pytest.fail("is not tried"))
    with pytest.raises(RunError, match=r"mine: not enough room in .*data for 1 kB"):
        fetch(SOURCE, tmp_path / "data" / "mine")
    assert not (tmp_path / "data").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(RunError, match=r"mine: cannot write .*data: (Not a directory|File exists)"):
        fetch(SOURCE, tmp_path / "data" / "mine")


def test_two_fetches_do_not_meet(system: Path, tmp_path: Path) -> None:
    write(system / PLACE)
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(RunError, match="another process is fetching into"):
        fetch(SOURCE, tmp_path / "mine")
    os.close(lock)
    fetch(SOURCE, tmp_path / "mine")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["sh", "-c", "echo first >&2; echo 'E: no such package.' >&2; exit 100"], "no such package"),
        (["false"], "failed without a word"),
        (["no-such-command-anywhere"], "there is no no-such-command-anywhere here"),
    ],
)
def test_a_command_that_fails_says_why(tmp_path: Path, command: list[str], reason: str, system: Any) -> None:
    with pytest.raises(Unavailable, match=f"^{reason}$"):
        CALL(command, tmp_path)


CALL = fetching.call
