"""Gradient checkpointing: activations inside of blocks are computed again in the backward pass rather than kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from permlab.model.base import Backbone


def checkpoint_stages(model: Backbone) -> None:
    """Let every stage of a model keep its inputs alone for the backward pass; losses and gradients stay what they are.

    A stage that runs under other weights than its own, by `functional_call`, is run again under those.

    Raises:
        ValueError: if the model has no stages.
    Source: Chen et al. 2016, arXiv:1604.06174, through `torch.utils.checkpoint`.
    Cost: one more forward pass of the stages in training; memory of one stage instead of all.
    """
    if not model.stages:
        raise ValueError(f"{type(model).__name__} has no blocks to checkpoint")
    for stage in model.stages:
        stage.forward = _checkpointed(_Stage(stage, stage.forward))


class _Stage(nn.Module):
    """A stage by its own forward, below which its weights can be exchanged."""

    def __init__(self, stage: nn.Module, own: Callable[..., Any]) -> None:
        super().__init__()
        self.stage, self.own = stage, own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


def _checkpointed(stage: _Stage) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return stage.own(*args, **kwargs)
        weights: dict[str, Tensor] = dict(stage.named_parameters(remove_duplicate=False))

        def again(*args: Any, **kwargs: Any) -> Any:
            return functional_call(stage, weights, args, kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    return forward
