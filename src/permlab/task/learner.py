"""How a task is trained: noise, one optimiser, clipping per group, and stopping at the first NaN."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from permlab.config.plan import Plan
from permlab.data.module import DataModule
from permlab.errors import NonFiniteError, StepError
from permlab.method.base import Method
from permlab.method.site_methods import SiteMethods
from permlab.model.base import Backbone
from permlab.permutation import PermutationSample
from permlab.record.known import Known
from permlab.task.guard import LAST_GOOD, RATES, REMEDY, NonFiniteGuard, first_bad, first_bad_gradient, remedy
from permlab.task.optim import Stage, build_optimizer
from permlab.task.piece import Amounts, Piece
from permlab.task.place import at_items
from permlab.task.score import Scores
from permlab.task.task import Task

Summary = dict[str, float]
Parts = tuple[tuple[str, nn.Module], ...]


@dataclass(frozen=True)
class Result:
    """What a task makes of its training.

    Args:
        summary: final metrics by name.
        arrays: by file of the run's `arrays/` and name.
        state: what `checkpoints/best.ckpt` holds, where it is not what validation picked.
    """

    summary: Summary
    arrays: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    state: Mapping[str, Tensor] | None = None


class Shards(Protocol):
    """What a strategy that shards the backbone's gradients does in place of the learner."""

    def average(self, module: nn.Module) -> None:
        """Average the gradients of a module that is whole on every rank."""

    def clip(self, others: nn.Module, limit: float) -> Tensor:
        """Clip the gradient norm of all that is sharded, `others` being left out; returns the norm."""


class Learner(L.LightningModule):
    """A backbone and its method, trained by one optimiser in one backward pass.

    Subclasses define `make_scores`, `training_step` and `predict`, and what of the story beside the training
    differs from what is here. The class of task `X` is called `XLearner`, in `learner.py` of the task's folder.

    Args:
        task: what is asked, with its options.
        model, method: what is trained.
        optim: settings of the optimiser, see `permlab.task.optim`.
        seed: of the method's noise, which is drawn from (seed, step) and so is the same on every rank.
    """

    # Stem of the checkpoint that validation picks; another than `best` where a model is yet to be made of it.
    picked: str = "best"

    def __init__(
        self, task: Task, model: Backbone, method: Method | SiteMethods, optim: Mapping[str, Any], seed: int
    ) -> None:
        super().__init__()
        self.task, self.spec = task, task.spec
        self.model, self.method, self.optim, self.seed = model, method, dict(optim), seed
        self.num_steps = 1
        self.guard = NonFiniteGuard()
        self.shards: Shards | None = None
        # Where what is large may be put, and what other runs have found; None where a run stands alone.
        self.cache_folder: Path | None = None
        self.run_folder: Path | None = None  # of the run's files, where it has any
        self.known: Known | None = None
        self.started = False  # whether training has begun, all that a checkpoint restores being restored
        # Of model and permutation, since the last logged step: how often their gradient was clipped, in how many steps.
        self._clips: dict[str, list[Any]] = {}  # steps clipped and steps, by group
        self.scores = nn.ModuleDict({split: self.make_scores() for split in ("val", "test")})

    # The story of a run, beside the training itself

    @classmethod
    def place(cls, plan: Plan, model: Backbone) -> Method | SiteMethods:
        """The method of a plan, at the places of the model that this task permutes.

        Raises:
            ConfigError: if a component refuses its values, or does not fit the model.
        """
        return at_items(model, plan)

    def adopt(self, before: Mapping[str, Path]) -> None:
        """Take over from the runs before this one what has to fit; nothing has been written yet.

        Args:
            before: run directories, by the names that `Task.before` gave them.
        Raises:
            ConfigError: if something does not fit.
        """

    def prepare(self, data: DataModule, before: Mapping[str, Path]) -> None:
        """What comes before training and takes time: nothing, unless a task says otherwise."""

    def finish(self, test: Callable[[], Summary]) -> Result:
        """Make something of the training, whose picked checkpoint is loaded.

        Args:
            test: tests the learner as it is, on the test split. What its last call gives are the run's metrics.
        """
        return Result(test(), {"order": self.order_arrays()})

    def order_arrays(self) -> dict[str, np.ndarray]:
        """The starting order, and the learned one where there is a single one."""
        start: Any = self.method.start_order
        arrays = {"start_order": start.cpu().numpy()}
        for order in self.method.orders().values():
            arrays["order"] = order.cpu().numpy()
        return arrays

    def export(self, folder: Path, plan: Plan, data: DataModule, before: Mapping[str, Path], *, sparse: bool) -> None:
        """Write the picked model in a form for other software, where `Task.exports` promises it.

        Args:
            folder: new or empty.
            plan, data: of the finished run.
            before: run directories, as in `adopt`.
            sparse: also convert it to sparse kernels and time them.
        Raises:
            ConfigError: if it cannot be written.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no export")

    def describe(self) -> str:
        """What joins the first line of a run: where the method sits, and what of the model it leaves out."""
        return ""

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the items that are permuted; None where no items are."""
        return (self.model.height, self.model.width) if self.task.permutes == "items" else None

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def learned(self) -> Parts:
        """Parts of the checkpoint that validation picked, each with its prefix there, which `finish` needs."""
        return self.tested()

    def tested(self) -> Parts:
        """Parts of `checkpoints/best.ckpt` that testing needs, each with its prefix there."""
        return ("model", self.model), ("method", self.method)

    # What a run takes, tried on a few steps in memory before there is any

    def rehearse(self, data: DataModule) -> None:
        """Make ready for a few steps whose time and memory are measured, without the runs before.

        What `prepare` does, or as much of it as a step needs where the rest is among the pieces.
        """
        self.prepare(data, {})

    def pieces(self, data: DataModule, amounts: Amounts) -> Iterator[Piece]:
        """What a run does beside its training steps; each is tried once it was made ready by `rehearse`."""
        for split, times in (("val", amounts.validations * amounts.val_batches), ("test", amounts.test_batches)):
            batches = _endless(data.val_dataloader() if split == "val" else data.test_dataloader())
            yield Piece({"val": "validation"}.get(split, split), times, partial(self._try, split, batches, data))
        items = self._items_of(next(iter(data.val_dataloader())), data) if self.method.needs_items else None
        yield Piece("statistics", amounts.logged, lambda: self.method.statistics(items))

    @torch.no_grad()
    def _try(self, split: str, batches: Iterator[Any], data: DataModule) -> None:
        self.eval()
        inputs, targets = (part.to(self.device) for part in data.on_after_batch_transfer(next(batches), 0))
        self._evaluate(split, (inputs, targets))

    @torch.no_grad()
    def _items_of(self, batch: Any, data: DataModule) -> Tensor:
        return self.items(data.on_after_batch_transfer(batch, 0)[0].to(self.device))

    def holds(self) -> dict[str, int]:
        """Bytes that are kept from `prepare` to the end beside weights and what training needs, by what they are."""
        return {}

    # Evaluation

    def make_scores(self) -> Scores:
        """Fresh running metrics of a split."""
        raise NotImplementedError(f"{type(self).__name__} defines no make_scores")

    def items(self, inputs: Tensor) -> Tensor:
        """What the method permutes, `[*b, n, d]`, of a batch of inputs: what the model embeds them as."""
        return self.model.embed(inputs)

    def predict(self, inputs: Tensor) -> Tensor:
        """Logits under the deterministic order."""
        raise NotImplementedError(f"{type(self).__name__} defines no predict")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        logits = self.predict(inputs).float()
        self._scores(split).update(logits, targets)
        return logits

    def _scores(self, split: str) -> Scores:
        scores = self.scores[split]
        assert isinstance(scores, Scores)
        return scores

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, split: str, **more: Tensor) -> None:
        values = {f"{split}/{name}": value for name, value in (self._scores(split).compute() | more).items()}
        self.log_dict(values, logger=False)
        if self.logger is not None and self.global_step:
            self.logger.log_metrics({key: float(value) for key, value in values.items()}, step=self.global_step)
        self._scores(split).reset()

    # Training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.started = True

    def advance(self, step: int) -> None:
        """Set what changes with the optimiser step that is about to be made."""
        self.method.advance(step, self.num_steps)

    def stages(self) -> tuple[Stage, ...]:
        """Parts beside model and method that learn after them, once `num_steps` is known."""
        return ()

    def _all_but_method(self) -> nn.Module:
        """The backbone and what a task learns beside it, by name."""
        return nn.ModuleDict({name: module for name, module in self.named_children() if name != "method"})

    def _noise(self, batch_idx: int) -> torch.Generator:
        """Noise of this step: a function of (seed, step, batch), so a resumed run draws what it would have drawn."""
        generator = torch.Generator(device=self.device)
        return generator.manual_seed((self.seed << 40) + (self.global_step << 16) + batch_idx % (1 << 16))

    def _untouched_parameters(self) -> Tensor | float:
        """Zero, through the parameters of a method that is not learning: DDP wants each in every graph."""
        if self.method.phase == "active":
            return 0.0
        return sum((0.0 * parameter.sum() for parameter in self.method.parameters()), start=0.0)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Make a step; where the optimiser's own arithmetic fails, that is one line.

        Raises:
            StepError: naming the keys to change.
        """
        assert optimizer_closure is not None
        has_gradients = False

        def closure() -> Any:
            nonlocal has_gradients
            loss = optimizer_closure()
            has_gradients = True
            return loss

        try:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        except (RuntimeError, ArithmeticError) as error:
            # Of several ranks, the connection may have failed, which the launcher's side has better words for.
            # And what torch raises for a data worker that has died comes wherever this process just was.
            if not has_gradients or self.trainer.world_size > 1 or "DataLoader worker" in str(error):
                raise
            reason = (str(error).splitlines() or [""])[0]
            raise StepError(
                f"step {self.global_step}: the optimiser cannot make it ({type(error).__name__}: {reason}); "
                f"{RATES}; {LAST_GOOD}"
            ) from error

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.shards is not None:
            self.shards.average(self.method)
        if self.method.phase != "active":
            for parameter in self.method.parameters():
                parameter.grad = None  # a zero gradient would let Adam's momentum move it

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient norm of model and permutation separately, and log both before clipping."""
        limit = float("inf") if gradient_clip_val is None else gradient_clip_val
        scaled = self.trainer.precision in ("16-mixed", "16")  # its scaler skips steps that overflow
        for name, module, key in self.clipped():
            parameters = [p for p in module.parameters() if p.grad is not None]
            if not parameters:
                continue
            if name == "model" and self.shards is not None:
                norm = self.shards.clip(self.method, limit)
            else:
                norm = nn.utils.clip_grad_norm_(parameters, limit)
            if self.guard.looks_later(self.device):
                if not scaled:
                    what = f"step {self.global_step}: the gradient norm of the {name} is not finite; lower {key}"
                    self.guard.note({name: norm}, what)
            elif not scaled and not torch.isfinite(norm):
                self.guard.report(
                    f"step {self.global_step}: gradient norm of the {name} is {norm.item()} "
                    f"({first_bad_gradient(module)}); lower {key}"
                )
            self._log_clipping(name, norm, limit)
        if self.guard.looks_later(self.device):
            if not self._is_log_step():
                return
            self.guard.look()
        if self.guard.leaves_out(self.device):
            self._leave_out()

    def clipped(self) -> tuple[tuple[str, nn.Module, str], ...]:
        """Parts whose gradient norms are clipped apart: name, module, and the key to lower where one is not finite."""
        return (
            ("model", self._all_but_method(), "optim.lr"),
            ("permutation", self.method, "method.lr or raise method.temperature"),
        )

    def _log_clipping(self, name: str, norm: Tensor, limit: float) -> None:
        """The gradient's norm at logged steps, and in which part of the steps since the last one it was clipped."""
        clipped, steps = self._clips.get(name, [0.0, 0.0])
        clips = self._clips[name] = [clipped + (norm.detach() > limit).double(), steps + 1]
        if self._is_log_step():
            fraction = clips[0] / clips[1]
            self._record({f"{name}/grad_norm": norm, f"{name}/clipped": fraction})
            del self._clips[name]

    def _leave_out(self) -> None:
        """Make this optimiser step none: what has no gradient is not moved, nor is its state."""
        for parameter in self.parameters():
            parameter.grad = None
        self._record({"train/skipped": torch.tensor(float(self.guard.num_skipped))})

    def _check_finite(self, loss: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
        """Report the first tensor that made the loss NaN or infinite."""
        if self.guard.looks_later(self.device):
            message = f"step {self.global_step}: first non-finite tensor: {{name}}; {REMEDY}"
            self.guard.note({**tensors, "loss": loss}, message)
            return
        if torch.isfinite(loss):
            return
        weights = {f"weight {name}": weight for name, weight in self.named_parameters()}
        name = first_bad({**weights, **tensors}) or "loss"
        self.guard.report(
            f"step {self.global_step}: the loss is {loss.item()}; first non-finite tensor: {name}; {remedy(name)}"
        )

    def _is_learnable(self, samples: Mapping[str, PermutationSample], **inputs: Tensor) -> bool:
        """Whether scores and relaxations are finite; reports what is not, which need not show in the loss."""
        drawn: dict[str, Tensor | None] = {f"weight method.{k}": v for k, v in self.method.named_parameters()}
        for name, sample in samples.items():
            drawn |= {f"soft matrix of {name}": sample.soft, f"log_prob of {name}": sample.log_prob}
        if self.guard.looks_later(self.device):
            message = f"step {self.global_step}: first non-finite tensor: {{name}}; {remedy('weight method.')}"
            self.guard.note(drawn, message)
            return True
        if first_bad(drawn) is None:
            return True
        weights = {f"weight {name}": weight for name, weight in self.named_parameters()}
        bad = first_bad({**weights, **inputs, **drawn})
        assert bad is not None
        self.guard.report(f"step {self.global_step}: first non-finite tensor: {bad}; {remedy(bad)}")
        return False

    def _no_loss(self) -> Tensor:
        """Stands for the loss of a step that is not made, through every parameter: other ranks wait for gradients."""
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.stack([0.0 * parameter.sum() for parameter in learned]).sum()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to write weights that are not finite over those that were.

        Raises:
            NonFiniteError: naming the weight.
        """
        self.guard.look()
        self.guard.leaves_out(self.device)
        bad = first_bad(dict(self.named_parameters()))
        if bad is not None:
            what = f"weight {bad}"
            raise NonFiniteError(
                f"step {self.global_step}: first non-finite tensor: {what}; {remedy(what)}; {LAST_GOOD}"
            )
        checkpoint["guard"] = self.guard.state_dict()
        checkpoint["clips"] = {name: [float(x) for x in counts] for name, counts in self._clips.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.guard.load_state_dict(checkpoint.get("guard", {"num_skipped": 0}))
        self._clips = {name: list(counts) for name, counts in checkpoint.get("clips", {}).items()}

    def _is_log_step(self) -> bool:
        """Whether this batch makes an optimiser step, and that step is logged."""
        if self.trainer.fit_loop.epoch_loop._should_accumulate():
            return False  # a validation in the middle of a step still belongs to the one before
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def _record(self, values: Mapping[str, Tensor]) -> None:
        """Log for the step that is being made, counted as done: means over the ranks, on all of which this is called.

        Straight to the logger: by the time a checkpoint is written, all that was logged for its
        steps is in the run's files, so a resumed run neither misses nor repeats a line.
        """
        means = torch.stack([value.detach().float() for value in values.values()])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(means)
            means = means / self.trainer.world_size
        if self.logger is not None:
            named = dict(zip(values, means.tolist(), strict=True))
            self.logger.log_metrics(named, step=self.global_step + 1)

    def configure_optimizers(self) -> Any:
        self.num_steps = int(self.trainer.estimated_stepping_batches)
        optimizer, scheduler = build_optimizer(
            self._all_but_method(), self.method, self.optim, num_steps=self.num_steps, stages=self.stages()
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
