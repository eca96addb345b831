"""What a step takes, from the shape of the backbone and the speed of one matrix product: before anything is built."""

import json
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from permlab.config.build import build
from permlab.config.plan import Plan
from permlab.model.base import Backbone
from permlab.ops.cost import listening
from permlab.record.pulse import duration, say
from permlab.run.outlook import LONG_SECONDS, Outlook, Training

# Part of a large matrix product's speed that training reaches, roughly.
UTILISATION = 0.6
# The same where products are so large that all else hardly counts: of models that are not tried.
LARGE_UTILISATION = 0.9
# Seconds that a call of one of torch's operators takes however small its tensors are, roughly.
CALL_SECONDS = 8e-6
# A forward pass and its gradients: those of a product are two products.
WITH_GRADIENTS = 3
MATMUL_SIZE, MATMUL_SECONDS = 1024, 0.1


@dataclass(frozen=True)
class Shape:
    """A backbone without numbers.

    Args:
        num_parameters: of it.
        num_items: that it reads of a sample.
        flops, num_operations: of its forward pass over one sample, and calls of torch's operators in it.
        is_counted: whether they were counted; else two for each parameter and item.
    """

    num_parameters: int
    num_items: int
    flops: int
    num_operations: int
    is_counted: bool


def shape_of(plan: Plan) -> Shape:
    """The backbone of a plan, built on torch's `meta` device, where tensors have no numbers.

    Raises:
        ConfigError: if the backbone refuses its values.
    """
    spec = plan.spec
    return _shape(json.dumps(plan.config["model"], sort_keys=True), spec)


@cache
def _shape(settings: str, spec: Any) -> Shape:
    with torch.device("meta"), warnings.catch_warnings():
        # A checkpoint's numbers have no place there, which torch says of every one of its tensors.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        model: Backbone = build("model", json.loads(settings), spec)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    # Some libraries look at numbers unless they see that there are none.
    for mode in (nullcontext, lambda: FakeTensorMode(allow_non_fake_inputs=True)):
        try:
            with mode(), torch.no_grad(), listening() as ours, FlopCounterMode(display=False) as counter:
                model.read(model.embed(blank(spec, 1)))
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            continue
        flops = counter.get_total_flops() + sum(ours.values())
        return Shape(num_parameters, model.num_items, flops, _num_operations(model), True)
    return Shape(num_parameters, model.num_items, 2 * num_parameters * model.num_items, _num_operations(model), False)


def blank(spec: Any, num_samples: int) -> torch.Tensor:
    """Samples without numbers."""
    if spec.is_sequence:
        return torch.zeros(num_samples, spec.width, dtype=torch.long, device="meta")
    return torch.zeros(num_samples, spec.channels, spec.height, spec.width, device="meta")


def _num_operations(model: torch.nn.Module) -> int:
    """Calls of operators in a forward pass, roughly: three for each module that has parameters of its own."""
    return 3 * sum(bool(list(module.parameters(recurse=False))) for module in model.modules())


@cache
def matmul_speed(device: str, dtype: torch.dtype, num_threads: int) -> float:
    """Floating-point operations in a second of matrix products here, the fastest of a few.

    Args:
        num_threads: that torch uses, by which the answer is kept.
    """
    left, right = (torch.ones(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype) for _ in range(2))
    began, best = time.perf_counter(), 0.0
    while time.perf_counter() - began < MATMUL_SECONDS or not best:
        start = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for the device
        best = max(best, 2 * MATMUL_SIZE**3 / (time.perf_counter() - start))
    return best


def passes_seconds(
    shape: Shape, num_samples: int, passes: float, speed: float, utilisation: float = UTILISATION
) -> float:
    """Seconds of passes over so many samples at once, a gradient's counted as two.

    Args:
        speed: of matrix products.
        utilisation: part of that speed that is reached.
    """
    return passes * max(num_samples * shape.flops / (utilisation * speed), CALL_SECONDS * shape.num_operations)


def step_seconds(training: Training) -> float:
    """Seconds of an optimiser step, by its backbone's operations alone."""
    config = training.plan.config
    samples = config["data"]["batch_size"]
    passes = WITH_GRADIENTS * training.plan.task.effort
    return config["trainer"]["accumulate_grad_batches"] * passes_seconds(
        shape_of(training.plan), samples, passes, speed_of(config["trainer"])
    )


def beside_seconds(plan: Plan) -> float:
    """Seconds of what goes through the model beside steps, validations and tests."""
    count = sum(plan.task.passes(plan).values())
    return passes_seconds(shape_of(plan), 1, count, speed_of(plan.config["trainer"])) if count else 0.0


def speed_of(trainer: Mapping[str, Any]) -> float:
    """Speed of matrix products where this trainer computes, in the precision that it asks for."""
    on_gpu = trainer["accelerator"] != "cpu" and torch.cuda.is_available()
    half = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(trainer["precision"]).partition("-")[0])
    return matmul_speed("cuda" if on_gpu else "cpu", half or torch.float32, torch.get_num_threads())


def foretold(plan: Plan) -> Outlook:
    """The outlook of a run that begins, which from now on weighs trainings by their operations.

    Says a line where these alone take more than an hour here.
    """
    outlook = Outlook(plan)
    try:
        seconds = sum(
            step_seconds(training) * (training.num_steps or 0) + beside_seconds(training.plan)
            for training in outlook.trainings
        )
    except Exception:  # whatever a backbone does without numbers: the run itself will say what is wrong, if anything is
        return outlook
    outlook.step_cost = step_seconds
    if seconds > LONG_SECONDS:
        say(
            f"about {duration(seconds)} here for the whole command, by the speed of a matrix product (plan=true tells "
            f"more); to shorten that, {outlook.shorter()}"
        )
    return outlook
