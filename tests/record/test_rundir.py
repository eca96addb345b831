"""Files of a run: atomic, strict, resumable, and readable without torch."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from permlab.record.rundir import (
    MetricsFile,
    clear_run,
    complete_run,
    fail_run,
    is_done,
    is_rank_zero,
    read_metrics,
    read_summary,
    start_run,
    truncate_metrics,
    write_json,
    write_npz,
    write_text,
)

CONFIG = {"seed": 1, "method": {"name": "fixed", "order": [1, 0]}, "logger": {"tags": []}}


def strict_json(text: str):
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_importing_the_file_functions_does_not_import_torch() -> None:
    heavy = {"torch", "lightning", "matplotlib", "wandb"}
    imports = "import sys, permlab.record.rundir, permlab.record.provenance, permlab.record.stored"
    code = f"{imports}; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_life_of_a_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "classify" / "seed=0-12345678"
    assert not is_done(run_dir)
    start_run(run_dir, CONFIG, device="cpu, 2 threads")
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == CONFIG
    assert strict_json((run_dir / "provenance.json").read_text())["device"] == "cpu, 2 threads"
    fail_run(run_dir, "ValueError: no")
    assert (run_dir / "FAILED").read_text() == "ValueError: no\n"
    assert not is_done(run_dir)
    start_run(run_dir, CONFIG)
    assert not (run_dir / "FAILED").exists()
    complete_run(run_dir, {"test/accuracy": 0.5, "val/loss": math.inf})
    assert is_done(run_dir)
    assert read_summary(run_dir) == {"test/accuracy": 0.5, "val/loss": math.inf}


def test_a_run_that_starts_again_is_not_done(tmp_path: Path) -> None:
    start_run(tmp_path, CONFIG)
    complete_run(tmp_path, {})
    start_run(tmp_path, CONFIG)
    assert not is_done(tmp_path)


def test_clear_run_deletes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    start_run(tmp_path, CONFIG)
    MetricsFile(tmp_path / "metrics.jsonl").update(1, {"a": 1.0})
    for name in ("arrays/x.npz", "checkpoints/last.ckpt", "figures/order.png", "wandb/run/x", "notes.txt", "mine/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    complete_run(tmp_path, {})
    clear_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "notes.txt"]


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_rank_zero_from_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert is_rank_zero()
    monkeypatch.setenv(variable, "0")
    assert is_rank_zero()
    monkeypatch.setenv(variable, "3")
    assert not is_rank_zero()


# Atomic writing


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_have_the_permissions_of_ordinary_ones(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_json_is_strict_and_takes_arrays_and_tensors(tmp_path: Path) -> None:
    value = {
        "nan": math.nan,
        "inf": np.float32("inf"),
        "tensor": torch.tensor(0.5, dtype=torch.bfloat16),
        "array": np.array([[1, 2]]),
        "nested": [{"minus": torch.tensor(-math.inf)}],
        "path": Path("a/b"),
        "true": np.True_,
    }
    write_json(tmp_path / "x.json", value)
    assert strict_json((tmp_path / "x.json").read_text()) == {
        "nan": "nan",
        "inf": "inf",
        "tensor": 0.5,
        "array": [[1, 2]],
        "nested": [{"minus": "-inf"}],
        "path": "a/b",
        "true": True,
    }


def test_arrays_come_back_without_unpickling(tmp_path: Path) -> None:
    write_npz(tmp_path / "arrays" / "x.npz", order=np.array([2, 0, 1]), names=np.array(["a", "b"]))
    with np.load(tmp_path / "arrays" / "x.npz", allow_pickle=False) as arrays:
        assert arrays["order"].tolist() == [2, 0, 1]
        assert arrays["names"].tolist() == ["a", "b"]


# Metrics


def test_values_of_one_step_make_one_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.update(50, {"train/loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 50, "train/loss": 2.0}]
    file.update(50, {"permutation/kendall": 0.25, "train/loss": 1.5})
    file.update(100, {"train/loss": math.nan})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strict_json(line) for line in lines] == [
        {"step": 50, "train/loss": 1.5, "permutation/kendall": 0.25},
        {"step": 100, "train/loss": "nan"},
    ]
    assert math.isnan(read_metrics(tmp_path)[1]["train/loss"])


def test_a_shorter_line_replaces_a_longer_one_completely(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.update(1, {"a": 0.123456789})
    file.update(1, {"a": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 1}\n'


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a"')
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1.0}]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    truncate_metrics(tmp_path, 10)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("tail", ["", '{"step": 45, "lo'])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path: Path, tail: str) -> None:
    def run(folder: Path, steps: range) -> None:
        file = MetricsFile(folder / "metrics.jsonl")
        for step in steps:
            file.update(step, {"loss": 1 / step})
            file.update(step, {"accuracy": step / 100})

    run(tmp_path / "whole", range(10, 60, 5))
    run(tmp_path / "resumed", range(10, 45, 5))
    path = tmp_path / "resumed" / "metrics.jsonl"
    path.write_text(path.read_text() + tail)
    truncate_metrics(tmp_path / "resumed", 25)
    run(tmp_path / "resumed", range(30, 60, 5))
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
