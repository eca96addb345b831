"""Copies of the metrics have what `metrics.jsonl` has, also where a run goes on, and may fail."""

import csv
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

import permlab.record.copies
from permlab.record.copies import STEP, Copy
from permlab.record.rundir import MetricsFile
from permlab.record.tracking import RunLogger


def logger(run_dir: Path, *copies: str) -> RunLogger:
    wandb: dict[str, Any] = {"mode": "disabled", "project": "p", "entity": None, "tags": [], "log_artifacts": False}
    return RunLogger(run_dir, config={"seed": 0}, **wandb, copies=copies, group="g", job_type="j")


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "csv" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_csv_has_a_row_for_each_step_and_the_final_metrics(tmp_path: Path) -> None:
    log = logger(tmp_path, "csv")
    log.log_metrics({"train/loss": 2.0}, step=1)
    log.log_metrics({"val/accuracy": 0.5}, step=1)
    log.log_metrics({"train/loss": 1.0}, step=2)
    log.finalize("success")
    log.mirror_results({"test/accuracy": 0.75}, [])
    first, second, final = rows_of(tmp_path)
    assert (first["step"], float(first["train/loss"]), float(first["val/accuracy"])) == ("1", 2.0, 0.5)
    assert (second["step"], float(second["train/loss"]), second["val/accuracy"]) == ("2", 1.0, "")
    assert float(final["test/accuracy"]) == 0.75


def test_a_run_that_goes_on_has_the_steps_before(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        metrics.update(step, {"train/loss": 1 / step})
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("step,train/loss\n7,9\n")  # of steps that the run has lost
    log = logger(tmp_path, "csv")
    log.log_metrics({"train/loss": 0.25}, step=3)
    log.mirror_results({}, [])
    assert [(row["step"], float(row["train/loss"])) for row in rows_of(tmp_path)] == [("1", 1), ("2", 0.5), ("3", 0.25)]


def test_nothing_is_made_where_nothing_was_logged(tmp_path: Path) -> None:
    log = logger(tmp_path, "csv", "tensorboard")
    log.finalize("failed")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_fails_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run_dir: Path) -> Logger:
        raise OSError("disk full")

    monkeypatch.setitem(permlab.record.copies.LOGGERS, "csv", refuse)
    copy = Copy(tmp_path, "csv", {})
    with pytest.warns(UserWarning, match="stopped with OSError: disk full; the run goes on"):
        copy.log({STEP: 1, "train/loss": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.log({STEP: 2, "train/loss": 1.0})
        copy.end({})


def test_tensorboard_gets_scalars_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its package, which is an extra: what is written is TensorBoard's own affair."""
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, log_dir: str, **_: object) -> None:
            assert Path(log_dir) == tmp_path / "tensorboard"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr("lightning.pytorch.loggers.tensorboard.TensorBoardLogger.log_hyperparams", lambda *_: None)
    monkeypatch.setattr("lightning.pytorch.loggers.tensorboard.TensorBoardLogger.save", lambda *_: None)
    log = logger(tmp_path, "tensorboard")
    log.log_metrics({"train/loss": 2.0}, step=1)
    log.log_metrics({"train/loss": 1.0}, step=2)
    log.mirror_results({"test/accuracy": 0.75}, [])
    assert written == [("train/loss", 2.0, 1), ("train/loss", 1.0, 2), ("test/accuracy", 0.75, 2)]
