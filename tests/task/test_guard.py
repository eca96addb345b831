"""A number that is not finite stops the run, or costs exactly the step it appeared in."""

import copy
import math
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from runs import Result, train
from torch.utils._python_dispatch import TorchDispatchMode

import permlab.run.story
import permlab.run.trainer
from permlab.errors import NonFiniteError
from permlab.task.guard import NonFiniteGuard

SHORT = ("task.control=false", "trainer.log_every_n_steps=1", "optim.lr=0.01")


class Poison(L.Callback):
    """Puts NaN or infinity where it says, in one step, and watches what that step changes."""

    def __init__(self, place: str, *, at: tuple[int, ...] = (3,), value: float = math.nan) -> None:
        self.place, self.at, self.value = place, at, value
        self.changed: list[str] = []
        self._before: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step not in self.at:
            return
        if self.place == "images":
            batch[0][0, 0, 0, 0] = self.value
        self._before = copy.deepcopy(_state(trainer, pl_module))
        if self.place == "scores":
            with torch.no_grad():
                next(pl_module.method.parameters()).view(-1)[0] = self.value

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step in self.at and self.place == "gradient":
            next(pl_module.model.parameters()).grad.view(-1)[0] = self.value

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not self._before or trainer.global_step - 1 not in self.at:
            return
        after = _state(trainer, pl_module)
        self.changed += [name for name in after if not torch.equal(after[name], self._before[name])]


def _state(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, torch.Tensor]:
    """Weights, buffers, and everything that the optimiser keeps."""
    state = {f"weight {name}": value.clone() for name, value in pl_module.state_dict().items()}
    for index, values in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"optimiser {index} {name}": torch.as_tensor(value).clone() for name, value in values.items()}
    return {name: value for name, value in state.items() if "scores." not in name and "confusion" not in name}


def poisoned(folder: Path, monkeypatch: pytest.MonkeyPatch, poison: Poison, *words: str, steps: int = 6) -> Result:
    build = permlab.run.trainer._callbacks
    monkeypatch.setattr(permlab.run.trainer, "_callbacks", lambda *parts: [*build(*parts), poison])
    return train(folder, *SHORT, *words, steps=steps)


STOPS = [
    ("images", "sinkhorn_ste", "first non-finite tensor: images"),
    ("images", "sinkhorn_network", "first non-finite tensor: images"),
    ("gradient", "sinkhorn_ste", "gradient norm of the model"),
    ("scores", "sinkhorn_ste", "weight method.table"),
    ("scores", "reorder", "weight method.logits"),
]


@pytest.mark.parametrize(("place", "method", "named"), STOPS, ids=lambda value: value.split(" ")[-1])
def test_stop_names_step_tensor_and_key_and_keeps_the_last_good_checkpoint(
    place: str, method: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = poisoned(tmp_path, monkeypatch, Poison(place), f"method={method}", "trainer.val_check_interval=1")
    assert result.code == 1
    assert result.err.startswith("error: step 3: ")
    assert result.err.count("\n") == 1
    assert named in result.err
    assert re.search(r"(optim|method|data)\.\w+", result.err)
    assert "trainer.on_nonfinite=skip" in result.err
    checkpoint = torch.load(result.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values() if value.is_floating_point())


@pytest.mark.parametrize(
    ("place", "method"), [("images", "sinkhorn_ste"), ("images", "reorder_paper"), ("gradient", "reorder_paper")]
)
def test_skip_leaves_weights_optimiser_and_baseline_as_they_were(
    place: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(place, at=(2, 4))
    result = poisoned(
        tmp_path, monkeypatch, poison, f"method={method}", "trainer.on_nonfinite=skip", "method.warmup_fraction=0"
    )
    assert result.code == 0, result.err
    # A reward that was finite counts, whatever its gradient was.
    allowed = {"weight method.baseline"} if place == "gradient" else set()
    assert set(poison.changed) <= allowed
    assert result.summary["train/skipped"] == 2
    assert result.summary["train/steps"] == 6
    assert [line["step"] for line in result.metrics if "train/skipped" in line] == [3, 5]


def test_an_ordinary_step_is_seen_to_change_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = Poison("nothing")
    result = poisoned(tmp_path, monkeypatch, poison)
    assert any(name.startswith("weight") for name in poison.changed)
    assert any(name.startswith("optimiser") for name in poison.changed)
    assert result.summary["train/skipped"] == 0


def test_accumulation_leaves_out_the_whole_optimiser_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = poisoned(
        tmp_path, monkeypatch, Poison("images"), "trainer.on_nonfinite=skip", "trainer.accumulate_grad_batches=2"
    )
    assert result.code == 0, result.err
    assert result.summary["train/skipped"] == 1


def test_more_skips_than_allowed_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("trainer.on_nonfinite=skip", "trainer.max_skips=2")
    result = poisoned(tmp_path, monkeypatch, Poison("images", at=(1, 2, 3, 4)), *words)
    assert result.code == 1
    assert result.err.startswith("error: step 3: ")
    assert "trainer.max_skips=2" in result.err


def test_skipping_is_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = poisoned(tmp_path, monkeypatch, Poison("images"), "trainer.val_check_interval=1")
    assert stopped.code == 1
    again = train(tmp_path, *SHORT, "trainer.val_check_interval=1", "trainer.on_nonfinite=skip", steps=6)
    assert again.run_dir == stopped.run_dir
    assert again.code == 0


def test_the_count_of_skips_outlives_a_restart() -> None:
    guard, resumed = NonFiniteGuard(on_nonfinite="skip", max_skips=1), NonFiniteGuard(on_nonfinite="skip", max_skips=1)
    guard.report("step 0: the loss is nan")
    assert guard.leaves_out(torch.device("cpu"))
    resumed.load_state_dict(guard.state_dict())
    resumed.report("step 1: the loss is nan")
    with pytest.raises(NonFiniteError, match=r"step 1.*max_skips=1"):
        resumed.leaves_out(torch.device("cpu"))


def test_how_often_gradients_were_clipped_is_logged(tmp_path: Path) -> None:
    tight = train(tmp_path / "tight", *SHORT, "trainer.gradient_clip_val=1e-9", "trainer.log_every_n_steps=2", steps=4)
    loose = train(tmp_path / "loose", *SHORT, "trainer.gradient_clip_val=1e9", "trainer.log_every_n_steps=2", steps=4)
    for result, expected in ((tight, 1.0), (loose, 0.0)):
        for name in ("model/clipped", "permutation/clipped"):
            assert next(line[name] for line in result.metrics if name in line) == expected


# A device that would have to wait


class NoLooking(TorchDispatchMode):
    """Fails where a tensor's value is fetched, which on another device than the CPU waits for all that was queued."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket._qualified_op_name
        assert name not in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"), name
        return function(*arguments, **(options or {}))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the part of another device: no compiled kernels, and looks are put off."""
    monkeypatch.setattr(NonFiniteGuard, "looks_later", lambda self, device: self.on_nonfinite == "stop")
    for name in ("sinkhorn", "sorting", "plackett_luce"):
        monkeypatch.setattr(f"permlab.ops.{name}.is_readable", lambda tensor: False)
    monkeypatch.setattr("permlab.ops.plackett_luce.check_order", lambda order: None)


@pytest.mark.parametrize("method", ["fixed", "sort_ste", "sort_softmax", "neural_sort", "sinkhorn", "reorder"])
def test_no_step_fetches_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: None, method: str) -> None:
    class Watch(L.Callback):
        seen = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            batch_step, batch_clip = pl_module.training_step, pl_module.configure_gradient_clipping

            def step(*arguments):
                with NoLooking():
                    return batch_step(*arguments)

            def clip(*arguments, **options):
                Watch.seen += 1
                with NoLooking():
                    return batch_clip(*arguments, **options)

            if trainer.global_step == 0:
                pl_module.training_step, pl_module.configure_gradient_clipping = step, clip

    build = permlab.run.trainer._callbacks
    monkeypatch.setattr(permlab.run.trainer, "_callbacks", lambda *parts: [*build(*parts), Watch()])
    words = ("task.control=false", "trainer.log_every_n_steps=100", f"method={method}")
    result = train(tmp_path, *words, steps=3)
    assert result.code == 0, result.err
    assert Watch.seen == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["fixed", "sort_ste", "sort_softmax", "neural_sort", "reorder"])
def test_no_step_waits_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """By torch's profiler, in the third step. (An assignment is solved on the CPU, so methods with one do wait.)"""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profile = torch.profiler.profile(activities=activities)

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 2:
                profile.start()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 3:
                profile.stop()

    build = permlab.run.trainer._callbacks
    monkeypatch.setattr(permlab.run.trainer, "_callbacks", lambda *parts: [Watch(), *build(*parts)])
    words = ("trainer=gpu", "task.control=false", "trainer.log_every_n_steps=100", f"method={method}")
    result = train(tmp_path, *words, steps=4)
    assert result.code == 0, result.err
    names = {event.key for event in profile.key_averages()}
    assert any("Kernel" in name for name in names), "something ran on the device"
    waits = [name for name in names if "StreamSynchronize" in name or "EventSynchronize" in name or "DtoH" in name]
    assert waits == []


@pytest.mark.parametrize("place", ["images", "scores", "gradient"])
def test_a_late_look_still_names_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: None, place: str
) -> None:
    build = permlab.run.trainer._callbacks
    poison = Poison(place, at=(3,))
    monkeypatch.setattr(permlab.run.trainer, "_callbacks", lambda *parts: [*build(*parts), poison])
    result = train(tmp_path, "task.control=false", "trainer.log_every_n_steps=8", "method=sort_ste", steps=24)
    assert result.code == 1
    assert "step 3:" in result.err
    assert not (result.run_dir / "DONE").exists()


def test_a_step_that_the_optimiser_cannot_make_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that overflows its arithmetic; the configuration has none such, so it is set behind its back."""

    class Raise(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] = 1e99

    build = permlab.run.trainer._callbacks
    monkeypatch.setattr(permlab.run.trainer, "_callbacks", lambda *parts: [*build(*parts), Raise()])
    result = train(tmp_path, *SHORT)
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert line.startswith("error: step 0: the optimiser cannot make it (RuntimeError: ")
    assert "lower optim.lr" in line
    assert (result.run_dir / "FAILED").read_text().startswith("StepError: ")
