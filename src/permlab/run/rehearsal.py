"""A few real steps of a run, in memory alone: what a step and every other piece of a run takes here, and holds."""

import math
import resource
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch

from permlab.config.plan import Plan
from permlab.data.module import DataModule
from permlab.record.provenance import peak_memory_mib
from permlab.run.assembly import Assembly, assemble
from permlab.run.count import Count, counting
from permlab.run.trainer import make_trainer, quiet_lightning, set_threads, trainer_arguments
from permlab.task import piece
from permlab.task.learner import Learner
from permlab.task.piece import Amounts

# Of each phase of a training, timed steps go on for so long, or until there are so many.
TRIED_SECONDS, MAX_TRIED = 1.5, 30
# Phases that make up a smaller part of a training are taken to cost what the others do.
SMALL_PART = 0.02
# Where a training's own trainer cannot be had here, or would write.
IN_MEMORY: dict[str, Any] = {
    **{"limit_val_batches": 0, "enable_progress_bar": False, "enable_checkpointing": False, "logger": False},
    **{
        "max_steps": 10**6,
        "max_epochs": -1,
        "profiler": None,
        "num_sanity_val_steps": 0,
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "detect_anomaly": False,
    },
}


@dataclass
class Step:
    """An optimiser step as it was tried.

    Args:
        seconds: of one, the median.
        count: its operations; the bytes are those of one batch, gradients among them.
        num_timed: steps that were timed.
    """

    seconds: float
    count: Count
    num_timed: int


@dataclass
class Rehearsal:
    """What was measured of a run.

    Args:
        batch_size: samples of each step.
        steps: by phase of the method.
        shares: part of the training that is in each phase.
        pieces: seconds and operations of what a run does beside its steps, by name, and how often.
        bytes: what is held at once, by what it is.
        parameters: of the model, and how many are learned in all and by the method.
    """

    batch_size: int
    steps: dict[str, Step] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    pieces: dict[str, tuple[float, int, float]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    parameters: tuple[int, int, int] = (0, 0, 0)

    def mean(self, of: Callable[[Step], float]) -> float:
        """Over the steps of a whole training."""
        known = {phase: share for phase, share in self.shares.items() if phase in self.steps}
        whole = sum(known.values())
        return sum(of(self.steps[phase]) * share / whole for phase, share in known.items()) if known else 0.0

    @property
    def num_timed(self) -> int:
        return sum(step.num_timed for step in self.steps.values())


class _Watch(L.Callback):
    """Puts the method into each of its phases, times steps of it, counts one, and ends the training."""

    def __init__(self, phases: Mapping[str, int], num_steps: int) -> None:
        self.phases, self.num_steps = phases, num_steps
        self.steps: dict[str, Step] = {}
        self._count, self._seconds, self._began, self._made = Count(), 0.0, 0.0, 0
        self._script = self._play()
        self._turn = next(self._script)
        self._counting = ExitStack()

    def _play(self) -> Iterator[tuple[int, bool]]:
        """For each optimiser step the one that it stands for, and whether it is counted; what comes back is timed."""
        for phase, step in self.phases.items():
            yield step, False  # sets everything up
            yield step, True
            times: list[float] = []
            count = self._count
            while len(times) < 2 or (sum(times) < TRIED_SECONDS and len(times) < MAX_TRIED):
                yield step, False
                times.append(self._seconds)
            self.steps[phase] = Step(float(median(times)), count, len(times))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        step, is_counted = self._turn
        pl_module.method.advance(step, self.num_steps)
        if is_counted:
            self._count = self._counting.enter_context(counting())

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._counting.close()
        if trainer.global_step == self._made:
            return  # gradients are being accumulated
        self._made, now = trainer.global_step, piece.clock()
        self._seconds, self._began = now - self._began, now
        turn = next(self._script, None)
        trainer.should_stop = turn is None
        self._turn = turn or self._turn


def phases_of(method: Any, num_steps: int) -> tuple[dict[str, int], dict[str, float]]:
    """A step in the middle of each phase of a training, the longest first, and which part of it each is."""
    num_probes = min(num_steps, 50)
    probed = []
    for index in range(num_probes):
        step = (2 * index + 1) * num_steps // (2 * num_probes)
        method.advance(step, num_steps)
        probed.append((method.phase, step))
    shares = {phase: number / num_probes for phase, number in Counter(phase for phase, _ in probed).most_common()}
    steps = {phase: [step for other, step in probed if other == phase] for phase in shares}
    middle = {phase: found[len(found) // 2] for phase, found in steps.items()}
    large = {phase: step for phase, step in middle.items() if shares[phase] >= SMALL_PART}
    return large or middle, shares


def amounts(plan: Plan, data: DataModule) -> Amounts:
    """How often a run of this plan trains, validates and tests."""
    trainer, batch_size = plan.config["trainer"], plan.config["data"]["batch_size"]
    ranks = trainer["devices"] if isinstance(trainer["devices"], int) and trainer["devices"] > 0 else 1

    def num_batches(split: str) -> int:
        whole = max(1, math.ceil(len(data.dataset(split)) / batch_size / ranks))
        limit = trainer[f"limit_{split}_batches"]
        return whole if limit is None else min(whole, limit if isinstance(limit, int) else max(1, int(limit * whole)))

    train, accumulate = num_batches("train"), trainer["accumulate_grad_batches"]
    steps = trainer["max_steps"]
    if steps <= 0:
        steps = max(1, (trainer["max_epochs"] or 1) * train // accumulate)
    if not plan.task.learns(plan):
        steps = 0
    every = trainer["val_check_interval"]
    batches = every if isinstance(every, int) else max(1, int(every * train))
    validations = max(1, round(steps * accumulate / batches)) if steps else 0
    logged = steps // trainer["log_every_n_steps"]
    return Amounts(steps, logged, validations, num_batches("val"), num_batches("test"))


def rehearse(plan: Plan, batch_size: int) -> Rehearsal:
    """Try a run on batches of this size; nothing is written, and no other run is needed.

    Raises:
        ConfigError: if a component refuses its values.
    """
    quiet_lightning()
    parts = _assemble(plan, batch_size)
    learner, often = parts.learner, amounts(plan, parts.data)
    set_threads(plan, parts.model)
    trainer = make_trainer(**trainer_arguments(plan) | IN_MEMORY | _where(plan))
    found = Rehearsal(batch_size, parameters=_parameters(parts))
    learner.to(trainer.strategy.root_device)
    found.pieces["preparation"] = (piece.timed(lambda: learner.rehearse(parts.data)), 0, 1.0)
    L.seed_everything(plan.config["seed"], verbose=False)
    if learner.learns and often.steps:
        phases, found.shares = phases_of(parts.method, often.steps)
        watch = _Watch(phases, often.steps)
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        trainer.fit(learner, datamodule=parts.data)
        found.steps = watch.steps
    optimizers = trainer.optimizers if found.steps else []
    learner.to(trainer.strategy.root_device)
    for part in learner.pieces(parts.data, often):
        found.pieces[part.name] = (*_try(part.make), part.times) if part.times else (0.0, 0, 0.0)
    found.bytes = {**_bytes(learner, optimizers, found), **learner.holds()}
    return found


def _assemble(plan: Plan, batch_size: int) -> Assembly:
    parts = assemble(plan)
    data = DataModule(plan.data, {**plan.config["data"], "batch_size": batch_size}, plan.task.data_seed(plan))
    return Assembly(parts.model, parts.method, parts.learner, data)


def _where(plan: Plan) -> dict[str, Any]:
    """The accelerator that was asked for, or what there is; mixed precision is for the one that it was meant for."""
    trainer = plan.config["trainer"]
    if trainer["accelerator"] in ("auto", "cpu") or torch.cuda.is_available():
        return {"accelerator": trainer["accelerator"], "precision": trainer["precision"]}
    return {"accelerator": "cpu", "precision": "32-true"}


def _parameters(parts: Assembly) -> tuple[int, int, int]:
    learned = sum(p.numel() for p in parts.learner.parameters() if p.requires_grad)
    method = sum(p.numel() for p in parts.method.parameters())
    return sum(p.numel() for p in parts.model.parameters()), learned, method


def _try(make: Callable[[], object] | float) -> tuple[float, int]:
    """Seconds of one piece, behind a first that sets it up where that is quick, and its operations."""
    if isinstance(make, float):
        return make, 0
    with counting() as count:
        seconds = piece.timed(make)
    if seconds < TRIED_SECONDS:
        times: list[float] = []
        while len(times) < 2 or (sum(times) < TRIED_SECONDS / 3 and len(times) < MAX_TRIED):
            times.append(piece.timed(make))
        seconds = float(median(times))
    return seconds, count.total


def _bytes(learner: Learner, optimizers: list[torch.optim.Optimizer], found: Rehearsal) -> dict[str, int]:
    """What weights and training hold; a step's activations are what it makes beside its gradients."""
    gradients = sum(_size(p) for p in learner.parameters() if p.requires_grad) if found.steps else 0
    states = [value for o in optimizers for state in o.state.values() for value in state.values()]
    peak = max((step.count.peak_bytes for step in found.steps.values()), default=0)
    return {
        "weights": sum(map(_size, {id(x): x for x in [*learner.parameters(), *learner.buffers()]}.values())),
        "gradients": gradients,
        "optimiser state": sum(_size(value) for value in states if isinstance(value, torch.Tensor)),
        "activations": max(0, peak - gradients),
    }


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def resident_bytes() -> int:
    """Memory of this process now; where the system does not tell, the most that it has had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return int(peak_memory_mib() * 2**20)
