"""Metrics reach the run's files whatever happens to W&B, and W&B gets one row for every line."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from permlab.record.rundir import complete_run, read_metrics, start_run, write_json, write_text
from permlab.record.tracking import RunLogger, replay

CONFIG = {
    "seed": 0,
    "task": {"name": "classify"},
    "logger": {"mode": "offline", "project": "lab", "entity": None, "tags": ["a"]},
}


class FakeRun:
    """Keeps what it was sent; `rows` and `summary` are what the server has."""

    def __init__(self, server: "FakeWandb", rows: list[dict[str, Any]], arguments: dict[str, Any]) -> None:
        self.server, self.rows, self.arguments = server, rows, arguments
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.axes: list[tuple[str, str | None]] = []
        self.exit_code: int | None = None

    @property
    def step(self) -> int:
        return len(self.rows)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.server.fail("log")
        assert self.exit_code is None, "logged to a finished run"
        self.rows.append(row)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def finish(self, exit_code: int = 0) -> None:
        self.server.fail("finish")
        self.exit_code = exit_code


class FakeArtifact:
    def __init__(self, name: str, type: str) -> None:
        self.name, self.type, self.files = name, type, []

    def add_file(self, path: str) -> None:
        self.files.append(Path(path).name)


class FakeWandb:
    """Stands for the wandb module; `failing` names the call that raises, `logged_in` the account."""

    def __init__(self) -> None:
        self.failing, self.logged_in = "", True
        self.runs: list[FakeRun] = []
        self.stored: dict[str, list[dict[str, Any]]] = {}
        self.Settings = SimpleNamespace
        self.Image = lambda path: f"image {Path(path).name}"
        self.Artifact = FakeArtifact

    def fail(self, call: str) -> None:
        if call == self.failing:
            raise ConnectionError(f"{call} failed\nsecond line")

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return self.logged_in

    def init(self, **arguments: Any) -> FakeRun:
        self.fail("init")
        name = arguments["id"]
        rows = [] if name is None else self.stored.setdefault(name, [])
        self.runs.append(FakeRun(self, rows, arguments))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def make_logger(run_dir: Path, mode: str = "offline", *, log_artifacts: bool = True) -> RunLogger:
    settings = {"project": "lab", "entity": None, "tags": ["a"], "log_artifacts": log_artifacts}
    return RunLogger(run_dir, config=CONFIG, mode=mode, group="12345678", job_type="classify", **settings)


def log_three_steps(logger: RunLogger) -> None:
    for step in (50, 100, 150):
        logger.log_metrics({"train/loss": 1 / step}, step)
        logger.log_metrics({"permutation/kendall": step / 200}, step)


LINES = [{"step": step, "train/loss": 1 / step, "permutation/kendall": step / 200} for step in (50, 100, 150)]


def as_rows(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"trainer/global_step": line["step"]} | {k: v for k, v in line.items() if k != "step"} for line in lines]


def test_one_row_for_every_line(tmp_path: Path, wandb: FakeWandb) -> None:
    start_run(tmp_path, CONFIG)
    logger = make_logger(tmp_path)
    assert wandb.runs == []
    log_three_steps(logger)
    logger.finalize("success")
    logger.mirror_results({"test/accuracy": 0.5}, [tmp_path / "figures" / "order.png"])
    (run,) = wandb.runs
    assert read_metrics(tmp_path) == LINES
    assert run.rows == [*as_rows(LINES), {"figure/order": "image order.png"}]
    assert run.summary == {"test/accuracy": 0.5}
    assert run.exit_code == 0


def test_what_the_run_is_started_with(tmp_path: Path, wandb: FakeWandb) -> None:
    run_dir = tmp_path / "digits-vit_nano-sinkhorn" / "seed=0-12345678"
    start_run(run_dir, CONFIG)
    make_logger(run_dir).log_metrics({"a": 1.0}, 1)
    logger = make_logger(run_dir)
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_metrics({"a": 1.0}, 2)
    (run,) = wandb.runs
    expected = {"mode": "offline", "dir": run_dir, "project": "lab", "entity": None, "tags": ["a"]}
    expected |= {"group": "12345678", "job_type": "classify", "id": None, "resume": None}
    assert {key: run.arguments[key] for key in expected} == expected
    assert run.arguments["config"]["seed"] == 0
    assert "versions" in run.arguments["config"]["provenance"]
    assert ("*", "trainer/global_step") in run.axes
    assert run.arguments["settings"].init_timeout <= 60


def test_disabled_never_imports_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = make_logger(tmp_path, "disabled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_three_steps(logger)
        logger.mirror_results({}, [tmp_path / "order.png"])
    assert read_metrics(tmp_path) == LINES


@pytest.mark.parametrize("failing", ["import", "init", "log", "finish"])
def test_any_failure_is_one_warning(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    wandb.failing = failing
    if failing == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    logger = make_logger(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_three_steps(logger)
        logger.mirror_results({"test/accuracy": 0.5}, [tmp_path / "order.png"])
        logger.finalize("success")
    assert len(caught) == 1
    assert str(caught[0].message).startswith("W&B")
    assert "second line" not in str(caught[0].message)
    assert read_metrics(tmp_path) == LINES


def test_online_without_an_account_neither_asks_nor_starts(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.logged_in = False
    with pytest.warns(UserWarning, match="wandb login") as caught:
        log_three_steps(make_logger(tmp_path, "online"))
    assert len(caught) == 1
    assert wandb.runs == []
    assert read_metrics(tmp_path) == LINES


def test_every_training_of_a_process_has_its_own_run(tmp_path: Path, wandb: FakeWandb) -> None:
    for name in ("control", "learned", "refit"):
        logger = make_logger(tmp_path / name)
        log_three_steps(logger)
        logger.mirror_results({"name": name}, [])
    assert [run.summary["name"] for run in wandb.runs] == ["control", "learned", "refit"]
    assert all(run.rows == as_rows(LINES) and run.exit_code == 0 for run in wandb.runs)


def test_a_failed_training_says_so(tmp_path: Path, wandb: FakeWandb) -> None:
    logger = make_logger(tmp_path)
    log_three_steps(logger)
    logger.finalize("failed")
    logger.finalize("failed")
    assert wandb.runs[0].rows == as_rows(LINES)
    assert wandb.runs[0].exit_code == 1


@pytest.mark.parametrize(
    ("mode", "log_artifacts", "expected"), [("online", True, 1), ("online", False, 0), ("offline", True, 0)]
)
def test_checkpoints_are_uploaded_only_when_online(
    tmp_path: Path, wandb: FakeWandb, mode: str, log_artifacts: bool, expected: int
) -> None:
    for name in ("best", "last"):
        write_text(tmp_path / "checkpoints" / f"{name}.ckpt", name)
    logger = make_logger(tmp_path, mode, log_artifacts=log_artifacts)
    log_three_steps(logger)
    logger.mirror_results({}, [])
    artifacts = wandb.runs[0].artifacts
    assert len(artifacts) == expected
    assert all(artifact.files == ["best.ckpt", "last.ckpt"] and artifact.type == "model" for artifact in artifacts)


def test_other_ranks_write_nothing(tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = make_logger(tmp_path / "run")
    log_three_steps(logger)
    logger.mirror_results({}, [])
    logger.finalize("success")
    assert wandb.runs == []
    assert not (tmp_path / "run").exists()


def test_metrics_without_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss"):
        make_logger(tmp_path, "disabled").log_metrics({"loss": 1.0})


def test_lightning_logs_through_it(tmp_path: Path, wandb: FakeWandb) -> None:
    class Model(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.logger.log_metrics({"train/loss": float(batch_idx)}, step=self.global_step + 1)
            return super().training_step(batch, batch_idx)

    flags = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(logger=make_logger(tmp_path), max_steps=3, limit_val_batches=0, accelerator="cpu", **flags)
    trainer.fit(Model())
    lines = [{"step": step, "train/loss": step - 1.0} for step in (1, 2, 3)]
    assert read_metrics(tmp_path) == lines
    assert wandb.runs[0].rows == as_rows(lines)
    assert wandb.runs[0].exit_code is None


# Replay


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    run_dir = tmp_path / "digits-vit_nano-sinkhorn" / "seed=0-12345678"
    start_run(run_dir, CONFIG)
    log_three_steps(make_logger(run_dir, "disabled"))
    write_text(run_dir / "figures" / "order.png", "picture")
    complete_run(run_dir, {"test/accuracy": 0.5})
    return run_dir


def test_replay_uploads_a_finished_run_once(finished: Path, wandb: FakeWandb) -> None:
    assert [replay(finished), replay(finished)] == [3, 0]
    first, second = wandb.runs
    assert first.arguments["id"] == second.arguments["id"]
    assert first.arguments["group"] == "12345678"
    assert first.arguments["mode"] == "online"
    assert wandb.stored == {first.arguments["id"]: [*as_rows(LINES), {"figure/order": "image order.png"}]}
    assert second.summary == {"test/accuracy": 0.5}


def test_replay_goes_on_where_it_was_cut_off(finished: Path, wandb: FakeWandb) -> None:
    replay(finished)
    (rows,) = wandb.stored.values()
    complete = list(rows)
    for length in range(len(complete)):
        del rows[length:]
        replay(finished)
        assert rows == complete


def test_replay_tells_repeated_trainings_apart(finished: Path, wandb: FakeWandb) -> None:
    replay(finished)
    write_json(finished / "summary.json", {"test/accuracy": 0.6})
    replay(finished)
    assert len(wandb.stored) == 2


def test_replay_wants_a_finished_run_and_an_account(finished: Path, wandb: FakeWandb) -> None:
    wandb.logged_in = False
    with pytest.raises(PermissionError, match="wandb login"):
        replay(finished)
    (finished / "DONE").unlink()
    with pytest.raises(ValueError, match="no finished run"):
        replay(finished)


# The real thing


def test_wandb_offline_needs_no_account_and_keeps_runs_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in ("control", "learned"):
            logger = make_logger(tmp_path / name)
            start_run(tmp_path / name, CONFIG)
            logger.log_metrics({f"only/{name}": 1.0}, 1)
            logger.log_metrics({f"only/{name}": float("nan")}, 2)
            logger.finalize("success")
            logger.mirror_results({f"final/{name}": 0.5}, [])
    for name, other in (("control", "learned"), ("learned", "control")):
        (file,) = (tmp_path / name / "wandb").glob("offline-run-*/run-*.wandb")
        content = file.read_bytes()
        assert f"only/{name}".encode() in content
        assert f"final/{name}".encode() in content
        assert f"only/{other}".encode() not in content
    output = capfd.readouterr()
    assert output.out + output.err == ""
