"""Assignment of items to slots with the largest total score."""

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@torch.no_grad()
def assign(scores: Float[Tensor, "*b n n"]) -> Int64[Tensor, "*b n"]:
    """Order of the permutation with the largest sum of scores (a maximum-weight perfect matching).

    Among several best permutations it returns the same one every time. The result carries no
    gradient.

    Shapes:
        b: any number of batch axes, possibly none.  n: slots (axis -2) and items (axis -1).
    Args:
        scores: affinity of item j for slot i. -inf forbids a pair.
    Returns:
        int64 gather indices on the device of the scores: slot i takes item `order[i]`.
    Raises:
        ValueError: if the scores are not floating point or not square, if one is NaN or +inf,
            or if the forbidden pairs leave no permutation.
    Source: Crouse 2016, On implementing 2D rectangular assignment algorithms, through
        scipy.optimize.linear_sum_assignment.
    Differs from source: Nothing.
    Cost: O(n^3) at worst for each matrix, in float64 on the CPU, one after the other.
    Example:
        >>> assign(torch.tensor([[1.0, 3.0], [2.0, 3.5]]))
        tensor([1, 0])
    """
    if not scores.is_floating_point():
        raise ValueError(f"scores are floating point, got {scores.dtype}")
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or scores.shape[-1] == 0:
        raise ValueError(f"scores are square matrices, got shape {tuple(scores.shape)}")
    table = scores.double().cpu().numpy()
    if not (table < np.inf).all():
        position = np.argwhere(~(table < np.inf))[0].tolist()
        raise ValueError(f"score {table[tuple(position)]} at {position} is neither finite nor -inf")
    orders = np.empty(table.shape[:-1], dtype=np.int64)
    for index in np.ndindex(table.shape[:-2]):
        try:
            orders[index] = linear_sum_assignment(table[index], maximize=True)[1]
        except ValueError as error:
            raise ValueError(f"the -inf scores of matrix {list(index)} leave no permutation") from error
    return torch.from_numpy(orders).to(scores.device)
