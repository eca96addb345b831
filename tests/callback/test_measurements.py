"""Rates, times and throughput are logged once for each logged step, and count what they say."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import permlab.callback.measurements
from permlab.callback.measurements import Measurements, batch_size


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.lines.append((step, values))


def test_throughput_is_of_all_ranks_and_leaves_validations_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(permlab.callback.measurements.time, "monotonic", lambda: now[0])
    log, module, saving = Log(), SimpleNamespace(), SimpleNamespace(seconds=7.0)
    trainer: Any = SimpleNamespace(global_step=0, world_size=2, log_every_n_steps=2, logger=log, current_epoch=3)
    callback: Any = Measurements(saving)  # type: ignore[arg-type]
    groups = [{"name": "model", "lr": 0.5}, {"name": "model_no_decay", "lr": 0.5}, {"name": "permutation", "lr": 0.25}]
    callback.on_train_start(trainer, module)
    for step in (0, 1, 1, 2, 2, 3, 3, 4):  # two batches are accumulated for a step
        now[0] += 1.0
        trainer.global_step = step
        callback.on_before_optimizer_step(trainer, module, SimpleNamespace(param_groups=groups))
        callback.on_train_batch_end(trainer, module, None, (torch.zeros(8, 1),), 0)
        if step == 3:
            callback.on_validation_start(trainer, module)
            now[0] += 100.0
            callback.on_validation_end(trainer, module)
    assert [step for step, _ in log.lines] == [2, 4]
    for _, values in log.lines:
        assert values["time/samples_per_second"] == 16.0
        assert values["time/seconds"] == 7.0
        assert (values["optim/lr"], values["optim/lr_permutation"]) == (0.5, 0.25)
        assert values["train/epoch"] == 3
        assert values["memory/peak_mib"] > 0


def test_what_cannot_be_counted_counts_as_nothing() -> None:
    assert [batch_size(batch) for batch in ((torch.zeros(3, 2), None), torch.zeros(4), {"a": 1}, None)] == [3, 4, 0, 0]
