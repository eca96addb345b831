"""What a command would take, without carrying it out: operations, memory and time of every training it makes."""

import gc
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from permlab.config.plan import Plan
from permlab.run.estimate import LARGE_UTILISATION, WITH_GRADIENTS, Shape, passes_seconds, shape_of, speed_of
from permlab.run.outlook import Training
from permlab.run.rehearsal import Rehearsal, amounts, rehearse, resident_bytes

# Above so many seconds for a step it is tried on fewer samples, and above so many for one sample not at all.
STEP_SECONDS, SAMPLE_SECONDS = 4.0, 20.0
# Float32 weights, gradients, and two moments of the optimiser.
COPIES = 4
# What a process takes more once kernels are compiled, and what logs and draws has come to work.
LATER_BYTES = 230 * 2**20
# Settings of a configuration on which neither time nor memory depends.
WITHOUT_COST = ("seed", "force", "plan", "paths", "debug", "ckpt_path", "logger", "optim")


@dataclass(frozen=True)
class Part:
    """Seconds here and floating-point operations of a part of a run."""

    name: str
    seconds: float
    flops: float


@dataclass
class Projection:
    """What one training with all that belongs to it is going to take.

    Args:
        name: of the training in its command.
        steps: optimiser steps.
        batch_size: samples of a step.
        parameters: of the model, learned in all, and of the method.
        num_items: that a sample has.
        step_flops, step_operations: of a step, and calls of torch's operators.
        parts: the training first.
        bytes: held at the same time at most, by what it is.
        how: what it was measured by.
    """

    name: str
    steps: int
    batch_size: int
    parameters: tuple[int, int, int]
    num_items: int
    step_flops: float
    step_operations: float
    parts: list[Part]
    bytes: dict[str, int]
    how: str
    not_measured: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    @property
    def memory(self) -> int:
        return sum(self.bytes.values())


def project(trainings: Iterable[Training], *, imports: float = 0.0) -> list[Projection]:
    """Projections of trainings; of those that are alike in all that costs, one is tried.

    Args:
        imports: seconds that importing the libraries took, by which other work of that kind is judged.
    Raises:
        ConfigError: if a component refuses its values.
    """
    tried: dict[str, Projection] = {}
    found, process = [], resident_bytes() + LATER_BYTES
    for training in trainings:
        key = _costs(training.plan)
        if key not in tried:
            tried[key] = _project(training, imports)
            tried[key].bytes["process"] = process
        found.append(replace(tried[key], name=training.name))
        gc.collect()
    return found


def _costs(plan: Plan) -> str:
    """What time and memory depend on."""
    config = {key: value for key, value in plan.config.items() if key not in WITHOUT_COST}
    config["method"] = {key: value for key, value in config["method"].items() if key not in ("order", "lr", "name")}
    return json.dumps(config, sort_keys=True, default=str)


def _project(training: Training, imports: float) -> Projection:
    plan = training.plan
    shape, batch_size = shape_of(plan), plan.config["data"]["batch_size"]
    size = tried_samples(shape, plan)
    if size == 0:
        return _by_products(training, shape, imports)
    tried = [rehearse(plan, size)]
    if size < batch_size:
        tried.append(rehearse(plan, size // 2))
    return _by_steps(training, shape, tried, imports)


def tried_samples(shape: Shape, plan: Plan) -> int:
    """Samples of the steps that are tried: the whole batch, where that is quick and fits; 0 for none."""
    passes, speed = WITH_GRADIENTS * plan.task.effort, speed_of(plan.config["trainer"])
    seconds = passes_seconds(shape, 1, passes, speed)
    if seconds > SAMPLE_SECONDS or COPIES * 4 * shape.num_parameters > available_bytes():
        return 0
    batch_size = plan.config["data"]["batch_size"]
    whole = passes_seconds(shape, batch_size, passes, speed)
    return batch_size if whole <= STEP_SECONDS else min(batch_size, max(2, int(batch_size * STEP_SECONDS / whole)))


def available_bytes() -> float:
    """Memory that this machine has left; infinite where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return float("inf")


def _by_steps(training: Training, shape: Shape, tried: list[Rehearsal], imports: float) -> Projection:
    """From steps that were made, on two sizes of batches where the whole one would take too long."""
    plan, largest = training.plan, tried[0]
    trainer, batch_size = plan.config["trainer"], plan.config["data"]["batch_size"]
    accumulate = trainer["accumulate_grad_batches"]

    def whole(values: list[float]) -> float:
        return _at(batch_size, [(r.batch_size, value) for r, value in zip(tried, values, strict=True)])

    steps = _steps(plan)
    seconds = whole([r.mean(lambda step: step.seconds) for r in tried])
    flops = accumulate * whole([r.mean(lambda step: step.count.total) for r in tried])
    parts = [Part("training", steps * seconds, steps * flops)]
    for name, (_, _, times) in largest.pieces.items():
        each = whole([r.pieces[name][0] for r in tried]), whole([r.pieces[name][1] for r in tried])
        parts.append(Part(name, each[0] * times, each[1] * times))
    parts += _around(plan, imports)
    kinds = {name: whole([r.bytes.get(name, 0) for r in tried]) for name in largest.bytes}
    timed = f"{largest.num_timed} real steps" if largest.num_timed else "its pieces, each once or more"
    on = "" if largest.batch_size == batch_size else f" of {largest.batch_size} samples, scaled to {batch_size}"
    return Projection(
        training.name,
        steps,
        batch_size,
        largest.parameters,
        shape.num_items,
        flops,
        accumulate * largest.mean(lambda step: step.count.num_operations),
        [part for part in parts if part.seconds],
        {name: round(size) for name, size in kinds.items()},
        timed + on,
    )


def _steps(plan: Plan) -> int:
    from permlab.data.module import DataModule

    return amounts(plan, DataModule(plan.data, plan.config["data"], plan.task.data_seed(plan))).steps


def _at(batch_size: int, points: list[tuple[int, float]]) -> float:
    """A cost at a size of batch: that of the one, or on the line through two."""
    size, value = points[0]
    if len(points) == 1:
        return value
    slope = max(0.0, (value - points[1][1]) / (size - points[1][0]))
    return value + slope * (batch_size - size)


def _by_products(training: Training, shape: Shape, imports: float) -> Projection:
    """From the backbone's operations and the speed of a matrix product: nothing is built."""
    from permlab.data.module import DataModule

    plan = training.plan
    often = amounts(plan, DataModule(plan.data, plan.config["data"], plan.task.data_seed(plan)))
    trainer, batch_size = plan.config["trainer"], plan.config["data"]["batch_size"]
    samples = batch_size * trainer["accumulate_grad_batches"]
    passes, speed = WITH_GRADIENTS * plan.task.effort, speed_of(trainer)
    flops = passes * samples * shape.flops
    parts = [
        Part(
            "training",
            often.steps * passes_seconds(shape, samples, passes, speed, LARGE_UTILISATION),
            often.steps * flops,
        )
    ]
    evaluations = {
        "validation": often.validations * often.val_batches,
        "test": plan.task.num_tests * often.test_batches,
    }
    for name, times in evaluations.items():
        parts.append(
            Part(
                name,
                times * passes_seconds(shape, batch_size, 1, speed, LARGE_UTILISATION),
                times * batch_size * shape.flops,
            )
        )
    for name, count in plan.task.passes(plan).items():
        parts.append(Part(name, passes_seconds(shape, 1, count, speed, LARGE_UTILISATION), count * shape.flops))
    size = 4 * shape.num_parameters
    kinds = {"weights": size} | ({"gradients": size, "optimiser state": 2 * size} if plan.task.trains_model else {})
    return Projection(
        training.name,
        often.steps,
        batch_size,
        (shape.num_parameters, shape.num_parameters if plan.task.trains_model else 0, 0),
        shape.num_items,
        flops,
        passes * shape.num_operations,
        parts + _around(plan, imports),
        kinds,
        "the speed of a matrix product",
        ["activations", "the method", "what the task does beside steps"],
    )


def _around(plan: Plan, imports: float) -> list[Part]:
    """Pictures, which take about half as long as importing the libraries."""
    return [Part("figures", imports / 2, 0.0)] if plan.config["figures"] and imports else []
