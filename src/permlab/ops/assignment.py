"""Assignment of items to slots with the largest total score."""

import math

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from permlab.ops.threads import run_tasks


@torch.no_grad()
def assign(scores: Float[Tensor, "*b n n"]) -> Int64[Tensor, "*b n"]:
    """Order of the permutation with the largest sum of scores (a maximum-weight perfect matching).

    Among several best permutations it returns the identity if that is one, and else the same one
    every time: equal scores, which say nothing, move nothing. What sums differ by in their rounding
    to float64 is no difference. The result carries no gradient.

    Shapes:
        b: any number of batch axes, possibly none.  n: slots (axis -2) and items (axis -1).
    Args:
        scores: affinity of item j for slot i. -inf forbids a pair.
    Returns:
        int64 gather indices on the device of the scores: slot i takes item `order[i]`.
    Raises:
        ValueError: if the scores are not floating point or not square, if one is NaN or +inf,
            or if the forbidden pairs leave no permutation.
    Source: Jonker and Volgenant 1987, A shortest augmenting path algorithm for dense and sparse
        linear assignment problems.
    Differs from source: one pass of row reduction and no column reduction, which costs time
        where many costs are nearly equal.
    Cost: O(n^3) at worst for each matrix, in float64 on the CPU, matrices shared out among threads.
    Example:
        >>> assign(torch.tensor([[1.0, 3.0], [2.0, 3.5]]))
        tensor([1, 0])
        >>> assign(torch.zeros(3, 3))
        tensor([0, 1, 2])
    """
    if not scores.is_floating_point():
        raise ValueError(f"scores are floating point, got {scores.dtype}")
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or scores.shape[-1] == 0:
        raise ValueError(f"scores are square matrices, got shape {tuple(scores.shape)}")
    table = scores.double().cpu().numpy()
    if not (table < np.inf).all():
        position = np.argwhere(~(table < np.inf))[0].tolist()
        raise ValueError(f"score {table[tuple(position)]} at {position} is neither finite nor -inf")
    batch, n = table.shape[:-2], table.shape[-1]
    from permlab.ops.assignment_kernel import compiled

    costs = np.ascontiguousarray(-table).reshape(math.prod(batch), n, n)
    orders, feasible = np.empty((len(costs), n), np.int64), np.empty(len(costs), np.int64)
    run_tasks(compiled(), len(costs), 16 * costs.size, costs, orders, feasible)
    if not feasible.all():
        index = [int(i) for i in np.unravel_index(int(feasible.argmin()), batch)] if batch else []
        raise ValueError(f"the -inf scores of matrix {index} leave no permutation")
    return torch.from_numpy(orders).view(scores.shape[:-1]).to(scores.device)
