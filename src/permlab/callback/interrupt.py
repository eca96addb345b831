"""SIGTERM and SIGINT from the first line of a run to its last."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning as L

from permlab.errors import Interrupted
from permlab.record.pulse import say

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """What has been asked for, and whether to obey at once.

    Between steps of training a signal is noted, which is said, and obeyed where the state can be saved; anywhere
    else it raises `Interrupted` on the spot, as all that it costs is made again. A second SIGINT
    does so everywhere.

    Attributes:
        received: number of the newest signal; 0 for none.
        deferred: whether a signal is noted only.
    """

    def __init__(self) -> None:
        self.received = 0
        self.deferred = False

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        again = self.received == number == signal.SIGINT
        self.received = number
        if again or not self.deferred:
            raise Interrupted(number)
        say("stopping after this step" + (", Ctrl-C once more stops at once" if number == signal.SIGINT else ""))

    def check(self) -> None:
        """Obey a signal that was noted."""
        if self.received:
            raise Interrupted(self.received)


STOP = Stop()


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Handle the signals while the block runs; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    STOP.received, STOP.deferred = 0, False
    previous: dict[int, Any] = {number: signal.signal(number, STOP.receive) for number in SIGNALS}
    try:
        yield
    finally:
        STOP.deferred = False
        for number, handler in previous.items():
            signal.signal(number, handler)


def keep_signals(trainer: L.Trainer) -> None:
    """Keep Lightning's handlers away from a trainer.

    They save nothing, or, under SLURM, save in the middle of a step; they exit with 0, which
    schedulers take for success; and on several ranks they wait for each other inside the handler.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
