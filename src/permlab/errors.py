"""Errors that end a run with one line and an exit code instead of a traceback, and what they suggest."""

import difflib
import errno
from collections.abc import Sequence
from typing import Any


class RunError(Exception):
    """What `train.py` and `eval.py` report in one line."""

    exit_code = 1


class ConfigError(RunError):
    """Bad input: every problem found, each naming key, value and nearest valid choice."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class NonFiniteError(RunError):
    """A number became NaN or infinite: in the loss, a gradient, a weight, a score or a relaxation."""


class StepError(RunError):
    """The optimiser could not make a step."""


class LockedError(RunError):
    """Another process is at work in the run directory."""

    exit_code = 2


class WriteError(RunError, OSError):
    """A file of the run cannot be written; what was there before is as it was.

    Args:
        path: of the file or folder.
        error: what the operating system says of it.
    """

    def __init__(self, path: Any, error: OSError) -> None:
        super().__init__(f"cannot write {path}: {error.strerror or error}; {_remedy(error)}")


def _remedy(error: OSError) -> str:
    again = "run the same command to go on from the last checkpoint"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"free space there, then {again}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"make it writable, then {again}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        return f"the run directory has gone; bring it back, then {again}"
    return again


class RankError(RunError):
    """One of the processes of a run died, or they no longer agree."""


class Interrupted(BaseException):
    """The run was asked to stop by a signal; what it had made is saved.

    Like KeyboardInterrupt no Exception: nothing that expects failures may take it for one.
    """

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(f"interrupted by signal {signal_number}; the same command goes on from here")


def nearest(value: Any, valid: Sequence[Any], *, count: int = 1) -> str:
    """Suggestion to append to a message: the closest valid choice, or all where none is close.

    Args:
        value: that is not valid.
        valid: choices.
        count: where there are too many to name all, so many are named, the closest first, however far they are.
    Example:
        >>> nearest("tow", ["one", "two", "three"])
        '; nearest valid choice: two'
        >>> nearest("tow", ["one", "two", "three"], count=2)
        '; nearest valid choices: two, one'
    """
    names = [str(choice) for choice in valid]
    close = difflib.get_close_matches(str(value), names, n=count, cutoff=0.5 if count == 1 else 0.0)
    if close:
        return f"; nearest valid choice{'s' if len(close) > 1 else ''}: {', '.join(close)}"
    return f"; valid choices: {', '.join(sorted(names))}" if names else ""
