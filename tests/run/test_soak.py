"""The soak, short: a training is killed four times and ends as if it had not been."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import pytest

import soak


def test_runs_that_are_killed_end_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "COMMON", (*soak.COMMON, "figures=false"))  # `make soak` draws them
    result = soak.soak("train", tmp_path, 4, random.Random(0))
    assert result.problems == []
    assert sum(result.kills.values()) == 4
    assert max(result.lost, default=0) <= soak.EVERY


def test_a_difference_is_found(tmp_path: Path) -> None:
    for name, loss in (("a", 1), ("b", 2)):
        run_dir = tmp_path / name / "run"
        (run_dir / "checkpoints").mkdir(parents=True)
        (run_dir / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {loss}, "time/seconds": {loss}}}\n')
        (run_dir / "summary.json").write_text(f'{{"test/loss": {loss}, "train/seconds": {loss}}}')
        (run_dir / "DONE").touch()
    assert soak.compare(tmp_path / "a", tmp_path / "a") == []
    assert soak.compare(tmp_path / "a", tmp_path / "b") == [
        "b/run: metrics.jsonl differs",
        "b/run: summary test/loss differs",
    ]
    (tmp_path / "b" / "run" / "DONE").unlink()
    assert soak.compare(tmp_path / "a", tmp_path / "b") == ["b: run is not in both"]
