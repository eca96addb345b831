"""One process at a time in a run directory."""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from permlab.errors import LockedError
from permlab.record.rundir import writing

NAME = "LOCK"
# Seconds between two signs of life of a lock, and of none after which its holder counts as dead.
BEAT_SECONDS = 5.0
# For which a holder that is just ending, after its sweep was killed, say, is waited for.
PATIENCE_SECONDS = 4.0
DEAD_SECONDS = 30.0


class RunLock:
    """Holds a run directory for as long as the process lives, or until it is left.

    The operating system's lock on the file `LOCK` decides: it ends with its process, whatever
    ends that, and no child inherits it, so one that was left behind is taken over without a
    word. Where the file system does not carry locks from host to host, the file itself tells:
    its holder changes it every few seconds. Another host's file is watched, by this process's
    own steady clock, until it changes or has not for `DEAD_SECONDS`.

    Args:
        run_dir: of the run; created if it is missing.
        wait: wait for the holder to end instead of refusing.
    Raises:
        LockedError: on entering, naming the process and host that hold the directory.
    """

    def __init__(self, run_dir: Path, *, wait: bool = False) -> None:
        self.path, self.wait = run_dir / NAME, wait
        self._descriptor = -1
        self._leaving = threading.Event()
        self._beats = 0

    def __enter__(self) -> Self:
        announced, end = False, time.monotonic() + PATIENCE_SECONDS
        while not self._acquire():
            holder = _parse(self._content())
            if not self.wait and time.monotonic() >= end:
                raise LockedError(self._refusal(holder))
            if self.wait and not announced:
                print(f"waiting for {_name(holder)}, which is at work in {self.path.parent}", flush=True)
                announced = True
            time.sleep(0.2)
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True, name="run-lock")
        self._thread.start()
        return self

    def _acquire(self) -> bool:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise LockedError(f"{self.path}: cannot be locked ({error.strerror}); see docs/reliability.md") from error
        if self._is_current() and not self._lives_elsewhere():
            return True
        os.close(self._descriptor)
        return False

    def _is_current(self) -> bool:
        """Whether the locked file is still the one of that name: its last holder deletes it."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except OSError:
            return False

    def _lives_elsewhere(self) -> bool:
        """Whether a process on another host, whose lock cannot be seen here, shows signs of life."""
        before = os.pread(self._descriptor, 4096, 0)
        if _parse(before).get("host", socket.gethostname()) == socket.gethostname():
            return False
        end = time.monotonic() + DEAD_SECONDS
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 10)
            # Not by name: closing a second descriptor of the file would give up the lock.
            if os.pread(self._descriptor, 4096, 0) != before:
                return True
        return False

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def _refusal(self, holder: dict[str, Any]) -> str:
        place = self.path.parent
        elsewhere = holder.get("host") not in (None, socket.gethostname())
        hint = f"; if that process is dead, delete {self.path}" if elsewhere else ""
        return f"{_name(holder)} is at work in {place} since {holder.get('started', 'a moment ago')}{hint}"

    def _keep_beating(self) -> None:
        while not self._leaving.wait(BEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        self._beats += 1
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": self._started, "beat": self._beats}
        content = (json.dumps(holder) + "\n").encode()
        try:
            os.pwrite(self._descriptor, content, 0)
            os.ftruncate(self._descriptor, len(content))
        except OSError:
            pass  # a full disk is for the files that matter to complain of

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join()  # it writes to the descriptor
        if self._is_current():
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'this host')}"
