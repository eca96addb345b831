"""Relaxations of sorting: matrices that become the sorting permutation as the temperature falls."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from permlab.ops.schedule import check_temperature
from permlab.ops.threads import as_batch, is_readable, run_tasks


def soft_sort(scores: Float[Tensor, "*b n"], *, temperature: float, power: float = 2.0) -> Float[Tensor, "*b n n"]:
    r"""Relax the permutation that sorts scores in descending order.

    Row i weighs the items by how near their scores are to the i-th largest one,
    `softmax_j(-|sorted_i - s_j|^power / temperature)`. Rows sum to one, columns only in the
    limit. As the temperature falls the matrix of distinct scores tends to the sorting
    permutation; tied items have equal columns at every temperature. Items scored -inf share
    the last slots equally and receive no gradient.

    Not scale invariant: scores times c are a temperature divided by c^power.

    Shapes:
        b: any number of batch axes, possibly none.  n: slots (axis -2) and items (axis -1).
    Args:
        scores: one per item; the highest goes to slot 0.
        temperature: positive, in units of score to the `power`.
        power: exponent of the distance, at least 1 (below, the gradient at distance 0 is infinite).
    Returns:
        Row-stochastic matrix, dtype and device of the input; computed in float32 at least.
    Raises:
        ValueError: if the scores are not floating point, temperature <= 0 or power < 1.
    Source: Prillo and Eisenschlos 2020, SoftSort, arXiv:2006.16038, definition of the operator.
    Differs from source: any power instead of a general metric; -inf is given its limit.
    Cost: O(n^2) time and memory; on a CPU, with finite scores and `power` 1 or 2, by a compiled kernel.
    Example:
        >>> soft_sort(torch.tensor([0.0, 1.0]), temperature=0.5).round(decimals=2)
        tensor([[0.1200, 0.8800],
                [0.8800, 0.1200]])
    """
    check_temperature(temperature)
    if not power >= 1:
        raise ValueError(f"power={power} is below 1")
    if power in (1, 2) and _fits_kernel(scores):
        return _CompiledSoftSort.apply(_widen(scores), temperature, power == 2).to(scores.dtype)
    wide, last = _split(scores)
    ordered = wide.masked_fill(last, -torch.inf).sort(dim=-1, descending=True).values
    last_slots = ordered.isneginf()
    ordered = ordered.masked_fill(last_slots, 0.0)
    distance = (ordered.unsqueeze(-1) - wide.unsqueeze(-2)).abs()
    distance = distance if power == 1 else distance.pow(power)
    return _softmax(-distance / temperature, last_slots, last).to(scores.dtype)


def neural_sort(scores: Float[Tensor, "*b n"], *, temperature: float) -> Float[Tensor, "*b n n"]:
    r"""Relax the permutation that sorts scores in descending order, through sums of distances.

    Row i (counted from 1) is `softmax_j(((n + 1 - 2 i) s_j - sum_k |s_j - s_k|) / temperature)`.
    Rows sum to one and their largest entries, without ties, sit where the sorting permutation
    has its ones, at every temperature. The logits grow with n, so a temperature that suits one
    n is cold for a larger one. Tied items have equal columns. Items scored -inf share the last
    slots equally and receive no gradient.

    Shapes:
        b: any number of batch axes, possibly none.  n: slots (axis -2) and items (axis -1).
    Args:
        scores: one per item; the highest goes to slot 0.
        temperature: positive, in units of score.
    Returns:
        Row-stochastic matrix, dtype and device of the input; computed in float32 at least.
    Raises:
        ValueError: if the scores are not floating point or temperature <= 0.
    Source: Grover et al. 2019, NeuralSort, arXiv:1903.08850, definition of the relaxed operator.
    Differs from source: -inf is given its limit.
    Cost: O(n^2) time and memory; on a CPU, with finite scores, by a compiled kernel.
    Example:
        >>> neural_sort(torch.tensor([0.0, 1.0]), temperature=1.0).round(decimals=2)
        tensor([[0.2700, 0.7300],
                [0.7300, 0.2700]])
    """
    check_temperature(temperature)
    if _fits_kernel(scores):
        return _CompiledNeuralSort.apply(_widen(scores), temperature).to(scores.dtype)
    wide, last = _split(scores)
    distance = (wide.unsqueeze(-1) - wide.unsqueeze(-2)).abs()
    total = distance.masked_fill(last.unsqueeze(-2), 0.0).sum(-1).masked_fill(last, 0.0)
    num_sorted = scores.shape[-1] - last.sum(-1, keepdim=True)
    slots = torch.arange(scores.shape[-1], device=scores.device)
    slope = (num_sorted - 1 - 2 * slots).to(wide.dtype)
    logits = (slope.unsqueeze(-1) * wide.unsqueeze(-2) - total.unsqueeze(-2)) / temperature
    return _softmax(logits, slots >= num_sorted, last).to(scores.dtype)


def _split(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in float32 at least with 0 in place of -inf, and where that was."""
    wide = _widen(scores)
    last = scores.isneginf()
    return wide.masked_fill(last, 0.0), last


def _widen(scores: Tensor) -> Tensor:
    if not scores.is_floating_point():
        raise ValueError(f"scores are floating point, got {scores.dtype}")
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _softmax(logits: Tensor, last_slots: Tensor, last: Tensor) -> Tensor:
    """Softmax over items, with items that were -inf in the last slots and nowhere else."""
    apart = last_slots.unsqueeze(-1) != last.unsqueeze(-2)
    return logits.masked_fill(apart, -torch.inf).softmax(-1)


# Compiled


def _fits_kernel(scores: Tensor) -> bool:
    return scores.is_floating_point() and is_readable(scores) and bool(scores.isfinite().all())


class _CompiledSoftSort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, temperature: float, squared: bool) -> Tensor:  # type: ignore[override]
        from permlab.ops.sorting_kernel import compiled

        ordered, order = scores.sort(dim=-1, descending=True)
        flat, ctx.settings = as_batch(scores, 1), (1 / temperature, int(squared))
        matrix = np.empty((*flat.shape, flat.shape[-1]), flat.dtype)
        run_tasks(
            compiled(flat.dtype).soft_sort, len(flat), matrix.size, flat, as_batch(ordered, 1), *ctx.settings, matrix
        )
        result = torch.from_numpy(matrix).view(*scores.shape, scores.shape[-1])
        ctx.save_for_backward(scores, ordered, order, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        from permlab.ops.sorting_kernel import compiled

        scores, ordered, order, result = ctx.saved_tensors
        flat = as_batch(scores, 1)
        matrix, grad_matrix = as_batch(result, 2), as_batch(grad, 2)
        by_scores, by_ordered = np.empty_like(flat), np.empty_like(flat)
        given = (flat, as_batch(ordered, 1), *ctx.settings, matrix, grad_matrix)
        kernel = compiled(flat.dtype).soft_sort_back
        run_tasks(kernel, len(flat), matrix.size, *given, by_scores, by_ordered)
        direct, sorted_back = (torch.from_numpy(x).view(scores.shape) for x in (by_scores, by_ordered))
        return direct.scatter_add_(-1, order, sorted_back), None, None


class _CompiledNeuralSort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, temperature: float) -> Tensor:  # type: ignore[override]
        from permlab.ops.sorting_kernel import compiled

        flat, ctx.inverse = as_batch(scores, 1), 1 / temperature
        matrix = np.empty((*flat.shape, flat.shape[-1]), flat.dtype)
        order = as_batch(scores.argsort(dim=-1, descending=True), 1)
        run_tasks(compiled(flat.dtype).neural_sort, len(flat), matrix.size, flat, order, ctx.inverse, matrix)
        result = torch.from_numpy(matrix).view(*scores.shape, scores.shape[-1])
        ctx.save_for_backward(scores, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        from permlab.ops.sorting_kernel import compiled

        scores, result = ctx.saved_tensors
        flat = as_batch(scores, 1)
        matrix, grad_matrix = as_batch(result, 2), as_batch(grad, 2)
        by_scores = np.empty_like(flat)
        kernel = compiled(flat.dtype).neural_sort_back
        run_tasks(kernel, len(flat), matrix.size, flat, ctx.inverse, matrix, grad_matrix, by_scores)
        return torch.from_numpy(by_scores).view(scores.shape), None
