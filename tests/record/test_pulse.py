"""Signs of life: at least as often as promised, by whoever is at work, and never the end of a run."""

import io
import sys
import threading
import time

import pytest

from permlab.record import pulse
from permlab.record.pulse import Pulse, say, watched


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets; no thread looks at it."""
    now = [100.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pulse.threading, "Thread", lambda **_: type("Nobody", (), {"start": lambda self: None})())
    return now


def test_a_line_comes_when_it_is_due_and_tells_what_is_left(clock, capsys):
    with Pulse("search", "sites", 14) as phase:
        for done in range(14):
            phase.beat(done, lambda: "loss 0.5")
            clock[0] += 13
    assert capsys.readouterr().out.splitlines() == [
        "search: 2 of 14 sites, loss 0.5, 26 s, about 3 min left",
        "search: 4 of 14 sites, loss 0.5, 52 s, about 2 min left",
        "search: 6 of 14 sites, loss 0.5, 78 s, about 2 min left",
        "search: 8 of 14 sites, loss 0.5, 2 min, about 78 s left",
        "search: 10 of 14 sites, loss 0.5, 2 min, about 52 s left",
        "search: 12 of 14 sites, loss 0.5, 3 min, about 26 s left",
    ]


def test_what_a_line_tells_is_fetched_only_for_a_line(clock, capsys):
    with Pulse("training", "steps", 9) as phase:
        phase.beat(1, lambda: pytest.fail("fetched"))
    assert capsys.readouterr().out == ""


def test_after_resuming_the_steps_before_do_not_count_as_fast(clock, capsys):
    with Pulse("training", "steps", 1100, done=1000) as phase:
        clock[0] += 30
        phase.beat(1050)
    assert capsys.readouterr().out == "training: 1,050 of 1,100 steps, 30 s, about 30 s left\n"


def test_where_nobody_speaks_a_thread_does_and_of_nested_phases_the_innermost(capsys):
    before = threading.active_count()
    with Pulse("outer", every_seconds=0.02), Pulse("inner", every_seconds=0.02):
        time.sleep(0.2)
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= 3
    assert set(said) == {"inner: at work, 1 s"}
    time.sleep(0.05)
    assert threading.active_count() == before


def test_items_and_calls_are_counted(clock, capsys, monkeypatch):
    monkeypatch.setattr(pulse, "EVERY_SECONDS", 0.0)
    assert list(watched("search", "sites", ["a", "b"])) == ["a", "b"]
    with Pulse("polishing", "losses", 2) as phase:
        assert [phase.counting(abs)(-3), phase.counting(abs)(-4)] == [3, 4]
    found = [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert found == ["search: 0 of 2 sites", "search: 1 of 2 sites", *(f"polishing: {n} of 2 losses" for n in (1, 2))]


def test_other_ranks_are_silent_and_nobody_listening_ends_no_run(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")
        say("nothing")
    assert capsys.readouterr().out == ""
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    say("nothing")
