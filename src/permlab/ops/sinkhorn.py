"""Sinkhorn's normalisation of a score matrix to a doubly stochastic one."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from permlab.ops.schedule import check_temperature


def sinkhorn(log_scores: Float[Tensor, "*b n n"], *, temperature: float, num_iters: int) -> Float[Tensor, "*b n n"]:
    r"""Rescale a score matrix until every row and every column sums to one.

    Alternates row and column normalisation of `log_scores / temperature` in the log domain.
    Columns come last, so after finitely many sweeps columns are exact and the remaining error
    sits in the rows. The gradient is that of the same finitely many sweeps.

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
        ValueError: if the scores are not floating point or not square, if a row or a column
            has no finite score, if temperature <= 0 or num_iters < 1.
    Source: Mena et al. 2018, arXiv:1802.08665, definition of S(X).
    Differs from source: log domain instead of the ratio form; same limit.
    Cost: O(num_iters * n^2) time, forward and backward; memory O(n^2 + num_iters * n), since
        only the scaling factors of each sweep are kept and its matrix is computed again.
    Example:
        >>> scores = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> sinkhorn(scores, temperature=1.0, num_iters=50).round(decimals=2)
        tensor([[0.1800, 0.8200],
                [0.8200, 0.1800]])
    """
    _check_scores(log_scores)
    check_temperature(temperature)
    if num_iters < 1:
        raise ValueError(f"num_iters={num_iters} is below 1")
    wide = log_scores.to(torch.promote_types(log_scores.dtype, torch.float32))
    return _Sinkhorn.apply(wide / temperature, num_iters).to(log_scores.dtype)


def _check_scores(scores: Tensor) -> None:
    if not scores.is_floating_point():
        raise ValueError(f"scores are floating point, got {scores.dtype}")
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or scores.shape[-1] == 0:
        raise ValueError(f"scores are square matrices, got shape {tuple(scores.shape)}")
    for axis, name in ((-1, "row"), (-2, "column")):
        # The maximum is NaN where a score is, and NaN is handed on: the caller sees where it came from.
        infinite = scores.detach().amax(axis).isinf()
        if infinite.any():
            raise ValueError(f"{name} {infinite.nonzero()[0].tolist()} of the scores has no finite maximum")


class _Sinkhorn(torch.autograd.Function):
    """The sweeps as half-steps: even ones normalise rows, odd ones columns.

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
