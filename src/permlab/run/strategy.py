"""Fully sharded training of the backbone, with the permutation whole on every rank."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn


class ShardedBackbone(FSDPStrategy):
    """FSDP in which the method's parameters are not sharded.

    They are few, and are read between steps (statistics, snapshots, the frozen order), when a
    shard would be of no use. FSDP then leaves their gradients alone, so `average` does what it
    would have done.

    Args:
        method: the module to keep whole.
    """

    def __init__(self, method: nn.Module) -> None:
        super().__init__(ignored_modules=[method])

    def average(self, module: nn.Module) -> None:
        """Average the module's gradients over the ranks."""
        for parameter in module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def clip(self, others: nn.Module, limit: float) -> torch.Tensor:
        """Clip the gradient norm of all that is sharded; `others` (the method) are left out."""
        kept = [(parameter, parameter.grad) for parameter in others.parameters()]
        for parameter, _ in kept:
            parameter.grad = None
        root: Any = self.model
        norm = root.clip_grad_norm_(limit)
        for parameter, grad in kept:
            parameter.grad = grad
        return norm
