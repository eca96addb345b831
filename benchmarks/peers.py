"""The other implementations that ours are timed against, and float64 references.

Published formulas are written out here as plainly as they stand in the papers; libraries are used
where they are installed. Every function takes what ours takes and returns what ours returns.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def library(name: str) -> Any:
    """A module, or None where it is not installed or cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


# Sinkhorn


def sinkhorn_log(scores: Tensor, temperature: float, num_iters: int) -> Tensor:
    """Normalise rows, then columns, in logarithms; gradients by autograd through every sweep."""
    shifted = scores / temperature
    for _ in range(num_iters):
        shifted = shifted - shifted.logsumexp(-1, keepdim=True)
        shifted = shifted - shifted.logsumexp(-2, keepdim=True)
    return shifted.exp()


def sinkhorn_pot(scores: Tensor, temperature: float, num_iters: int) -> Tensor:
    """POT, one problem after the other, without its early stop."""
    ot = library("ot")
    weights = scores.new_ones(scores.shape[-1])
    options = {"numItermax": num_iters, "stopThr": 0, "warn": False}
    return torch.stack([ot.sinkhorn(weights, weights, -matrix, temperature, **options) for matrix in scores])


def sinkhorn_pygmtools(scores: Tensor, temperature: float, num_iters: int) -> Tensor:
    """pygmtools, which counts rows and columns as an iteration each."""
    pygmtools = library("pygmtools")
    settings = {"tau": temperature, "max_iter": 2 * num_iters, "batched_operation": True, "backend": "pytorch"}
    return pygmtools.sinkhorn(scores, **settings)


# Sorting


def soft_sort(scores: Tensor, temperature: float) -> Tensor:
    """SoftSort with squared distance, as published."""
    ordered = scores.sort(descending=True, dim=-1).values
    distance = (scores.unsqueeze(-2) - ordered.unsqueeze(-1)).square()
    return (-distance / temperature).softmax(-1)


def neural_sort(scores: Tensor, temperature: float) -> Tensor:
    """NeuralSort, as published: products with a vector of ones."""
    n = scores.shape[-1]
    column = scores.unsqueeze(-1)
    ones = torch.ones(n, 1, dtype=scores.dtype, device=scores.device)
    total = (column - column.mT).abs() @ (ones @ ones.T)
    slope = n + 1 - 2 * torch.arange(1, n + 1, dtype=scores.dtype, device=scores.device)
    return ((column @ slope.unsqueeze(0) - total).mT / temperature).softmax(-1)


# Permuting


def permute_by_product(items: Tensor, order: Tensor, soft: Tensor) -> Tensor:
    """The usual straight-through estimator: hard matrix forward, soft matrix backward, one product."""
    hard = F.one_hot(order, order.shape[-1]).to(soft.dtype)
    return (hard + soft - soft.detach()) @ items


# Plackett-Luce


def _gumbel_order(logits: Tensor) -> Tensor:
    return (logits.detach() - torch.empty_like(logits).exponential_().log()).argsort(dim=-1, descending=True)


def plackett_luce_logcumsumexp(logits: Tensor) -> Tensor:
    """A sample's log-probability by one reversed cumulative logsumexp."""
    placed = logits.gather(-1, _gumbel_order(logits))
    return (placed - placed.flip(-1).logcumsumexp(-1).flip(-1)).sum(-1)


def plackett_luce_loop(logits: Tensor) -> Tensor:
    """The same, slot by slot."""
    placed = logits.gather(-1, _gumbel_order(logits))
    terms = [placed[:, slot] - placed[:, slot:].logsumexp(-1) for slot in range(placed.shape[-1])]
    return torch.stack(terms).sum(0)


# Assignment


def assign_scipy(scores: Tensor) -> Tensor:
    tables = scores.double().cpu().numpy()
    return torch.stack([torch.from_numpy(linear_sum_assignment(table, maximize=True)[1]) for table in tables])


# Selective scan


def scan_sequential(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    """One token after the other, as mamba_ssm's reference does it: all coefficients first."""
    delta = F.softplus(delta)
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    push = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state = u.new_zeros(*u.shape[:2], A.shape[1])
    outputs = []
    for token in range(u.shape[-1]):
        state = decay[:, :, token] * state + push[:, :, token]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, token]))
    return (torch.stack(outputs, dim=-1) + u * D.unsqueeze(-1)) * F.silu(z)


def scan_mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    """mambapy's parallel scan, which has tokens before channels."""
    pscan = library("mambapy.pscan").pscan
    u, delta, B, C, z = (x.mT for x in (u, F.softplus(delta), B, C, z))
    decay = torch.exp(delta.unsqueeze(-1) * A)
    states = pscan(decay, delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1))
    return (((states @ C.unsqueeze(-1)).squeeze(3) + D * u) * F.silu(z)).mT


def scan_mamba_ssm(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    """The CUDA kernel itself, where it is installed."""
    interface = library("mamba_ssm.ops.selective_scan_interface")
    return interface.selective_scan_fn(u, delta, A, B, C, D, z, delta_softplus=True)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A peer through torch.compile, for CUDA."""
    return torch.compile(function)


def doublings(start: int, stop: int) -> list[int]:
    """start, 2 start, 4 start and so on, up to stop."""
    return [start * 2**k for k in range(int(math.log2(stop / start)) + 1)]
