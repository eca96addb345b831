"""The progress display of a training: one line at a terminal, nothing anywhere else."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column
from torch import Tensor


class Progress(ProgressBar):
    """Steps, loss, validated metric, temperature, samples per second and time left.

    Values are fetched from the device only when the line is redrawn, so that the display does
    not make a GPU wait. Where standard output is no terminal, nothing is printed at all:
    `metrics.jsonl` tells how far a run has come.

    Args:
        console: where to draw; by default standard output.
        refresh_seconds: shortest time between two redraws.
    """

    def __init__(self, console: Console | None = None, *, refresh_seconds: float = 0.2) -> None:
        super().__init__()
        self._console = console or Console()
        self._enabled = self._console.is_terminal
        self._refresh_seconds = refresh_seconds
        self._bar: Bar | None = None
        self._texts: dict[str, str] = {}
        self._num_samples = 0
        self._drawn_at = self._resumed_at = self._paused_at = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = self._console.is_terminal

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self._enabled:
            return
        # The texts fit into the usual 80 columns; the bar takes what they leave.
        self._bar = Bar(
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        steps = trainer.estimated_stepping_batches
        total = steps if steps != float("inf") else None
        self._bar.add_task("train", total=total, completed=trainer.global_step, text="")
        self._texts, self._num_samples = {}, 0
        self._drawn_at = self._resumed_at = time.monotonic()
        self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bar is None:
            return
        self._num_samples += _batch_size(batch) * trainer.world_size
        now = time.monotonic()
        if now - self._drawn_at < self._refresh_seconds:
            return
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._texts["loss"] = f"loss {loss.item() * trainer.accumulate_grad_batches:.4g}"
        self._texts["temperature"] = f"temp {pl_module.method.temperature:.2g}"
        self._texts["speed"] = f"{self._num_samples / (now - self._resumed_at):,.0f}/s"
        self._draw(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._paused_at = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._bar is None:
            return
        # Time spent on validation does not count against the speed of training.
        self._resumed_at += time.monotonic() - self._paused_at
        metric = pl_module.task.metric
        if metric.validation_key in trainer.callback_metrics:
            value = trainer.callback_metrics[metric.validation_key].item()
            self._texts["validation"] = f"val {metric.show(value)}{metric.unit}"
        self._draw(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._bar is not None:
            self._draw(trainer)
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _draw(self, trainer: L.Trainer) -> None:
        assert self._bar is not None
        names = ("loss", "validation", "temperature", "speed")
        text = "  ".join(self._texts[name] for name in names if name in self._texts)
        self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, text=text)
        self._bar.refresh()
        self._drawn_at = time.monotonic()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _batch_size(batch: Any) -> int:
    first = batch[0] if isinstance(batch, (list, tuple)) else batch
    return len(first) if isinstance(first, Tensor) else 0
