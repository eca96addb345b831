"""What a run's metrics tell of the optimiser and of the machine: rates, times, throughput, memory."""

import time
from typing import Any

import lightning as L
import torch

from permlab.callback.save_state import SaveState
from permlab.record.provenance import peak_memory_mib


class Measurements(L.Callback):
    """Logs, at every logged step, the learning rates that it was made with, the epoch, and what was measured.

    `optim/lr` is the rate of the model, `optim/lr_permutation` that of the permutation; `train/epoch` counts
    from 0; `time/seconds` are of training, those before an interruption included;
    `time/samples_per_second` is over the steps since the line before, on all ranks, without validations;
    `memory/peak_mib` is the highest use so far, of the GPU where there is one.

    Args:
        saving: knows the seconds of training.
    """

    def __init__(self, saving: SaveState) -> None:
        self._saving = saving
        self._rates: dict[str, float] = {}
        self._last_step = self._num_samples = 0
        self._began = self._paused_at = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_step, self._num_samples, self._began = trainer.global_step, 0, time.monotonic()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Before the schedule moves on."""
        for group in optimizer.param_groups:
            self._rates["optim/lr_permutation" if group["name"] == "permutation" else "optim/lr"] = float(group["lr"])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused_at = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began += time.monotonic() - self._paused_at

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._num_samples += batch_size(batch) * trainer.world_size
        step = trainer.global_step
        if step == self._last_step:
            return  # gradients are being accumulated
        self._last_step = step
        if step % trainer.log_every_n_steps == 0 and trainer.logger is not None:  # type: ignore[attr-defined]
            trainer.logger.log_metrics({**self._rates, **self._measured(trainer)}, step=step)

    def _measured(self, trainer: L.Trainer) -> dict[str, float]:
        seconds = time.monotonic() - self._began
        values = {
            "train/epoch": trainer.current_epoch,
            "time/seconds": round(self._saving.seconds, 3),
            "time/samples_per_second": round(self._num_samples / max(seconds, 1e-9), 1),
            "memory/peak_mib": round(peak_memory_mib(), 1),
        }
        self._num_samples, self._began = 0, time.monotonic()
        return values


def batch_size(batch: Any) -> int:
    """Samples of a batch, whose first part is a tensor of them; 0 for what cannot be counted."""
    first = batch[0] if isinstance(batch, (list, tuple)) else batch
    return len(first) if isinstance(first, torch.Tensor) else 0
