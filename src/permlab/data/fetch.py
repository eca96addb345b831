"""Fetching what is published, whole or not at all: a data set from this machine, Debian's archive or torchvision.

Files are gathered in a folder of their own beside the one they are for, compared with their SHA-256, and only
then moved. What an interrupted fetch leaves is thrown away by the next one. Models are fetched so too
(`permlab.model.fetch`), from the hub or from packages.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from permlab.data.source import Source
from permlab.errors import RunError

SYSTEM = Path("/")
# Seconds: of silence on a connection, and for a package altogether.
SILENCE, PATIENCE = 30, 1800


class Unavailable(Exception):
    """One way of fetching does not lead there, for the reason that it says."""


def fetch(source: Source, root: Path) -> str:
    """Put the files of a data set into a folder, where they are not there already.

    Returns:
        Where they were found.
    Raises:
        RunError: in one line, with what to get and where to put it; nothing has been written then.
    """
    if source.hashes and source.problem(root) is None:
        return "already here"
    if not source.hashes:
        raise RunError(f"{source.name}: is not fetched from here. Get it: {source.origin}. Put it into {root}")
    with staging(source, root) as stage:
        way, folder = first_way(source, stage, {name: _whole(get) for name, get in WAYS.items()}, root)
        for name in source.hashes:
            root.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, root / name)
        return way


def first_way(source: Source, stage: Path, ways: "Mapping[str, Way]", root: Path) -> tuple[str, Path]:
    """The first way that leads to what is wanted, and the folder that holds it.

    Args:
        stage: an empty folder; each way has a folder of its own in it.
        root: where a user would put the files himself, for the message.
    Raises:
        RunError: with the reason of each way, if none does.
    """
    reasons = []
    for number, (way, get) in enumerate(ways.items()):
        try:
            return way, get(source, stage / str(number))
        except Unavailable as reason:
            reasons.append(f"{way}: {reason}")
    raise RunError(
        f"{source.name}: cannot be fetched ({'; '.join(reasons)}). Get it: {source.origin}. "
        f"Put {', '.join(source.hashes)} into {root}"
    )


def check_whole(source: Source, folder: Path) -> None:
    """Refuse a folder whose files are not those that were published.

    Raises:
        Unavailable: naming the first that is not.
    """
    problem = source.problem(folder)
    if problem is not None:
        raise Unavailable(problem.replace(f"{folder}/", ""))


def _whole(get: "Way") -> "Way":
    def get_whole(source: Source, stage: Path) -> Path:
        folder = get(source, stage)
        check_whole(source, folder)
        return folder

    return get_whole


@contextmanager
def staging(source: Source, root: Path, room: float = 3.0) -> Iterator[Path]:
    """An empty folder beside `root`, for one process at a time; gone at the end, and with it what is not yet moved.

    Args:
        room: space that is needed, in sizes of the download: the package, what is unpacked from it, and a margin.
    Raises:
        RunError: if another process is fetching, there is not enough room, or a file cannot be written.
    """
    try:
        with _locked(source, root, room) as stage:
            yield stage
    except OSError as error:
        raise RunError(f"{source.name}: {_no_room(source, root, room, error)}") from error


@contextmanager
def _locked(source: Source, root: Path, room: float) -> Iterator[Path]:
    made = [folder for folder in (root.parent, *root.parent.parents) if not folder.exists()]
    root.parent.mkdir(parents=True, exist_ok=True)
    stage = root.parent / f".{root.name}.part"
    lock = os.open(root.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{source.name}: another process is fetching into {root.parent}") from None
        shutil.rmtree(stage, ignore_errors=True)
        free = shutil.disk_usage(root.parent).free
        if free < room * source.num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stage.mkdir()
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)
        for folder in made:
            with contextlib.suppress(OSError):  # holds the data by now
                folder.rmdir()


def _no_room(source: Source, root: Path, room: float, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"not enough room in {root.parent} for {source.size}, {room:g} times; free some, or set paths.data"
    return f"cannot write {error.filename or root}: {error.strerror or error}"


# Ways, from the nearest to the farthest


def _installed(source: Source, stage: Path) -> Path:
    """Copies of what a package has installed on this machine."""
    if source.debian is None:
        raise Unavailable("no package")
    folder = SYSTEM / source.debian[1]
    if not folder.is_dir():
        raise Unavailable(f"no folder {folder}")
    return _copy(source, folder, stage)


def _debian(source: Source, stage: Path) -> Path:
    """A package downloaded and unpacked, which is not installed."""
    if source.debian is None:
        raise Unavailable("no package")
    package, place = source.debian
    stage.mkdir()
    timeouts = [f"--option=Acquire::{scheme}::Timeout={SILENCE}" for scheme in ("http", "https")]
    call(["apt-get", "download", *timeouts, "--option=Acquire::Retries=1", package], stage)
    found = next(stage.glob("*.deb"), None)
    if found is None:
        raise Unavailable("apt-get left no package")
    call(["dpkg-deb", "--extract", found.name, "unpacked"], stage)
    return stage / "unpacked" / place


def _torchvision(source: Source, stage: Path) -> Path:
    """What torchvision's own class downloads."""
    if source.torchvision is None:
        raise Unavailable("no such data set")
    from torchvision import datasets

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        getattr(datasets, source.torchvision)(root=str(stage), download=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Unavailable(last_line(str(error))) from error
    except RuntimeError as error:
        raise Unavailable(last_line(str(error))) from error
    finally:
        socket.setdefaulttimeout(before)
    return stage / source.torchvision / "raw"


Way = Callable[[Source, Path], Path]
WAYS: dict[str, Way] = {
    "installed": _installed,
    "Debian's archive": _debian,
    "torchvision": _torchvision,
}


def _copy(source: Source, folder: Path, stage: Path) -> Path:
    stage.mkdir()
    for name in source.hashes:
        if not (folder / name).is_file():
            raise Unavailable(f"no {name} in {folder}")
        shutil.copyfile(folder / name, stage / name)
    return stage


def call(command: list[str], folder: Path) -> None:
    """Run a command in a folder.

    Raises:
        Unavailable: with the last line of what it says, if it fails.
    """
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=PATIENCE
        )
    except FileNotFoundError:
        raise Unavailable(f"there is no {command[0]} here") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took more than {PATIENCE} s") from None
    if done.returncode:
        raise Unavailable(last_line(done.stderr))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["failed without a word"])[-1].removeprefix("E: ").rstrip(".")[:160]
