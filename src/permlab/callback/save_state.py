"""When the state of a training is saved, and that it stops when it is asked to."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from permlab.callback.interrupt import STOP
from permlab.errors import Interrupted
from permlab.record.tracking import RunLogger


class SaveState(Checkpoint):
    """Saves at every validation, every so many steps or minutes, and on SIGTERM or SIGINT.

    A state is saved between two optimiser steps only: never while gradients accumulate, which no
    checkpoint holds, and where a validation is due, after it, so that a resumed run neither misses
    nor repeats one. A signal is obeyed at the first such moment, on all ranks at the same one, by
    saving and raising `Interrupted`. Minutes are counted by a clock that nobody sets.

    The metrics reach the disk before the state does, and their newest line is part of it.

    Args:
        path: of the newest state; those before it lie beside it.
        every_n_steps: optimiser steps, or None.
        every_minutes: of training, or None.
    """

    def __init__(self, path: Path, *, every_n_steps: int | None = None, every_minutes: float | None = None) -> None:
        self.path, self.every_n_steps, self.every_minutes = path, every_n_steps, every_minutes
        self._saved_step = -1
        self._saved_at = self._began = time.monotonic()
        self._seconds_before = 0.0
        self._overdue = False

    @property
    def seconds(self) -> float:
        """Of training so far, those before an interruption included."""
        return self._seconds_before + time.monotonic() - self._began

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        STOP.deferred = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        STOP.deferred = False
        STOP.check()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        STOP.deferred = False

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if loop._should_accumulate() or loop._should_check_val_fx(fetcher):
            return
        received, due = self._agree(trainer, STOP.received, self._is_due(trainer.global_step))
        self._save(trainer, received, bool(due))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.fit_loop.epoch_loop._should_accumulate():
            self._overdue = True
            return
        received, _ = self._agree(trainer, STOP.received, 0)
        self._save(trainer, received, True)

    def _is_due(self, step: int) -> bool:
        if step == self._saved_step:
            return False
        minutes = (time.monotonic() - self._saved_at) / 60
        return (
            self._overdue
            or (self.every_n_steps is not None and step % self.every_n_steps == 0)
            or (self.every_minutes is not None and minutes >= self.every_minutes)
        )

    @staticmethod
    def _agree(trainer: L.Trainer, *values: int) -> list[int]:
        """The largest of each value over the ranks: a signal or a clock may reach one of them first."""
        if trainer.world_size == 1:
            return list(values)
        flags = torch.tensor(values, dtype=torch.int64, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return flags.tolist()

    def _save(self, trainer: L.Trainer, received: int, due: bool) -> None:
        if due or received:
            if isinstance(trainer.logger, RunLogger):
                trainer.logger.sync()
            trainer.save_checkpoint(self.path)
            self._saved_at, self._saved_step, self._overdue = time.monotonic(), trainer.global_step, False
        if received:
            raise Interrupted(received)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self.seconds
        if isinstance(trainer.logger, RunLogger):
            checkpoint["metrics_line"] = trainer.logger.line

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._seconds_before = float(checkpoint.get("seconds", 0.0))
