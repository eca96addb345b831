"""Distances between what the pruned and the dense model compute."""

import torch.nn.functional as F
from torch import Tensor


def divergence(logits: Tensor, dense_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the dense model's predictions, in nats, mean over samples and tokens."""
    ours, theirs = logits.float().log_softmax(-1), dense_logits.float().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()


def distance(states: Tensor, dense_states: Tensor, kind: str) -> Tensor:
    """Distance of hidden states `[..., d]`: mean over entries (`mse`, `smooth_l1`) or tokens (`cosine`)."""
    if kind == "mse":
        return F.mse_loss(states, dense_states)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(states, dense_states)
    return 1 - F.cosine_similarity(states, dense_states, dim=-1).mean()
