"""The CPU kernel of the Plackett-Luce log-probability and its gradient, in float64.

Logits have to be finite and within 300 nats of each other. Nothing is checked but whether each order is
one: shapes and types are the caller's duty.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import no_type_check

import numpy as np
from numba import float64, int64, void

from permlab.ops.kernel import LOG2_E, compile_kernel, exp2


@no_type_check
def _log_prob(first, last, logits, order, result, grad, valid):
    """Log-probability of every row's order, and its gradient.

    The weights exp(logit) that are left at slot i sum to rest[i]; log_prob = sum_i log(weight[i] / rest[i]), and
    the gradient at slot i is 1 - weight[i] sum_{k <= i} 1 / rest[k].

    Shapes:
        logits, order, grad: [batch, n].  result: [batch].  valid: [batch], 0 where the order is none, which is
        then left out.
    """
    n = logits.shape[1]
    weight, rest, seen = np.empty(n, np.float64), np.empty(n, np.float64), np.empty(n, np.int64)
    for item in range(first, last):
        row, slots, slopes = logits[item], order[item], grad[item]
        seen[:] = 0
        for i in range(n):
            if 0 <= slots[i] < n:
                seen[slots[i]] = 1
        valid[item] = seen.sum() == n
        if not valid[item]:
            continue
        greatest, least, total = -np.inf, np.inf, 0.0
        for i in range(n):
            greatest = row[i] if row[i] > greatest else greatest
            least = row[i] if row[i] < least else least
        for i in range(n):
            weight[i] = (row[slots[i]] - greatest) * LOG2_E
            total += row[i] - greatest
        for i in range(n):
            weight[i] = exp2(weight[i])
        left = 0.0
        for i in range(n - 1, -1, -1):
            left += weight[i]
            rest[i] = left
        # The logarithm of a product of as many sums as float64 holds.
        width = max(1, int(690.0 / (greatest - least + math.log(n) + 1.0)))
        for start in range(0, n, width):
            product = 1.0
            for i in range(start, min(n, start + width)):
                product *= rest[i]
            total -= math.log(product)
        result[item] = total
        passed = 0.0
        for i in range(n):
            passed += 1.0 / rest[i]
            slopes[slots[i]] = 1.0 - weight[i] * passed


@cache
def compiled() -> Callable[..., None]:
    """The kernel."""
    numbers, indices = float64[:, ::1], int64[:, ::1]
    return compile_kernel(_log_prob, void(int64, int64, numbers, indices, float64[::1], numbers, int64[::1]))
