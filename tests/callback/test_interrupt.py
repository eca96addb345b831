"""A signal between two steps is answered at once, and obeyed later."""

import signal

import pytest

from permlab.callback.interrupt import Stop
from permlab.errors import Interrupted


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGTERM, "stopping after this step"),
        (signal.SIGINT, "stopping after this step, Ctrl-C once more stops at once"),
    ],
)
def test_a_deferred_signal_is_answered(number: signal.Signals, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    stop = Stop()
    stop.deferred = True
    stop.receive(number)
    assert capsys.readouterr().out == f"{line}\n"
    with pytest.raises(Interrupted):
        stop.check()


def test_one_that_is_obeyed_at_once_needs_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted):
        Stop().receive(signal.SIGTERM)
    assert capsys.readouterr().out == ""
