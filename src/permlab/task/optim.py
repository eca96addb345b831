"""One optimiser for model and permutation: parameter groups and the shape of the learning rate."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Stage:
    """A part that learns at a peak rate of its own, from some step on; nothing else learns from then on.

    Args:
        name: of its parameter group.
        module: whose parameters learn, without weight decay.
        lr: peak learning rate.
        first: optimiser step, counted from 0, at which its schedule starts.
    """

    name: str
    module: nn.Module
    lr: float
    first: int


def build_optimizer(
    model: nn.Module,
    method: nn.Module,
    settings: Mapping[str, Any],
    *,
    num_steps: int,
    stages: Sequence[Stage] = (),
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with the groups `model`, `model_no_decay` and `permutation`, and its schedule per step.

    Weight decay acts on the model's matrices only: vectors (norms, biases), parameters that ask
    for none (`_no_weight_decay`) and the permutation are left alone. The permutation has its own
    peak learning rate, `method.lr`, under the same shape. A stage has a group, a rate and a schedule
    of its own; the other groups' schedules end where the first stage begins.

    Args:
        settings: lr, weight_decay, beta1, beta2, schedule, warmup_fraction, hold_fraction.
        num_steps: optimiser steps of the whole training.
        stages: parts of the model that learn later than the rest.
    """
    later = {id(parameter) for stage in stages for parameter in stage.module.parameters()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in later:
            free = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
            (plain if free else decayed).append(parameter)
    learned = [parameter for parameter in method.parameters() if parameter.requires_grad]
    lr, decay = settings["lr"], settings["weight_decay"]
    groups = [
        {"name": "model", "params": decayed, "lr": lr, "weight_decay": decay},
        {"name": "model_no_decay", "params": plain, "lr": lr, "weight_decay": 0.0},
        {"name": "permutation", "params": learned, "lr": getattr(method, "lr", lr), "weight_decay": 0.0},
    ]
    spans = [(0, min([num_steps, *(stage.first for stage in stages)]))] * len(groups)
    for stage in stages:
        learned = list(stage.module.parameters())
        groups.append({"name": stage.name, "params": learned, "lr": stage.lr, "weight_decay": 0.0})
        spans.append((stage.first, num_steps))
    kept = [(group, span) for group, span in zip(groups, spans, strict=True) if group["params"]]
    betas = (settings["beta1"], settings["beta2"])
    optimizer = torch.optim.AdamW([group for group, _ in kept], betas=betas)
    factors = [_factor(settings, *span) for _, span in kept]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def _factor(settings: Mapping[str, Any], first: int, stop: int) -> Callable[[int], float]:
    """Of the learning rate at a step, its schedule running from the first step to the last before `stop`."""
    last = max(1, stop - first - 1)
    shape = {key: settings[key] for key in ("warmup_fraction", "hold_fraction")}
    return lambda step: lr_factor(settings["schedule"], (step - first) / last, **shape)


def lr_factor(schedule: str, progress: float, *, warmup_fraction: float, hold_fraction: float = 0.0) -> float:
    """Learning rate at a point of training, as a fraction of its peak.

    `onecycle` rises from 1/25 to 1 and falls to 1/250000, both along a cosine (Smith 2018,
    arXiv:1708.07120, with the fractions that torch's OneCycleLR uses); the others rise linearly
    from 0 and then stay (`constant`), or fall to 0 (`linear`, `cosine`), at once or once the peak has been held.

    Args:
        progress: 0 at the first step, 1 at the last.
        warmup_fraction: part of the training that rises.
        hold_fraction: part of the training, from its first step, before `linear` and `cosine` fall.
    Raises:
        ValueError: for an unknown schedule.
    Example:
        >>> [round(lr_factor("linear", p, warmup_fraction=0.5), 2) for p in (0.25, 0.5, 0.75, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
        >>> [lr_factor("linear", p, warmup_fraction=0.25, hold_fraction=0.5) for p in (0.25, 0.5, 0.75, 1.0)]
        [1.0, 1.0, 0.5, 0.0]
    """
    progress = min(max(progress, 0.0), 1.0)
    rising = progress < warmup_fraction
    begin = warmup_fraction if schedule == "onecycle" else max(warmup_fraction, hold_fraction)
    part = progress / warmup_fraction if rising else max(0.0, progress - begin) / max(1e-12, 1 - begin)
    cosine = (1 + math.cos(math.pi * part)) / 2
    if schedule == "onecycle":
        return 1 + (1 / 25 - 1) * cosine if rising else 4e-6 + (1 - 4e-6) * cosine
    if schedule not in ("linear", "cosine", "constant"):
        raise ValueError(f"schedule={schedule}: expected onecycle, cosine, linear or constant")
    if rising:
        return part
    return {"linear": 1 - part, "cosine": cosine, "constant": 1.0}[schedule]
