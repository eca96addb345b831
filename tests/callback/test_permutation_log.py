"""What is recorded of a permutation is what the method had, and recording changes nothing."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from permlab.callback.permutation_log import PermutationLog
from permlab.method.base import Method
from permlab.permutation import Site
from permlab.record.rundir import read_metrics
from permlab.record.stored import read_snapshots
from permlab.record.tracking import RunLogger

N = 6


class Toy(Method):
    """Scores that move by one place per step, or that are the items themselves."""

    def __init__(self, needs_items: bool) -> None:
        super().__init__(Site("patches", torch.arange(N)), temperature=0.5)
        self.needs_items = needs_items
        self.table = nn.Parameter(torch.linspace(1, -1, N))

    def scores(self, items: Tensor | None = None) -> Tensor:
        return items.mean(-1) if self.needs_items else self.table

    def best(self, items: Tensor | None = None) -> Tensor:
        return self.scores(items).argsort(dim=-1, descending=True)

    def soft_matrix(self, items: Tensor | None = None) -> Tensor:
        scores = self.scores(items)
        return torch.softmax(-(scores.sort(descending=True).values.unsqueeze(-1) - scores.unsqueeze(-2)).abs(), -1)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(N, 3))

    def embed(self, inputs: Tensor) -> Tensor:
        return self.noise(inputs * self.weight)


class Task(L.LightningModule):
    def __init__(self, needs_items: bool = False, stop_at: int = -1) -> None:
        super().__init__()
        self.model, self.method, self.stop_at = Body(), Toy(needs_items), stop_at
        self.tables: list[Tensor] = []

    def items(self, inputs: Tensor) -> Tensor:
        return self.model.embed(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.tables.append(self.method.table.detach().clone())
        if self.global_step == self.stop_at:
            self.trainer.should_stop = True
        pull = torch.arange(N, dtype=torch.float32).roll(self.global_step)
        return self.model.embed(batch[0]).mean() - (pull * self.method.table).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(run_dir: Path, task: Task, *, steps: int, log: bool = True, snapshots: int = 4, **options: Any) -> L.Trainer:
    torch.manual_seed(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    inputs = torch.randn(64, N, 3)
    wandb = {"mode": "disabled", "project": "p", "entity": None, "tags": [], "log_artifacts": False}
    logger = RunLogger(run_dir, config={}, group="g", job_type="t", **wandb) if log else False
    recorder = PermutationLog(run_dir, grid=(2, 3), mean_image=np.ones((4, 6)), num_snapshots=snapshots)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=logger,
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([recorder] if snapshots else []), *options.pop("callbacks", [])],
        enable_checkpointing=options.pop("enable_checkpointing", False),
        **{key: value for key, value in options.items() if key != "ckpt_path"},
    )
    trainer.fit(task, DataLoader(TensorDataset(inputs), batch_size=16), ckpt_path=options.get("ckpt_path"))
    return trainer


def test_snapshots_are_the_states_after_their_steps(tmp_path: Path) -> None:
    task = Task()
    fit(tmp_path, task, steps=21)
    snapshots = read_snapshots(tmp_path)
    assert [int(snapshot["step"]) for snapshot in snapshots] == [0, 5, 10, 15, 20, 21]
    states = [*task.tables, task.method.table.detach()]
    for snapshot in snapshots:
        table = states[int(snapshot["step"])]
        np.testing.assert_array_equal(snapshot["scores"], table)
        assert snapshot["order"].tolist() == sorted(range(N), key=lambda item, table=table: -table[item].item())
        assert snapshot["soft"].shape == (N, N)
        assert snapshot["soft"].dtype == np.float32
    assert len({tuple(snapshot["order"]) for snapshot in snapshots}) > 1
    with np.load(tmp_path / "arrays" / "grid.npz") as grid:
        assert grid["grid"].tolist() == [2, 3]
        assert grid["start_order"].tolist() == list(range(N))
        assert grid["mean_image"].shape == (4, 6)


def test_statistics_are_logged_under_the_number_of_steps_done(tmp_path: Path) -> None:
    task = Task()
    fit(tmp_path, task, steps=12)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [5, 10]
    expected = {f"permutation/{name}" for name in ("entropy", "temperature", "kendall", "displacement")}
    assert all(set(record) - {"step"} == expected for record in records)
    order = task.tables[10].argsort(descending=True)
    assert records[1]["permutation/displacement"] == pytest.approx(
        np.mean([abs(slot - int(item)) for slot, item in enumerate(order)])
    )
    assert records[1]["permutation/temperature"] == 0.5


def test_accumulated_batches_are_recorded_once_per_step(tmp_path: Path) -> None:
    fit(tmp_path, Task(), steps=5, snapshots=5, accumulate_grad_batches=3)
    assert [int(snapshot["step"]) for snapshot in read_snapshots(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert [record["step"] for record in read_metrics(tmp_path)] == [5]


@pytest.mark.parametrize("needs_items", [False, True])
def test_recording_changes_nothing(tmp_path: Path, needs_items: bool) -> None:
    with_it, without = Task(needs_items), Task(needs_items)
    fit(tmp_path / "a", with_it, steps=10)
    fit(tmp_path / "b", without, steps=10, snapshots=0)
    assert torch.equal(with_it.model.weight, without.model.weight)
    assert with_it.model.training


def test_orders_of_single_images(tmp_path: Path) -> None:
    task = Task(needs_items=True)
    fit(tmp_path, task, steps=4)
    torch.manual_seed(0)
    first_batch = torch.randn(64, N, 3)[:16]
    snapshot = read_snapshots(tmp_path)[0]
    scores = first_batch.mean(-1)  # of the untouched weights, which are one, without dropout
    assert snapshot["order"].tolist() == scores[:8].argsort(descending=True).tolist()
    np.testing.assert_allclose(snapshot["scores"], scores.mean(0), atol=1e-6)
    assert snapshot["soft"].shape == (N, N)
    np.testing.assert_allclose(snapshot["soft"].sum(-1), 1, atol=1e-5)


def test_a_training_that_stops_early_keeps_its_last_state(tmp_path: Path) -> None:
    task = Task(stop_at=6)
    trainer = fit(tmp_path, task, steps=20)
    assert trainer.global_step == 7
    snapshots = read_snapshots(tmp_path)
    assert [int(snapshot["step"]) for snapshot in snapshots] == [0, 5, 7]
    np.testing.assert_array_equal(snapshots[-1]["scores"], task.method.table.detach())


def test_a_resumed_training_adds_what_was_missing(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    fit(tmp_path / "whole", Task(), steps=16, callbacks=[checkpoint], enable_checkpointing=True)
    fit(tmp_path / "resumed", Task(), steps=16, ckpt_path=tmp_path / "step=8.ckpt")
    whole, resumed = read_snapshots(tmp_path / "whole"), read_snapshots(tmp_path / "resumed")
    assert [int(snapshot["step"]) for snapshot in whole] == [0, 4, 8, 12, 16]
    assert [int(snapshot["step"]) for snapshot in resumed] == [12, 16]
    for ours, theirs in zip(resumed, whole[-2:], strict=True):
        np.testing.assert_array_equal(ours["scores"], theirs["scores"])


def test_without_a_logger_there_are_still_snapshots(tmp_path: Path) -> None:
    fit(tmp_path, Task(), steps=5, log=False)
    assert len(read_snapshots(tmp_path)) == 6
    assert not (tmp_path / "metrics.jsonl").exists()
