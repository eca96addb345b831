"""What a step takes, from the shape of the backbone and the speed of one matrix product: before anything is built."""

import json
import time
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

# Part of a large matrix product's speed that training reaches, roughly.
UTILISATION = 0.6
# Seconds that a call of one of torch's operators takes however small its tensors are, roughly.
CALL_SECONDS = 8e-6
# A forward pass and its gradients: those of a product are two products.
WITH_GRADIENTS = 3
MATMUL_SIZE, MATMUL_SECONDS = 1024, 0.3


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
    with torch.device("meta"):
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
def matmul_speed(device: str = "cpu", num_threads: int | None = None) -> float:
    """Floating-point operations in a second of float32 matrix products here, the fastest of a few.

    Args:
        num_threads: that torch uses, by which the answer is kept.
    """
    left, right = (torch.ones(MATMUL_SIZE, MATMUL_SIZE, device=device) for _ in range(2))
    began, best = time.perf_counter(), 0.0
    while time.perf_counter() - began < MATMUL_SECONDS or not best:
        start = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for the device
        best = max(best, 2 * MATMUL_SIZE**3 / (time.perf_counter() - start))
    return best


@dataclass(frozen=True)
class Estimate:
    """Seconds of a training, by its backbone's operations alone.

    Args:
        step: of an optimiser step.
        num_steps: of them.
        beside: of validations and tests.
    """

    step: float
    num_steps: int
    beside: float

    @property
    def seconds(self) -> float:
        return self.step * self.num_steps + self.beside


def passes_seconds(shape: Shape, num_samples: int, passes: float) -> float:
    """Seconds of passes over so many samples at once, a gradient's counted as two."""
    speed = UTILISATION * matmul_speed(num_threads=torch.get_num_threads())
    return passes * max(num_samples * shape.flops / speed, CALL_SECONDS * shape.num_operations)
