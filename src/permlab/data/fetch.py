"""Fetching a data set: installed on this machine, from Debian's archive, or by torchvision; whole or not at all.

Files are gathered in a folder of their own beside the one they are for, compared with their SHA-256, and only
then moved. What an interrupted fetch leaves is thrown away by the next one.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
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
    try:
        with _staging(source, root) as stage:
            way, folder = _find(source, stage, root)
            for name in source.hashes:
                root.mkdir(parents=True, exist_ok=True)
                os.replace(folder / name, root / name)
            return way
    except OSError as error:
        raise RunError(f"{source.name}: {_no_room(source, root, error)}") from error


def _find(source: Source, stage: Path, root: Path) -> tuple[str, Path]:
    """The first way that leads to whole files, and the folder that holds them."""
    reasons = []
    for number, (way, get) in enumerate(WAYS.items()):
        try:
            folder = get(source, stage / str(number))
        except Unavailable as reason:
            reasons.append(f"{way}: {reason}")
            continue
        problem = source.problem(folder)
        if problem is None:
            return way, folder
        reasons.append(f"{way}: {problem.replace(f'{folder}/', '')}")
    raise RunError(
        f"{source.name}: cannot be fetched ({'; '.join(reasons)}). Get it: {source.origin}. "
        f"Put {', '.join(source.hashes)} into {root}"
    )


@contextmanager
def _staging(source: Source, root: Path) -> Iterator[Path]:
    """An empty folder beside `root`, for one process at a time; gone at the end, and with it what is not yet moved.

    Raises:
        RunError: if another process is fetching, or there is not enough room.
    """
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
        if free < 3 * source.num_bytes:  # the package, what is unpacked from it, and a margin
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stage.mkdir()
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)
        for folder in made:
            with contextlib.suppress(OSError):  # holds the data by now
                folder.rmdir()


def _no_room(source: Source, root: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"not enough room in {root.parent} for {source.size} and as much again twice; free some, or set paths.data"
        )
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
    _call(["apt-get", "download", *timeouts, "--option=Acquire::Retries=1", package], stage)
    found = next(stage.glob("*.deb"), None)
    if found is None:
        raise Unavailable("apt-get left no package")
    _call(["dpkg-deb", "--extract", found.name, "unpacked"], stage)
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
        raise Unavailable(_last_line(str(error))) from error
    except RuntimeError as error:
        raise Unavailable(_last_line(str(error))) from error
    finally:
        socket.setdefaulttimeout(before)
    return stage / source.torchvision / "raw"


WAYS: dict[str, Callable[[Source, Path], Path]] = {
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


def _call(command: list[str], folder: Path) -> None:
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
        raise Unavailable(_last_line(done.stderr))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["failed without a word"])[-1].removeprefix("E: ").rstrip(".")[:160]
