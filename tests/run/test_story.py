"""A run from the command line to its files: controls, reuse, resuming, stopping."""

import json
import math
import re
import shlex
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from runs import Result, StopAt, train
from scale import FULL

import permlab.run.evaluation
import permlab.run.story
import permlab.run.trainer
from permlab.cli import main
from permlab.config.compose import resolve_train
from permlab.permutation import check_order

STEPS = 48


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(tmp_path_factory.mktemp("runs"), "trainer.log_every_n_steps=1", "figures=true", steps=STEPS)


def test_a_run_reports_control_learned_and_refit(finished: Result) -> None:
    assert finished.code == 0, finished.err
    lines = finished.out.splitlines()
    assert lines[-1] == f"run: {finished.run_dir}"
    lines = lines[next(number for number, line in enumerate(lines) if line.startswith("test accuracy")) :]
    for label, key in (("control", "_control"), ("co-trained", ""), ("refit", "_refit")):
        (line,) = [line for line in lines if label in line and "%" not in line]
        assert f"{100 * finished.summary[f'test/accuracy{key}']:.1f}" in line


def test_the_picture_to_open_is_the_claim_s_and_has_the_curves_of_all_three(finished: Result) -> None:
    picture = finished.run_dir / "figures" / "comparison.png"
    assert finished.out.splitlines()[-2] == f"picture: {picture}"
    assert picture.is_file()
    with np.load(finished.run_dir / "arrays" / "beside.npz", allow_pickle=False) as beside:
        assert sorted(beside) == ["control", "refit"]
        last = [line["step"] for line in finished.metrics if "val/accuracy" in line]
        for curve in beside.values():
            assert curve[:, 0].tolist() == last
            assert (curve[:, 1] >= 0).all()
            assert (curve[:, 1] <= 1).all()


def test_a_run_leaves_the_files_of_the_contract(finished: Result) -> None:
    files = {str(path.relative_to(finished.run_dir)) for path in finished.run_dir.rglob("*") if path.is_file()}
    assert {"config.yaml", "provenance.json", "metrics.jsonl", "summary.json", "DONE"} <= files
    assert {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "arrays/order.npz", "arrays/confusion.npz"} <= files
    assert {"figures/order.png", "figures/soft_matrix.png", "figures/scores.png", "figures/confusion.png"} <= files
    with np.load(finished.run_dir / "arrays" / "order.npz", allow_pickle=False) as arrays:
        check_order(torch.from_numpy(arrays["order"]))
        assert arrays["start_order"].tolist() == list(range(64))


def test_every_step_is_logged_once_with_the_permutation(finished: Result) -> None:
    assert [line["step"] for line in finished.metrics] == list(range(1, STEPS + 1))
    active = [line for line in finished.metrics if "permutation/grad_norm" in line]
    frozen = round(0.3 * STEPS)
    assert len(active) == STEPS - frozen
    for name in ("entropy", "temperature", "kendall", "displacement"):
        assert all(math.isfinite(line[f"permutation/{name}"]) for line in finished.metrics)
    kendall = [line["permutation/kendall"] for line in finished.metrics]
    assert len(set(kendall[-frozen:])) == 1, "the order moved after it was frozen"


def test_every_step_is_logged_with_its_rate_and_with_what_it_took(finished: Result) -> None:
    """The rate is that of the step itself: it begins at a 25th of the peak and ends at a 250,000th (onecycle)."""
    peaks = {"optim/lr": finished.config["optim"]["lr"], "optim/lr_permutation": finished.config["method"]["lr"]}
    for key, peak in peaks.items():
        rates = [line[key] for line in finished.metrics]
        assert (rates[0], rates[-1]) == (pytest.approx(peak / 25), pytest.approx(peak / 250000))
        assert max(rates) == pytest.approx(peak, rel=0.02)
    assert [line["train/epoch"] for line in finished.metrics] == [step // 33 for step in range(STEPS)]
    seconds = [line["time/seconds"] for line in finished.metrics]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] < seconds[-1] <= finished.summary["train/seconds"]
    assert all(line["time/samples_per_second"] > 0 and line["memory/peak_mib"] > 50 for line in finished.metrics)


def test_a_companion_says_how_it_is_made(finished: Result) -> None:
    """Its command is not that of the run which made it on the way."""
    for run_dir in (finished.run_dir.parent.parent / "digits-ssm_probe-fixed").iterdir():
        program, script, *words = shlex.split(json.loads((run_dir / "provenance.json").read_text())["command"])
        assert (program, script) == ("python", "train.py")
        assert resolve_train(words)[0].directory == run_dir


def test_the_confusion_matrix_has_the_test_split(finished: Result) -> None:
    with np.load(finished.run_dir / "arrays" / "confusion.npz", allow_pickle=False) as arrays:
        confusion = arrays["confusion"]
    assert confusion.sum() == 360
    assert np.trace(confusion) / confusion.sum() == pytest.approx(finished.summary["test/accuracy"], abs=1e-6)


def test_control_and_refit_are_runs_under_the_same_schedule(finished: Result) -> None:
    folder = finished.run_dir.parent.parent / "digits-ssm_probe-fixed"
    runs = {path.name: Result(0, "", "", path) for path in folder.iterdir()}
    assert len(runs) == 2
    orders = []
    for run in runs.values():
        config = run.config
        orders.append(config["method"]["order"])
        for group in ("model", "data", "optim", "trainer"):
            assert config[group] == finished.config[group]
    with np.load(finished.run_dir / "arrays" / "order.npz") as arrays:
        assert arrays["order"].tolist() in orders
    assert "row" in orders


def test_a_finished_run_is_found_and_its_control_reused(finished: Result) -> None:
    runs = finished.run_dir.parents[2]
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("summary.json")}
    again = train(runs, "trainer.log_every_n_steps=1", steps=STEPS)
    assert again.code == 0
    assert "finished" in again.out
    assert again.out.splitlines()[-1] == f"run: {finished.run_dir}"
    other = train(runs, "trainer.log_every_n_steps=1", "method=fixed", steps=STEPS)
    assert "finished" in other.out, "the control is the same run as method=fixed"
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("summary.json")}


def test_eval_prints_the_same_numbers(finished: Result, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("eval", [f"run={finished.run_dir}"]) == 0
    out = capsys.readouterr().out
    printed = dict(re.findall(r"^(test/\S+)\s+(\S+)$", out, flags=re.MULTILINE))
    assert len(printed) == 4
    for name, value in printed.items():
        assert float(value) == pytest.approx(finished.summary[name], abs=1e-6)
    assert out.splitlines()[-1] == f"run: {finished.run_dir}"


def test_pictures_can_wait_and_are_drawn_from_the_files_of_the_run(
    finished: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, "task.control=false")
    assert run.run_dir.name == train(tmp_path, "task.control=false", "figures=true").run_dir.name, "the same run"
    assert not (run.run_dir / "figures").exists()
    assert main("eval", [f"run={run.run_dir}", "figures=true"]) == 0
    drawn = re.findall(r"^picture: (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert sorted(drawn) == sorted(str(path) for path in (run.run_dir / "figures").iterdir())
    assert run.run_dir / "figures" / "order.png" in map(Path, drawn)


def test_eval_uploads_a_finished_run(
    finished: Result, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permlab.run.evaluation, "replay", lambda run_dir: len(finished.metrics))
    assert main("eval", [f"run={finished.run_dir}", "upload=true"]) == 0
    assert f"uploaded {STEPS} rows" in capsys.readouterr().out

    def refuse(run_dir: Path) -> int:
        raise PermissionError("not logged in")

    monkeypatch.setattr(permlab.run.evaluation, "replay", refuse)
    assert main("eval", [f"run={finished.run_dir}", "upload=true"]) == 2
    assert "error: upload=true: PermissionError: not logged in" in capsys.readouterr().err


def test_the_picked_model_is_the_best_on_validation(finished: Result, capsys: pytest.CaptureFixture[str]) -> None:
    best = max(line["val/accuracy"] for line in finished.metrics if "val/accuracy" in line)
    assert finished.summary["val/accuracy"] == pytest.approx(best)
    main("eval", [f"run={finished.run_dir}", "split=val"])
    assert f"{best:.6f}"[:7] in capsys.readouterr().out


def test_every_checkpoint_loads_without_unpickling(finished: Result) -> None:
    paths = list(finished.run_dir.rglob("*.ckpt"))
    assert sorted(path.name for path in paths) == ["best.ckpt", "last-1.ckpt", "last.ckpt"]
    for path in paths:
        state = torch.load(path, weights_only=True)["state_dict"]
        assert any(name.startswith("method.") for name in state)


STOPS = [(20, 5, 0), (80, 33, 0), (80, 66, 2)]
RESUMED = [(*stop, method) for stop in STOPS for method in ("sinkhorn_ste", "reorder")]


@pytest.mark.parametrize(("steps", "stop", "workers", "method"), RESUMED if FULL else RESUMED[::3] + RESUMED[4:5])
def test_a_stopped_run_resumes_bit_for_bit(
    steps: int, stop: int, workers: int, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """33 batches are an epoch: 33 and 66 stop at the end of one, 5 in the middle."""
    options = ("task.control=false", f"method={method}", "trainer.log_every_n_steps=1", f"data.num_workers={workers}")
    whole = train(tmp_path / "whole", *options, steps=steps)
    build = permlab.run.trainer._callbacks
    monkeypatch.setattr(permlab.run.trainer, "_callbacks", lambda *parts: [*build(*parts), StopAt(stop)])
    stopped = train(tmp_path / "stopped", *options, steps=steps)
    assert stopped.code == 143
    assert stopped.err.startswith("error: interrupted")
    assert not (stopped.run_dir / "DONE").exists()
    assert len(stopped.metrics) == stop
    monkeypatch.setattr(permlab.run.trainer, "_callbacks", build)
    resumed = train(tmp_path / "stopped", *options, steps=steps)
    assert resumed.code == 0, resumed.err
    assert resumed.log == whole.log
    for name in ("last", "best"):
        ours, theirs = (
            torch.load(run.run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
            for run in (resumed, whole)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_resuming_from_a_named_checkpoint(finished: Result, tmp_path: Path) -> None:
    checkpoint = finished.run_dir / "checkpoints" / "last.ckpt"
    longer = train(tmp_path, f"ckpt_path={checkpoint}", "task.control=false", "trainer.log_every_n_steps=1", steps=60)
    assert longer.code == 0, longer.err
    assert longer.metrics[0]["step"] == STEPS + 1


def test_a_checkpoint_of_another_model_is_refused(finished: Result, tmp_path: Path) -> None:
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    result = train(tmp_path / "runs", f"ckpt_path={tmp_path / 'bad.ckpt'}", "task.control=false")
    assert result.code == 2
    assert "bad.ckpt" in result.err
    assert result.err.count("\n") == 1


def test_a_diverging_run_stops_and_names_the_culprit(tmp_path: Path) -> None:
    result = train(
        tmp_path,
        "optim.lr=1000",
        "optim.weight_decay=1000",
        "task.control=false",
        "model=vit_nano",
        "optim.schedule=constant",
        steps=40,
    )
    assert result.code == 1
    assert re.match(r"error: step \d+: ", result.err)
    assert "optim.lr" in result.err
    assert "non-finite" in result.err or "gradient norm" in result.err
    assert (result.run_dir / "FAILED").read_text().startswith("NonFiniteError")
    assert not (result.run_dir / "DONE").exists()


def test_a_step_without_a_finite_loss_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            if trainer.global_step == 30:
                with torch.no_grad():
                    pl_module.model.head.weight[0, 0] = math.nan

    build = permlab.run.trainer._callbacks
    monkeypatch.setattr(permlab.run.trainer, "_callbacks", lambda *parts: [*build(*parts), Poison()])
    result = train(tmp_path, "task.control=false", "trainer.val_check_interval=10", steps=40)
    assert result.code == 1
    assert "step 30" in result.err
    assert "weight model.head.weight" in result.err
    checkpoint = torch.load(result.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 30
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_an_order_that_depends_on_the_image_has_no_refit(tmp_path: Path) -> None:
    result = train(tmp_path, "method=sort_ste", "method.scorer=mlp", "model=vit_nano", "data.batch_size=512")
    assert result.code == 0, result.err
    assert "test/accuracy_control" in result.summary
    assert "test/accuracy_refit" not in result.summary


def test_the_last_step_is_validated_wherever_the_interval_falls(finished: Result) -> None:
    validated = [line["step"] for line in finished.metrics if "val/accuracy" in line]
    assert validated == [20, 40, STEPS]


def test_accumulation_counts_optimiser_steps(tmp_path: Path) -> None:
    result = train(tmp_path, "trainer.accumulate_grad_batches=3", "task.control=false", steps=6)
    assert result.code == 0, result.err
    assert result.summary["train/steps"] == 6


def test_epochs_instead_of_steps(tmp_path: Path) -> None:
    result = train(tmp_path, "trainer.max_epochs=2", "task.control=false", "data.batch_size=128", steps=-1)
    assert result.code == 0, result.err
    assert result.summary["train/steps"] == 2 * (1797 * 3 // 5 // 128)
