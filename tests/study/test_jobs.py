"""Sweeps: isolation, failures, exit codes, the table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import SHORT

from permlab.cli import main
from permlab.config.schema import CONF
from permlab.record.rundir import read_metrics
from permlab.study.table import job_table


def test_a_failed_job_does_not_stop_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["optim.lr=-1,0.03", "model=ssm_probe", "task.control=false", "trainer.max_steps=2", "seed=0,1"]
    code = main("train", ["-m", *SHORT, f"paths.runs={tmp_path}", *words])
    out, err = capfd.readouterr()
    assert code == 1
    assert err.count("error: optim.lr=-1") == 2
    assert len(list(tmp_path.rglob("DONE"))) == 2
    rows = out.splitlines()[-5:]
    assert rows[0].startswith("optim.lr=-1 seed=0")
    assert rows[0].endswith("failed (exit 2)")
    assert rows[-1].startswith("optim.lr=0.03 (2 seeds)")
    assert "+-" in rows[-1]


def test_the_rank_of_a_launcher_around_a_sweep_does_not_reach_its_jobs(tmp_path: Path) -> None:
    """In a process of its own: libraries read their rank when the server of the jobs imports them."""
    words = ["model=ssm_probe", "task.control=false", "trainer.max_steps=2", "trainer.log_every_n_steps=1", "seed=0,1"]
    command = [sys.executable, CONF.parent / "train.py", "-m", *SHORT, f"paths.runs={tmp_path}", *words]
    subprocess.run(command, env={**os.environ, "LOCAL_RANK": "1"}, check=True, capture_output=True)
    assert [len(read_metrics(path.parent)) for path in tmp_path.rglob("DONE")] == [2, 2]


def test_data_parallel_jobs_do_not_repeat_the_sweep(tmp_path: Path) -> None:
    """In one process, a job's second rank would run the whole sweep again, and its rank reach the next job."""
    words = ["trainer=ddp", "trainer.accelerator=cpu", "task.control=false", "trainer.max_steps=2", "seed=0,1"]
    assert main("train", ["-m", *SHORT, f"paths.runs={tmp_path}", *words]) == 0
    done = list(tmp_path.rglob("DONE"))
    assert sorted(path.parent.name[:6] for path in done) == ["seed=0", "seed=1"]
    assert len(list(tmp_path.rglob("config.yaml"))) == 2


def test_a_sweep_without_one_usable_job_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main("train", ["-m", f"paths.runs={tmp_path / 'runs'}", "method=sinkhron", "seed=0,1"])
    assert code == 2
    assert capsys.readouterr().err.count("error: method=sinkhron") == 2
    assert not (tmp_path / "runs").exists()


def test_the_table_names_only_what_differs() -> None:
    jobs = [["a=1", "seed=0"], ["a=1", "seed=1"]]
    assert job_table(jobs, [None, None], [2, 2]).splitlines()[1].split("  ")[0] == "seed=0"
