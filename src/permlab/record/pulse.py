"""Signs of life of a run: a line at least every half minute, whatever it is busy with. Nothing here imports torch."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import ParamSpec, Protocol, TypeVar

from permlab.record.rundir import is_rank_zero

EVERY_SECONDS = 30.0
# Part of that after which whoever works speaks, so that the thread, which knows less, seldom has to.
SOON = 0.8

Item = TypeVar("Item", covariant=True)
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def duration(seconds: float) -> str:
    """Rounded as people say it.

    Args:
        seconds: not negative.
    Example:
        >>> [duration(seconds) for seconds in (0.4, 42, 100, 3600, 9000)]
        ['1 s', '42 s', '2 min', '60 min', '2 h 30 min']
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def say(line: str) -> None:
    """Print a line where somebody may be looking, on the first rank alone; that nobody can ends no run."""
    if is_rank_zero():
        with suppress(OSError, ValueError, RuntimeError):  # closed, or in the middle of another line as a signal came
            print(line, flush=True)


class Pulse:
    """Says from its start to its end how far a phase of a run has come, which may be long.

    Whoever works calls `beat`, which prints a line once one is due; where nobody has for too long, a
    thread prints what was known last. Of nested phases the innermost one speaks.

    Args:
        what: is being done, the beginning of each line.
        unit: what is counted, in the plural; empty for nothing.
        total: of the unit; None where nobody knows.
        done: of them, at the start.
        every_seconds: that no line may be later than.
    Example:
        >>> with Pulse("search", "sites", 14, every_seconds=0.0) as pulse:
        ...     pulse.beat(0)
        search: 0 of 14 sites, 1 s
    """

    _open: list["Pulse"] = []

    def __init__(
        self,
        what: str,
        unit: str = "",
        total: int | None = None,
        *,
        done: int = 0,
        every_seconds: float | None = None,
    ) -> None:
        self.what, self.unit, self.total = what, unit, total
        self._done = self._done_before = done
        self._every = EVERY_SECONDS if every_seconds is None else every_seconds
        self._more = ""
        self._over = threading.Event()

    def __enter__(self) -> "Pulse":
        self._began = self._said = time.monotonic()
        self._open.append(self)
        if self._every:
            threading.Thread(target=self._watch, daemon=True, name="pulse").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self in self._open:
            self._open.remove(self)

    def beat(self, done: int, more: Callable[[], str] = str) -> None:
        """So many are done.

        Args:
            done: of the unit.
            more: what else the line tells; called only if there is one.
        """
        self._done = done
        if time.monotonic() - self._said >= SOON * self._every:
            self._more = more()
            self._speak()

    def counting(self, function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
        """The same function, each of whose calls counts as one of the unit."""

        def counted(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
            answer = function(*args, **kwargs)
            self.beat(self._done + 1)
            return answer

        return counted

    def _watch(self) -> None:
        while not self._over.wait(max(0.01, self._said + self._every - time.monotonic())):
            if time.monotonic() - self._said >= self._every:
                self._speak()

    def _speak(self) -> None:
        self._said = now = time.monotonic()
        if not self._open or self._open[-1] is not self:
            return
        say(", ".join(part for part in (self._progress(), self._more, *self._times(now - self._began)) if part))

    def _progress(self) -> str:
        if not self.unit:
            return f"{self.what}: at work"
        return f"{self.what}: {self._done:,}{'' if self.total is None else f' of {self.total:,}'} {self.unit}"

    def _times(self, seconds: float) -> Iterator[str]:
        yield duration(seconds)
        made = self._done - self._done_before
        if self.total is not None and made > 0:
            yield f"about {duration(seconds / made * max(0, self.total - self._done))} left"


class Counted(Protocol[Item]):
    """Items of which it is known how many they are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


def watched(what: str, unit: str, items: Counted[Item]) -> Iterator[Item]:
    """The same items, one after the other, with a line about them at least every half minute."""
    with Pulse(what, unit, len(items)) as pulse:
        for done, item in enumerate(items):
            pulse.beat(done)
            yield item
