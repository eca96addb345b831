"""Stop on SIGTERM or SIGINT at the end of a batch, with a checkpoint, and say so in the exit code."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch

from permlab.errors import Interrupted


class Preemption(L.Callback):
    """Turns the first SIGTERM or SIGINT into a checkpoint and an `Interrupted` error.

    Lightning's own handling saves nothing and exits with 0, which schedulers take for success.
    All ranks stop after the same batch. A second SIGINT interrupts at once.

    Args:
        path: where the checkpoint goes; the same command resumes from it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.received = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        received = self.received
        if trainer.world_size > 1:
            flag = torch.tensor(received, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            received = int(flag)
        if received:
            trainer.save_checkpoint(self.path)
            raise Interrupted(received)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
