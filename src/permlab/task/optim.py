"""One optimiser for model and permutation: parameter groups and the shape of the learning rate."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, method: nn.Module, settings: Mapping[str, Any], *, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with the groups `model`, `model_no_decay` and `permutation`, and its schedule per step.

    Weight decay acts on the model's matrices only: vectors (norms, biases), parameters that ask
    for none (`_no_weight_decay`) and the permutation are left alone. The permutation has its own
    peak learning rate, `method.lr`, under the same shape.

    Args:
        settings: lr, weight_decay, beta1, beta2, schedule, warmup_fraction.
        num_steps: optimiser steps of the whole training.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            free = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
            (plain if free else decayed).append(parameter)
    learned = [parameter for parameter in method.parameters() if parameter.requires_grad]
    lr, decay = settings["lr"], settings["weight_decay"]
    groups = [
        {"name": "model", "params": decayed, "lr": lr, "weight_decay": decay},
        {"name": "model_no_decay", "params": plain, "lr": lr, "weight_decay": 0.0},
        {"name": "permutation", "params": learned, "lr": getattr(method, "lr", lr), "weight_decay": 0.0},
    ]
    betas = (settings["beta1"], settings["beta2"])
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=betas)
    schedule, warmup = settings["schedule"], settings["warmup_fraction"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(schedule, step / max(1, num_steps - 1), warmup_fraction=warmup)
    )
    return optimizer, scheduler


def lr_factor(schedule: str, progress: float, *, warmup_fraction: float) -> float:
    """Learning rate at a point of training, as a fraction of its peak.

    `onecycle` rises from 1/25 to 1 and falls to 1/250000, both along a cosine (Smith 2018,
    arXiv:1708.07120, with the fractions that torch's OneCycleLR uses); the others rise linearly
    from 0 and then stay (`constant`), or fall to 0 (`linear`, `cosine`).

    Args:
        progress: 0 at the first step, 1 at the last.
        warmup_fraction: part of the training that rises.
    Raises:
        ValueError: for an unknown schedule.
    Example:
        >>> [round(lr_factor("linear", p, warmup_fraction=0.5), 2) for p in (0.25, 0.5, 0.75, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
    """
    progress = min(max(progress, 0.0), 1.0)
    rising = progress < warmup_fraction
    part = progress / warmup_fraction if rising else (progress - warmup_fraction) / max(1e-12, 1 - warmup_fraction)
    cosine = (1 + math.cos(math.pi * part)) / 2
    if schedule == "onecycle":
        return 1 + (1 / 25 - 1) * cosine if rising else 4e-6 + (1 - 4e-6) * cosine
    if schedule not in ("linear", "cosine", "constant"):
        raise ValueError(f"schedule={schedule}: expected onecycle, cosine, linear or constant")
    if rising:
        return part
    return {"linear": 1 - part, "cosine": cosine, "constant": 1.0}[schedule]
