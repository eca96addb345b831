"""Two processes (gloo): ranks agree on order, temperature, baseline and run directory."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from ranks import fork, launch

from permlab.cli import main
from permlab.config.schema import CONF
from permlab.record.checkpoint import newest_state
from permlab.record.rundir import read_metrics, reproducible
from soak import compare

# Run by both ranks: the real command line, with a callback that compares the ranks after every batch.

WORDS = [
    *[
        "trainer.max_steps=6",
        "trainer.log_every_n_steps=1",
        "logger.mode=disabled",
        "checkpoint.every_n_steps=2",
        "figures=false",
    ],
    *["method=reorder", "method.baseline=ema", "method.num_samples=2", "method.warmup_fraction=0.2"],
]
RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "data.batch_size=32"]


def run_ranks(folder: Path, *words: str, launched: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    start = launch if launched else fork
    return start([*RANKS, *WORDS, *words, f"paths.runs={folder / 'runs'}"], folder, variables)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("ddp")
    return folder, run_ranks(folder)


def test_ranks_agree_after_every_step(result: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, process = result
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("agree") == 3 * 6  # learned, control, refit


@pytest.mark.parametrize("advice", ["sync_dist", "Initializing distributed", "num_workers", "worker processes"])
def test_advice_of_libraries_that_is_no_news_is_not_passed_on(
    result: tuple[Path, subprocess.CompletedProcess[str]], advice: str
) -> None:
    assert advice not in result[1].stderr


def test_ranks_share_one_directory_and_eval_needs_only_one_of_them(
    result: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, process = result
    done = list((folder / "runs").rglob("DONE"))
    assert len(done) == len(list((folder / "runs").rglob("config.yaml"))) == 3, process.stderr[-3000:]
    learned = next(path.parent for path in done if "reorder" in str(path))
    summary = json.loads((learned / "summary.json").read_text())
    assert {"test/accuracy", "test/accuracy_control", "test/accuracy_refit"} <= set(summary)
    assert process.stdout.count("run: ") == 1, "only rank 0 prints"
    assert main("eval", [f"run={learned}"]) == 0  # in this one process, to the same numbers
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("test/"))
    assert len(printed) == 4
    assert all(float(value) == pytest.approx(summary[name], abs=1e-6) for name, value in printed.items())
    steps = [json.loads(line)["step"] for line in (learned / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_metrics_are_those_of_one_process_with_the_same_global_batch(
    result: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = result
    assert main("train", [*WORDS, "data.batch_size=64", "task.control=false", f"paths.runs={tmp_path}"]) == 0
    (one,) = tmp_path.rglob("DONE")
    two = next(path.parent for path in (folder / "runs").rglob("DONE") if "reorder" in str(path))
    ours, theirs = ([reproducible(row) for row in read_metrics(run_dir)] for run_dir in (one.parent, two))
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_an_interrupted_run_ends_as_one_that_was_not(
    result: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """SIGTERM reaches rank 0 only; both stop at the same step, exit 143, and go on from there."""
    stopped = run_ranks(tmp_path, STOP_AT="3")
    assert stopped.returncode == 143, stopped.stderr[-3000:]
    assert not list(tmp_path.rglob("DONE"))
    resumed = run_ranks(tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert stopped.stdout.count("agree") + resumed.stdout.count("agree") == 3 * 6, "no step is made twice"
    assert compare(result[0] / "runs", tmp_path / "runs") == []


@pytest.mark.parametrize("task", sorted(path.stem for path in (CONF / "task").glob("*.yaml")))
def test_ranks_agree_at_every_task(task: str, tmp_path: Path) -> None:
    """Those of the runs before and beside it as well."""
    quick = ["trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    words = [f"task={task}", *RANKS, *quick, "trainer.log_every_n_steps=1", "logger.mode=disabled", "figures=false"]
    process = fork([*words, f"paths.runs={tmp_path / 'runs'}"], tmp_path, {"COMPANION_STEPS": "2"})
    assert process.returncode == 0, process.stderr[-3000:]
    done = list((tmp_path / "runs").rglob("DONE"))
    assert done
    assert process.stdout.count("run: ") == 1
    for path in done:
        assert [row["step"] for row in read_metrics(path.parent)] == [1, 2]
    assert len(re.findall(r"^agree \d", process.stdout, re.MULTILINE)) == 2 * len(done)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("DIE_AT", "error: rank 1 (process "),
        ("DRIFT_AT", "error: step 5: rank 1 differs from rank 0 in: orders"),
        ("NAN_AT", "error: step 4: the loss is nan"),
    ],
)
def test_a_rank_that_dies_or_errs_ends_the_run_with_one_line_and_a_whole_state(
    variable: str, message: str, tmp_path: Path
) -> None:
    # Those that Lightning has started are ended by it and by us.
    launched = variable == "DIE_AT"
    process = run_ranks(
        tmp_path, "task.control=false", launched=launched, **{variable: "4", "DIED": str(tmp_path / "died")}
    )
    assert process.returncode == 1, process.stderr[-3000:]
    if variable == "DIE_AT":
        assert time.time() - (tmp_path / "died").stat().st_mtime < 60
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert any(line.startswith(message) for line in lines), process.stderr[-3000:]
    assert "Traceback" not in process.stderr
    (folder,) = tmp_path.rglob("checkpoints")
    state, damaged = newest_state(folder)
    assert state is not None
    assert (state.step, damaged) == (4, {})
    assert not list(tmp_path.rglob("DONE"))
