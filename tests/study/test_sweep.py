"""Studies: grids, jobs in parallel, going on where it stopped, and the table that is written of them."""

import csv
import multiprocessing
import os
import shutil
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml
from runs import SHORT

import permlab.study.grid
import permlab.study.jobs
import permlab.sweep.__main__
from permlab.config.compose import resolve_train
from permlab.errors import ConfigError
from permlab.record.rundir import is_done, read_summary
from permlab.study.grid import read_sweep
from permlab.study.jobs import resolve_jobs, run_jobs, worst_code
from permlab.sweep.__main__ import main

GRID = {
    "program": "train.py",
    "method": "grid",
    "parameters": {
        "method": {"values": ["fixed", "sort_ste"]},
        "task.control": {"value": False},
        "optim.lr": {"values": [0.01, 1e-5]},
        "seed": {"values": [0, 1]},
    },
}


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sweeps"
    folder.mkdir()
    monkeypatch.setattr(permlab.study.grid, "SWEEPS", folder)
    monkeypatch.setattr(permlab.sweep.__main__, "RESULTS", tmp_path / "results")
    return folder


def write(folder: Path, name: str, content: object) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


# Reading


def test_the_last_parameter_varies_fastest(sweeps: Path) -> None:
    write(sweeps, "grid", GRID)
    assert read_sweep("grid") == [
        [f"method={method}", "task.control=false", f"optim.lr={lr}", f"seed={seed}"]
        for method in ("fixed", "sort_ste")
        for lr in ("0.01", "1e-05")
        for seed in (0, 1)
    ]


def test_values_of_every_kind_survive_the_way_through_the_command_line(sweeps: Path) -> None:
    values = {
        "method": "sinkhorn",
        "method.temperature": {"kind": "linear", "start": 1.0, "end": 0.1},
        "task.sites": ["mlp.fc2", "attn.qkv"],
        "task": "prune",
        "task.sequence_length": None,
        "task.within_heads": True,
        "method.order": "random(3)",
        "task.distill_weight": 1e-5,
        "task.num_groups": 2,
    }
    parameters = {key: {"value": value} for key, value in values.items()}
    write(sweeps, "kinds", GRID | {"parameters": parameters})
    (job,) = read_sweep("kinds")
    plan, warnings = resolve_train(job)
    config = plan.config
    assert not warnings
    for key, value in values.items():
        group, _, name = key.partition(".")
        assert (config[group][name] if name else config[group]["name"]) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GRID | {"method": "bayes"}, "bad.yaml: method=bayes; only a grid"),
        (GRID | {"parameters": {"optim.lr": {"min": 0.1, "max": 1}}}, "bad.yaml: parameters.optim.lr="),
        (GRID | {"parameters": {"optim.lr": {"values": []}}}, "expected value or values"),
    ],
)
def test_what_is_no_grid_is_refused(
    content: object, message: str, sweeps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(sweeps, "bad", content)
    assert main(["bad"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_name_is_answered_with_the_nearest(sweeps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(sweeps, "prune_digits", GRID)
    with pytest.raises(ConfigError, match="NAME=prune_digit: no such sweep; nearest valid choice: prune_digits"):
        read_sweep("prune_digit")
    assert main(["--study", "prane"]) == 2
    assert "--study prane: no sweep's name begins so; nearest valid choice: prune" in capsys.readouterr().err
    for name in ("prune_text", "prune_digits_2", "other"):
        write(sweeps, name, GRID)
    with pytest.raises(ConfigError, match=r"nearest valid choices: prune_text, other, prune_digits$"):
        read_sweep("text")


def test_without_a_name_sweeps_are_listed_with_their_comments(sweeps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sweeps / "prune_text.yaml").write_text("# which importance (text, 2:4)\nmethod: grid\n")
    (sweeps / "longer_name.yaml").write_text("# another question\nmethod: grid\n")
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == ["longer_name  another question", "prune_text   which importance (text, 2:4)"]
    assert "NAME=" in out.splitlines()[2]
    assert err == ""


def test_without_a_name_studies_are_listed(sweeps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("real_llm_1_pruners", "real_llm_2_methods", "real_vit_1_pruners", "ablate_prune_1"):
        write(sweeps, name, GRID)
    assert main(["--study"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        "ablate    sweeps: 1, jobs: 8",
        "real      sweeps: 3, jobs: 24",
        "real_llm  sweeps: 2, jobs: 16",
        "real_vit  sweeps: 1, jobs: 8",
    ]
    assert "--study <name>" in lines[-1]
    assert main(["--study", "real_lm"]) == 2
    assert capsys.readouterr().err.strip().endswith("nearest valid choice: real_llm")


# Running


def test_a_study_runs_in_parallel_and_goes_on_where_it_stopped(
    sweeps: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two sweeps make a study; of one configuration every job is refused, which stops no other."""
    parameters = {"method": {"values": ["fixed", "sort_ste"]}, "seed": {"value": 0}}
    write(sweeps, "tiny_1", GRID | {"parameters": parameters})
    write(
        sweeps,
        "tiny_2",
        GRID | {"parameters": parameters | {"method": {"value": "sort_ste"}, "optim.lr": {"value": -1}}},
    )
    write(sweeps, "other", GRID)
    shared = [*SHORT, "task.control=false", "trainer.max_steps=2", f"paths.runs={tmp_path / 'runs'}"]
    arguments = ["--study", "tiny", "--processes", "2", *(word for key in shared for word in ("--set", key))]
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert err.count("error: ") == 1
    assert "optim.lr=-1" in err
    done = list((tmp_path / "runs").rglob("DONE"))
    assert len(done) == 2
    assert all("[" in line and "exit 0" in line for line in out.splitlines() if " min, " in line)
    text = (tmp_path / "results" / "tiny.md").read_text()
    assert text.strip() in out
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:] == [
        "fixed",
        "sort_ste",
    ]
    with (tmp_path / "results" / "tiny.csv").open() as file:
        records = list(csv.DictReader(file))
    for record in records:
        words = ["num_threads=1", f"method={record['row']}", "seed=0", *shared]
        summary = read_summary(resolve_train(words)[0].directory)
        assert float(record["test/accuracy"]) == summary["test/accuracy"]

    before = {path: path.stat().st_mtime_ns for path in done}
    (tmp_path / "results" / "tiny.md").unlink()
    assert main(arguments) == 2
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("DONE")}
    assert (tmp_path / "results" / "tiny.md").read_text() == text
    assert " min, " not in capfd.readouterr().out, "no job was started"

    (tmp_path / "results" / "tiny.csv").unlink()
    assert main([*arguments, "--table"]) == 0
    assert (tmp_path / "results" / "tiny.csv").is_file()

    # On another machine, where only the results are: nothing is run again, and the table is the same.
    (tmp_path / "runs").rename(tmp_path / "far")
    capfd.readouterr()
    assert main([*arguments, "--kept"]) == 2, "the refused job is still refused"
    assert " min, " not in capfd.readouterr().out, "no job was started"
    assert not list((tmp_path / "runs").rglob("DONE"))
    assert (tmp_path / "results" / "tiny.md").read_text() == text
    assert main([*arguments, "--table"]) == 0
    assert "nothing of it has been run" in capfd.readouterr().out
    assert (tmp_path / "results" / "tiny.md").read_text() == text, "a table is not exchanged for none"
    one = next(path.parent for path in (tmp_path / "far").rglob("DONE") if "sort_ste" in str(path))
    shutil.copytree(one, tmp_path / "runs" / one.relative_to(tmp_path / "far"))
    assert main([*arguments, "--table"]) == 0
    table = (tmp_path / "results" / "tiny.md").read_text()
    assert "sort_ste" in table
    assert "fixed" not in table, "without --kept only what lies here counts"
    assert main([*arguments, "--table", "--kept"]) == 0
    assert (tmp_path / "results" / "tiny.md").read_text() == text, "its lines have stayed"


def linger(seconds: float, code: int) -> None:
    time.sleep(seconds)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def fork(seconds: float, code: int) -> BaseProcess:
    # Not with the handler that a training in this process may have left.
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    process = multiprocessing.get_context("fork").Process(target=linger, args=(seconds, code))
    process.start()
    signal.signal(signal.SIGTERM, previous)
    return process


def test_codes_are_in_the_order_of_the_jobs_and_a_killed_job_counts_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(main: object, name: str, job: list[str]):
        started.append(fork(*plans[int(job[0].split("=")[1])]))
        alive.append(sum(process.is_alive() for process in started))
        return started[-1]

    plans, started, alive = [(0.3, 0), (0.05, 1), (0.1, -signal.SIGKILL), (0.05, 3)], [], []
    monkeypatch.setattr(permlab.study.jobs, "start_job", start)
    jobs = [[f"seed={index}", f"paths.runs={tmp_path}"] for index in range(4)]
    found = run_jobs(main, "train", jobs, resolve_jobs("train", jobs), num_processes=2)
    assert found == [0, 1, 137, 3]
    assert max(alive) == 2
    assert capsys.readouterr().out.count(" min, exit ") == 4
    assert not is_done(resolve_train(jobs[0])[0].directory)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_job_is_the_last(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[BaseProcess] = []

    def start(main: object, name: str, job: list[str]) -> BaseProcess:
        started.append(fork(0.05, 128 + number))
        return started[-1]

    monkeypatch.setattr(permlab.study.jobs, "start_job", start)
    jobs = [[f"seed={index}", f"paths.runs={tmp_path}"] for index in range(3)]
    codes = run_jobs(main, "train", jobs, resolve_jobs("train", jobs))
    assert codes == [128 + number]
    assert len(started) == 1
    assert worst_code(codes) == 128 + number
    assert "interrupted after 1 of 3 jobs" in capsys.readouterr().out


def test_a_signal_to_the_driver_reaches_every_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[BaseProcess] = []

    def start(main: object, name: str, job: list[str]) -> BaseProcess:
        started.append(fork(60, 0))
        if len(started) == 2:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[-1]

    monkeypatch.setattr(permlab.study.jobs, "start_job", start)
    jobs = [[f"seed={index}", f"paths.runs={tmp_path}"] for index in range(3)]
    codes = run_jobs(main, "train", jobs, resolve_jobs("train", jobs), num_processes=2)
    assert codes == [143, 143]
    assert [process.exitcode for process in started] == [-signal.SIGTERM] * 2
