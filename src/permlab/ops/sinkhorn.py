"""Sinkhorn's normalisation of a score matrix to a doubly stochastic one."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from permlab.ops.cost import note
from permlab.ops.schedule import check_temperature
from permlab.ops.threads import as_batch, is_readable, run_together


def sinkhorn(log_scores: Float[Tensor, "*b n n"], *, temperature: float, num_iters: int) -> Float[Tensor, "*b n n"]:
    r"""Rescale a score matrix until every row and every column sums to one.

    Alternates row and column normalisation of `exp(log_scores / temperature)`. Columns come
    last, so after finitely many sweeps columns are exact and the remaining error sits in the
    rows. The gradient is that of the same finitely many sweeps.

    On a CPU a compiled kernel rescales a matrix of weights, and goes over to logarithms in
    float64 where that would overflow or vanish, so any temperature and any spread of the
    scores will do. Elsewhere, and under torch.compile and torch.func, sweeps are made in torch,
    in logarithms of the input's precision.

    A pair scored -inf gets weight and gradient 0. Where the allowed pairs contain no perfect
    matching there is no doubly stochastic limit, and the rows stay away from one.

    Shapes:
        b: any number of batch axes, possibly none.  n: slots (axis -2) and items (axis -1).
    Args:
        log_scores: affinity of item j for slot i, in nats. -inf forbids a pair.
        temperature: positive, in nats. Halving it doubles the contrast and slows convergence.
        num_iters: row-plus-column sweeps, at least 1.
    Returns:
        Non-negative matrix, dtype and device of the input; computed in float32 at least.
    Raises:
        ValueError: if the scores are not floating point or not square, if temperature <= 0 or
            num_iters < 1; on a CPU also if a row or a column has no finite score, which elsewhere,
            where looking would make the device wait, gives NaN.
    Source: Mena et al. 2018, arXiv:1802.08665, definition of S(X).
    Differs from source: logarithms or stored scalings instead of the ratio form; same values.
    Cost: O(num_iters * n^2) time, forward and backward; memory O(n^2 + num_iters * n), since
        only the scaling factors of each sweep are kept and its matrix is computed again.
    Example:
        >>> scores = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> sinkhorn(scores, temperature=1.0, num_iters=50).round(decimals=2)
        tensor([[0.1800, 0.8200],
                [0.8200, 0.1800]])
    """
    if not log_scores.is_floating_point():
        raise ValueError(f"scores are floating point, got {log_scores.dtype}")
    if log_scores.ndim < 2 or log_scores.shape[-1] != log_scores.shape[-2] or log_scores.shape[-1] == 0:
        raise ValueError(f"scores are square matrices, got shape {tuple(log_scores.shape)}")
    check_temperature(temperature)
    if num_iters < 1:
        raise ValueError(f"num_iters={num_iters} is below 1")
    # An exponential for each entry, and for each of its two normalisations in a sweep a product and a sum.
    note("sinkhorn", log_scores.numel() * (1 + 4 * num_iters), log_scores)
    wide = log_scores.to(torch.promote_types(log_scores.dtype, torch.float32))
    if is_readable(wide):
        return _CompiledSinkhorn.apply(wide, temperature, num_iters).to(log_scores.dtype)
    return _Sinkhorn.apply(wide / temperature, num_iters).to(log_scores.dtype)


def _check_maxima(scores: Tensor) -> None:
    for axis, name in ((-1, "row"), (-2, "column")):
        # The maximum is NaN where a score is, and NaN is handed on: the caller sees where it came from.
        infinite = scores.detach().amax(axis).isinf()
        if infinite.any():
            raise ValueError(f"{name} {infinite.nonzero()[0].tolist()} of the scores has no finite maximum")


class _CompiledSinkhorn(torch.autograd.Function):
    """The sweeps by the CPU kernel, which see for what is kept between the passes."""

    @staticmethod
    def forward(ctx, scores: Tensor, temperature: float, num_iters: int) -> Tensor:  # type: ignore[override]
        from permlab.ops.sinkhorn_kernel import compiled

        flat = as_batch(scores, 2)
        batch, n, _ = flat.shape
        matrix = np.empty_like(flat)
        scalings = np.empty((2, batch, num_iters, n), flat.dtype)
        epochs = np.empty((batch, num_iters), np.int64)
        # Of these only a few lines are written: the system provides memory for no others.
        potentials = np.empty((2, batch, num_iters + 1, n))
        usable = np.empty(batch, np.int64)
        kept = (matrix, *scalings, epochs, *potentials)
        ctx.scale, ctx.work = math.log2(math.e) / temperature, num_iters * flat.size // 8
        forward, _ = compiled(flat.dtype)
        run_together(forward, batch, ctx.work, n, flat, ctx.scale, *kept, usable)
        if not usable.all():
            _check_maxima(scores)
            matrix[usable == 0] = np.nan
        result = torch.from_numpy(matrix).view(scores.shape)
        ctx.kept = (scalings, epochs, potentials)
        ctx.save_for_backward(scores, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        from permlab.ops.sinkhorn_kernel import compiled

        scores, result = ctx.saved_tensors
        flat, matrix, grad_matrix = (as_batch(x, 2) for x in (scores, result, grad))
        scalings, epochs, potentials = ctx.kept
        grad_scores = np.empty_like(flat)
        _, backward = compiled(flat.dtype)
        given = (flat, ctx.scale, matrix, *scalings, epochs, *potentials, grad_matrix)
        run_together(backward, len(flat), ctx.work, flat.shape[-1], *given, grad_scores)
        return torch.from_numpy(grad_scores).view(scores.shape), None, None


class _Sinkhorn(torch.autograd.Function):
    """The sweeps in torch, as half-steps: even ones normalise rows, odd ones columns.

    Half-step h computes the potential p[h] = -logsumexp(scores + p[h - 1]), p[-1] = 0; the
    last half-step is a softmax, which keeps columns exact however large the potentials are.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, num_iters: int) -> Tensor:  # type: ignore[override]
        potentials: list[Tensor] = []
        shifted = scores
        for half in range(2 * num_iters - 1):
            potentials.append(shifted.logsumexp(_axis(half), keepdim=True).neg_())
            shifted = scores + potentials[-1]
        ctx.save_for_backward(scores, *potentials)
        return shifted.softmax(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        scores, *potentials = ctx.saved_tensors
        matrix = (scores + potentials[-1]).softmax(-2)
        flow = matrix * grad
        grad_scores = flow - matrix * flow.sum(-2, keepdim=True)
        grad_potential = grad_scores.sum(-1, keepdim=True)
        for half in reversed(range(len(potentials))):
            shifted = scores + potentials[half]
            if half > 0:
                shifted += potentials[half - 1]
            flow = shifted.exp_().mul_(grad_potential)
            grad_scores -= flow
            grad_potential = -flow.sum(_axis(half + 1), keepdim=True)
        return grad_scores, None


def _axis(half: int) -> int:
    return -1 if half % 2 == 0 else -2
