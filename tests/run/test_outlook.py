"""What a command is going to train, said before anything slow, and how long it takes."""

import sys
from pathlib import Path

import pytest

import permlab.run.outlook
import permlab.run.story
from permlab.cli import main
from permlab.config.compose import resolve_train
from permlab.run.companion import companion_plan
from permlab.run.outlook import Outlook, Training, announce_jobs

LENGTH = "3,000 steps, trainer.max_steps"
CONTROL = "3,000 steps; left out by task.control=false"
DENSE = "dense model (600 steps, task.dense_steps; trainer.max_steps does not shorten it)"


def outlook(*words: str, runs: Path = Path("nowhere")) -> Outlook:
    return Outlook(resolve_train([f"paths.runs={runs}", *words])[0])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], f"3 trainings on digits with ssm_probe: classify ({LENGTH}), control and refit ({CONTROL})"),
        (
            ["method=sort_ste", "method.scorer=mlp"],  # each image has its own order, and none is refit
            f"2 trainings on digits with ssm_probe: classify ({LENGTH}), control ({CONTROL})",
        ),
        (["task.control=false"], f"1 training on digits with ssm_probe: classify ({LENGTH})"),
        (["method=fixed"], f"1 training on digits with ssm_probe: classify ({LENGTH})"),
        (
            ["task.control=false", "trainer.max_steps=-1", "trainer.max_epochs=2"],
            "1 training on digits with ssm_probe: classify (2 epochs, trainer.max_epochs)",
        ),
        (["task=prune"], f"2 trainings on digits with vit_nano: {DENSE}, prune (100 steps, trainer.max_steps)"),
        (
            ["task=prune", "method=swap_search"],
            f"1 training on digits with vit_nano: {DENSE}, prune (nothing to train)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_trainings_of_a_command_are_counted(words: list[str], line: str) -> None:
    assert outlook(*words).announce() == line


def test_jobs_that_share_a_training_make_it_once() -> None:
    """Two methods, two seeds: a control for each seed, and a refit for each job, whose orders nobody knows yet."""
    jobs = [[f"method={method}", f"seed={seed}"] for method in ("sort_ste", "sinkhorn") for seed in (0, 1)]
    assert announce_jobs([None, *(outlook(*job).plan for job in jobs)]) == "5 jobs, 10 trainings to make"


def test_what_is_finished_is_not_counted(tmp_path: Path) -> None:
    plan, _ = resolve_train([f"paths.runs={tmp_path}", "task=prune"])
    (dense,) = plan.task.before(plan).values()
    folder = companion_plan(plan, dense).directory
    folder.mkdir(parents=True)
    (folder / "DONE").touch()
    assert Outlook(plan).announce() == "1 training on digits with vit_nano: prune (100 steps, trainer.max_steps)"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(permlab.run.outlook.time, "monotonic", lambda: now[0])
    return now


def test_the_forecast_is_of_this_training_and_of_what_is_left(clock: list[float]) -> None:
    three = outlook()
    clock[0] = 20.0
    # 20 s are over; 100 steps of this training and twice 3000 are left.
    assert (
        three.forecast("classify", 0.1, 100) == "classify: about 10 s for this training, 10 min for the whole command"
    )
    assert three.forecast("refit", 0.1, 100) == "refit: about 10 s for this training, 30 s for the whole command"
    alone = outlook("task.control=false")
    assert alone.forecast("classify", 0.1, 100) == "classify: about 10 s for this training"
    assert alone.forecast("another", 0.1, 100) == "another: about 10 s for this training"


def test_a_step_of_another_task_or_batch_takes_as_much_longer(clock: list[float]) -> None:
    two = outlook("task=prune", "data.batch_size=32")
    dense, pruning = two.trainings
    assert isinstance(dense, Training)
    assert pruning.effort / dense.effort == pruning.plan.task.effort * 32 / 128
    whole = 600 + 100 * pruning.effort / dense.effort
    assert f"{whole / 60:.0f} min for the whole command" in two.forecast("dense model", 1.0, 600)


def test_over_an_hour_it_says_what_to_change(clock: list[float]) -> None:
    line = outlook().forecast("classify", 1.0, 3000)
    assert line.endswith(
        "2 h 30 min for the whole command; to shorten that, change trainer.max_steps, task.control=false, "
        "or take a smaller model"
    )
    assert "task.dense_steps" in outlook("task=prune").forecast("dense model", 10.0, 600)


def test_the_line_comes_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(permlab.run.story, "train", lambda plan: print("trained"))
    assert main("train", [f"paths.runs={tmp_path}", "task.control=false"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("1 training on digits")
    assert second == "trained"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
@pytest.mark.parametrize("place", ["{file}/runs", "/proc/nowhere/runs"])
def test_a_place_where_no_folder_can_be_made_is_refused_first(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(permlab.run.story, "train", lambda plan: pytest.fail("started"))
    (tmp_path / "file").touch()
    runs = place.format(file=tmp_path / "file")
    assert main("train", [f"paths.runs={runs}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: paths.runs={runs}: no folder can be made in ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
