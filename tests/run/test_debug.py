"""Presets for debugging, Lightning's switches for the same, and that such a run is taken for no other."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import Result, data_module

from permlab.cli import main
from permlab.config.compose import resolve_train
from permlab.config.identity import digest
from permlab.config.schema import added_later, component_names
from permlab.data.loader import Loader
from permlab.run.companion import companion_plan


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("permlab.run.story.draw_all", lambda run_dir: [])
        yield


def run(folder: Path, *words: str) -> Result:
    """As `runs.train`, but with the preset's number of steps."""
    words = (f"paths.runs={folder}", "task.control=false", *words)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main("train", words)
    return Result(code, out.getvalue(), err.getvalue(), resolve_train(words)[0].directory)


def test_one_batch_of_everything(tmp_path: Path) -> None:
    first = run(tmp_path, "debug=fdr", "data.batch_size=16")
    assert first.code == 0, first.err
    assert first.summary["train/steps"] == 1
    count = round(first.summary["test/accuracy"] * 16, 6)
    assert count == int(count), "of one batch"
    again = run(tmp_path, "debug=fdr", "data.batch_size=16")
    assert "is finished" not in again.out, "whoever debugs has changed the code"
    assert again.run_dir == first.run_dir


@pytest.mark.parametrize("name", component_names("debug"))
def test_a_run_for_debugging_is_taken_for_no_other(name: str) -> None:
    plan, warnings = resolve_train([f"debug={name}"])
    assert not warnings
    assert plan.config["debug"] == name
    assert plan.directory.parts[:2] == ("runs", "debug")
    same = {key: value for key, value in plan.config.items() if key != "debug"}
    assert digest(same) != plan.digest, "though nothing else may tell them apart"


@pytest.mark.parametrize("task", ["classify", "prune"])
def test_companions_are_for_debugging_too_but_neither_repeated_nor_profiled(task: str) -> None:
    plan, _ = resolve_train(["debug=fdr", f"task={task}", "trainer.profiler=simple"])
    companions = {**plan.task.before(plan), **plan.task.beside(plan, {})}
    assert companions
    for companion in companions.values():
        other = companion_plan(plan, companion)
        assert other.config["debug"] == "fdr"
        assert other.config["trainer"]["max_steps"] == 1
        assert other.config["trainer"]["limit_train_batches"] == 1
        assert (other.config["force"], other.config["trainer"]["profiler"]) == (False, None)
        assert other.directory.parts[:2] == ("runs", "debug")


def test_runs_made_before_these_options_keep_their_names() -> None:
    plan, _ = resolve_train([])
    new = added_later("trainer", None)
    assert {"limit_train_batches", "overfit_batches", "profiler", "detect_anomaly"} <= set(new)
    before = {**plan.config, "trainer": {k: v for k, v in plan.config["trainer"].items() if k not in new}}
    assert "debug" not in before
    assert digest(before) == plan.digest
    for word in ("trainer.limit_train_batches=3", "trainer.overfit_batches=2", "trainer.detect_anomaly=true"):
        assert resolve_train([word])[0].digest != plan.digest, word
    for word in ("trainer.profiler=simple", "logger=csv", "logger=none"):
        assert resolve_train([word])[0].digest == plan.digest, word


# Lightning's switches


@pytest.mark.parametrize("profiler", ["simple", "advanced", "pytorch"])
def test_a_profile_is_printed_and_kept(profiler: str, tmp_path: Path) -> None:
    result = run(tmp_path, "debug=fdr", f"trainer.profiler={profiler}", "data.batch_size=16")
    assert result.code == 0, result.err
    path = result.run_dir / "profile" / f"fit-{profiler}.txt"
    assert re.search(rf"^profile: {path} \(\d+ lines\)$", result.out, re.MULTILINE)
    shown, text = result.out.splitlines(), path.read_text().splitlines()
    assert text[0] in shown
    assert len(shown) < 40 < len(text) + 20


def test_a_part_that_is_no_batch_is_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "trainer.limit_train_batches=0.001", "trainer.max_steps=2", "logger=none")
    assert result.code in (1, 2)
    assert result.err.count("\n") == 1, result.err
    assert "limit_train_batches" in result.err


def test_overfitting_repeats_its_batches() -> None:
    dataset = [*range(40)]
    loaders = [Loader(dataset, batch_size=8, seed=1, shuffle=True, repeat=repeat) for repeat in (True, False)]  # type: ignore[arg-type]
    assert loaders[0].batches(0) == loaders[0].batches(5) == loaders[1].batches(0) != loaders[1].batches(5)
    data = data_module(resolve_train([])[0].config)
    for overfit in (0, 3):
        data.trainer = SimpleNamespace(global_rank=0, world_size=1, num_devices=1, overfit_batches=overfit)
        assert data.train_dataloader().repeat == bool(overfit)


def test_a_run_sees_the_same_few_batches_in_every_epoch(tmp_path: Path) -> None:
    words = ("debug=overfit", "trainer.max_steps=6", "trainer.overfit_batches=2", "optim.lr=1e-12", "method=fixed")
    result = run(tmp_path, *words, "data.batch_size=8")
    assert result.code == 0, result.err
    first, second, *others = [line["train/loss"] for line in result.metrics if "train/loss" in line]
    assert first != second
    assert others == pytest.approx([first, second] * 2, abs=1e-6)


def test_what_overfitting_replaces_has_no_effect() -> None:
    _, warnings = resolve_train(["trainer.overfit_batches=2", "trainer.limit_val_batches=3"])
    assert warnings == ["trainer.limit_val_batches=3 has no effect with trainer.overfit_batches=2"]
