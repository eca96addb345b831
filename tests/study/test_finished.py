"""Lines of runs that have been run elsewhere: written, read, and preferred to by what lies here."""

import math
from pathlib import Path

import pytest

from permlab.config.compose import resolve_train
from permlab.config.plan import Plan
from permlab.errors import ConfigError
from permlab.record.rundir import write_json
from permlab.study.finished import find_finished, read_kept, run_name, write_kept


def finished(runs: Path, value: float) -> Plan:
    plan, _ = resolve_train([f"paths.runs={runs}", "seed=3"])
    plan.directory.mkdir(parents=True)
    (plan.directory / "DONE").touch()
    write_json(plan.directory / "summary.json", {"test/accuracy": value, "test/loss": math.inf})
    write_json(plan.directory / "provenance.json", {"device": "cpu, 7 threads", "command": "train.py", "git_sha": "a"})
    return plan


def test_a_line_stands_for_a_run_wherever_runs_lie(tmp_path: Path) -> None:
    run = find_finished(finished(tmp_path / "here", 0.5))
    write_kept([run, run], tmp_path / "study.jsonl")
    assert (tmp_path / "study.jsonl").read_text().count("\n") == 1
    elsewhere, _ = resolve_train([f"paths.runs={tmp_path / 'there'}", "seed=3"])
    assert find_finished(elsewhere) is None
    found = find_finished(elsewhere, read_kept(tmp_path / "study.jsonl"))
    assert found.summary == {"test/accuracy": 0.5, "test/loss": math.inf}
    assert found.provenance == {"device": "cpu, 7 threads", "git_sha": "a"}
    assert found.plan is elsewhere
    assert found.seed == 3
    other, _ = resolve_train([f"paths.runs={tmp_path / 'there'}", "seed=4"])
    assert find_finished(other, read_kept(tmp_path / "study.jsonl")) is None


def test_what_lies_here_counts_before_what_a_line_says(tmp_path: Path) -> None:
    plan = finished(tmp_path / "here", 0.5)
    kept = {run_name(plan): {"summary": {"test/accuracy": 0.1}, "provenance": {}}}
    assert find_finished(plan, kept).summary["test/accuracy"] == 0.5


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read_kept(tmp_path / "study.jsonl") == {}
    assert find_finished(None) is None


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "1", '{"run": "a"}', '{"run": "a", "summary": {}, "provenance": 1}']
    + [f'{{"run": "a", "summary": {{"x": {value}}}, "provenance": {{}}}}' for value in ("true", '"text"')],
)
def test_a_line_of_something_else_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    path.write_text('{"run": "b", "summary": {}, "provenance": {}}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2 is not of a run"):
        read_kept(path)
