"""The progress display of a training: one line at a terminal, a line now and then anywhere else."""

import time
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column
from torch import Tensor

from permlab.callback.measurements import batch_size
from permlab.record.pulse import Pulse, say

# Steps, behind the first, and seconds after which the time that a training takes can be told.
FEW_STEPS, FEW_SECONDS = 5, 3.0


class Progress(ProgressBar):
    """Steps, loss, validated metric, temperature, samples per second and time left.

    Values are fetched from the device only when a line is drawn, so that the display does not
    make a GPU wait, and are then the newest ones. At a terminal one line is redrawn; where standard
    output is no terminal, a line is printed at least every half minute. Tests are told of in the same way.

    Args:
        console: where to draw; by default standard output.
        name: of the training, in front of lines.
        forecast: what is said, once and after a few steps, from the seconds of a step and the number left.
        refresh_seconds: shortest time between two redraws.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        name: str = "training",
        forecast: Callable[[float, int], str] | None = None,
        refresh_seconds: float = 0.2,
    ) -> None:
        super().__init__()
        self._console = console or Console()
        self._enabled = True
        self._name, self._forecast, self._refresh_seconds = name, forecast, refresh_seconds
        self._bar: Bar | None = None
        self._pulse: Pulse | None = None
        self._loss: Any = None
        self._num_samples = self._first_step = 0
        self._drawn_at = self._resumed_at = self._paused_at = self._first_at = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._loss, self._num_samples, self._first_at = None, 0, 0.0
        self._drawn_at = self._resumed_at = time.monotonic()
        steps = trainer.estimated_stepping_batches
        total = int(steps) if steps != float("inf") else None
        if self._enabled and self._console.is_terminal:
            self._start_bar(total, trainer.global_step)
        elif self._enabled:
            self._pulse = Pulse(self._name, "steps", total, done=trainer.global_step).__enter__()

    def _start_bar(self, total: int | None, done: int) -> None:
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
        self._bar.add_task("train", total=total, completed=done, text="")
        self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._num_samples += batch_size(batch) * trainer.world_size
        self._loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if self._enabled:
            self._foretell(trainer)
        if self._bar is not None and time.monotonic() - self._drawn_at >= self._refresh_seconds:
            self._draw(trainer, pl_module)
        if self._pulse is not None:
            self._pulse.beat(trainer.global_step, lambda: ", ".join(self._values(trainer, pl_module).values()))

    def _foretell(self, trainer: L.Trainer) -> None:
        """Say once how long it takes, from the time of a few steps behind the first, which sets everything up."""
        now, step = time.monotonic(), trainer.global_step
        if self._forecast is None or trainer.estimated_stepping_batches == float("inf"):
            return
        if not self._first_at:
            self._first_at, self._first_step = now, step
        made = step - self._first_step
        if made >= FEW_STEPS and now - self._first_at >= FEW_SECONDS:
            line = self._forecast((now - self._first_at) / made, int(trainer.estimated_stepping_batches) - step)
            say(line) if self._bar is None else self._bar.console.print(line, highlight=False)
            self._forecast = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._paused_at = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Time spent on validation does not count against the speed of training.
        self._resumed_at += time.monotonic() - self._paused_at
        if self._bar is not None:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._bar is not None:
            self._draw(trainer, pl_module)
        self._stop()

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        total = sum(trainer.num_test_batches)
        if self._enabled:
            self._pulse = Pulse("test", "batches", int(total) if total != float("inf") else None).__enter__()
            self._num_samples = 0

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        self._num_samples += 1
        if self._pulse is not None:
            self._pulse.beat(self._num_samples)

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _values(self, trainer: L.Trainer, pl_module: Any) -> dict[str, str]:
        """What is known at this moment, whoever asks."""
        values = {}
        if isinstance(self._loss, Tensor):
            values["loss"] = f"loss {self._loss.item() * trainer.accumulate_grad_batches:.4g}"
        metric = pl_module.task.metric
        if metric.validation_key in trainer.callback_metrics:
            shown = f"{metric.show(trainer.callback_metrics[metric.validation_key].item())}{metric.unit}"
            values["validation"] = f"val {shown}" if self._bar is not None else f"val {metric.name} {shown}"
        values["temperature"] = f"temp {pl_module.method.temperature:.2g}"
        seconds = time.monotonic() - self._resumed_at
        values["speed"] = f"{self._num_samples / max(seconds, 1e-9):,.0f}/s"
        return values

    def _draw(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert self._bar is not None
        text = "  ".join(self._values(trainer, pl_module).values())
        self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, text=text)
        self._bar.refresh()
        self._drawn_at = time.monotonic()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._pulse is not None:
            self._pulse.__exit__(None, None, None)
            self._pulse = None
