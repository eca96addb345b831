"""The display shows what it promises at a terminal, and tells it in lines elsewhere."""

import io
import re
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import permlab.callback.progress
from permlab.callback.progress import Progress
from permlab.record import pulse
from permlab.task.metric import ACCURACY


class Task(L.LightningModule):
    def __init__(self, fail_at: int = -1, rise: float = 0.0) -> None:
        super().__init__()
        self.rise = rise
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.method, self.fail_at = SimpleNamespace(temperature=0.25), fail_at
        self.task = SimpleNamespace(metric=ACCURACY)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == self.fail_at:
            raise RuntimeError("broken")
        return 1.5 + self.global_step * self.rise + 0 * self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", torch.tensor(0.612))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(terminal: bool, task: Task, *, progress: dict[str, Any] | None = None, **options: Any) -> tuple[str, Progress]:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
    display = Progress(console, **{"refresh_seconds": 0.0, **(progress or {})})
    loader = DataLoader(TensorDataset(torch.zeros(32, 1)), batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[display], enable_checkpointing=False, enable_model_summary=False,
        num_sanity_val_steps=0, max_steps=12, **{"val_check_interval": 4, **options},
    )  # fmt: skip
    try:
        trainer.fit(task, loader, loader)
    finally:
        output = console.file.getvalue()  # type: ignore[attr-defined]
    return output, display


@pytest.mark.parametrize("accumulate", [1, 2])
def test_everything_that_is_promised_fits_into_80_columns(accumulate: int) -> None:
    output, _ = fit(True, Task(), accumulate_grad_batches=accumulate)
    last = [line for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", output) if "/12" in line][-1]
    assert "12/12" in last
    assert "loss 1.5" in last
    assert "val 61.2%" in last
    assert "temp 0.25" in last
    assert re.search(r"[\d,]+/s", last)
    assert re.search(r"\d:\d\d:\d\d left", last)
    assert "…" not in output
    assert len(last.rstrip()) <= 80


def test_a_long_training_fits_into_80_columns_too() -> None:
    output = io.StringIO()
    progress = Progress(Console(file=output, force_terminal=True, width=80, color_system=None), refresh_seconds=0.0)
    trainer: Any = SimpleNamespace(
        estimated_stepping_batches=300000, global_step=123456, world_size=1, accumulate_grad_batches=1,
        callback_metrics={"val/accuracy": torch.tensor(0.9876)},
    )  # fmt: skip
    module: Any = SimpleNamespace(method=SimpleNamespace(temperature=0.0123), task=SimpleNamespace(metric=ACCURACY))
    progress.on_train_start(trainer, module)
    progress.on_validation_start(trainer, module)
    progress.on_validation_end(trainer, module)
    progress.on_train_batch_end(trainer, module, {"loss": torch.tensor(12.3456)}, [torch.zeros(64, 1)], 0)
    progress.on_train_end(trainer, module)
    assert "…" not in output.getvalue()
    assert "left" in output.getvalue()


def test_what_is_drawn_is_current_whoever_drew_last() -> None:
    """Validations at every step draw before a redraw is due, which then never is."""
    output, _ = fit(True, Task(rise=1.0), progress={"refresh_seconds": 1000.0}, val_check_interval=1)
    drawn = re.findall(r"(\d+)/12 +loss ([\d.]+)", output)
    assert len({step for step, _ in drawn}) == 12
    assert all(float(loss) == 0.5 + int(step) for step, loss in drawn), drawn


def test_where_there_is_no_terminal_a_short_training_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    output, _ = fit(False, Task())
    assert output == ""
    assert "12" not in "".join(capfd.readouterr())


def test_where_there_is_no_terminal_lines_tell_how_it_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "EVERY_SECONDS", 0.0)
    fit(False, Task(rise=1.0), progress={"name": "control"})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("control: ")]
    assert len(lines) == 12
    assert lines[0].startswith("control: 1 of 12 steps, loss 1.5, temp 0.25, ")
    assert re.fullmatch(
        r"control: 6 of 12 steps, loss 6.5, val accuracy 61.2%, temp 0.25, [\d,]+/s, 1 s, about 1 s left", lines[5]
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_how_long_it_takes_is_said_once(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permlab.callback.progress, "FEW_SECONDS", 0.0)
    asked = []

    def forecast(seconds: float, left: int) -> str:
        asked.append((seconds, left))
        return "about a minute"

    output, _ = fit(terminal, Task(), progress={"forecast": forecast})
    ((seconds, left),) = asked
    assert 0 < seconds < 5
    assert left == 12 - 6
    assert (output if terminal else capsys.readouterr().out).count("about a minute") == 1


def test_a_long_test_is_told_of_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "EVERY_SECONDS", 0.0)
    progress = Progress(Console(file=io.StringIO()))
    trainer: Any = SimpleNamespace(num_test_batches=[3])
    progress.on_test_start(trainer, Task())
    for index in range(3):
        progress.on_test_batch_end(trainer, Task(), None, None, index)
    progress.on_test_end(trainer, Task())
    assert capsys.readouterr().out.splitlines()[-1] == "test: 3 of 3 batches, 1 s, about 1 s left"


def test_the_terminal_is_given_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        fit(True, Task(fail_at=5))
    console = Console(file=io.StringIO(), force_terminal=True)
    progress = Progress(console)
    trainer: Any = SimpleNamespace(estimated_stepping_batches=10, global_step=0)
    progress.on_train_start(trainer, Task())
    progress.on_exception(trainer, Task(), RuntimeError())
    assert not console._live_stack
    assert "\x1b[?25h" in console.file.getvalue()  # type: ignore[attr-defined]


class Untouchable(Tensor):
    def item(self) -> float:
        raise AssertionError("fetched from the device")


def test_values_are_fetched_only_when_the_line_is_redrawn() -> None:
    progress = Progress(Console(file=io.StringIO(), force_terminal=True), refresh_seconds=1000.0)
    trainer: Any = SimpleNamespace(estimated_stepping_batches=10, global_step=1, world_size=1)
    progress.on_train_start(trainer, Task())
    loss = torch.zeros(()).as_subclass(Untouchable)
    for index in range(3):
        progress.on_train_batch_end(trainer, Task(), {"loss": loss}, [torch.zeros(4, 1)], index)
    progress._refresh_seconds = 0.0
    with pytest.raises(AssertionError, match="fetched"):
        progress.on_train_batch_end(trainer, Task(), {"loss": loss}, [torch.zeros(4, 1)], 3)
    progress.on_exception(trainer, Task(), RuntimeError())
