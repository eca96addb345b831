"""Arguments that all searches for a channel order take: their checks, and the clock of a budget."""

import time

import numpy as np
from torch import Tensor

from permlab.ops.nm import check_pattern
from permlab.permutation import check_order
from permlab.sparsity.importance import check_scores


def check_pruning(scores: Tensor, n: int, m: int, num_groups: int) -> None:
    """Refuse scores that are none, and a pattern or groups that do not fit them.

    Raises:
        ValueError: as `check_scores`, or if num_groups does not divide the channels or n and m are no pattern
            for a group.
    """
    check_scores(scores)
    width = scores.shape[1]
    if num_groups < 1 or width % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide {width} channels")
    check_pattern(width // num_groups, n=n, m=m)


def check_budget(budget_s: float | None) -> None:
    """Refuse a budget of no seconds.

    Raises:
        ValueError: if it is neither None nor positive.
    """
    if budget_s is not None and not budget_s > 0:
        raise ValueError(f"budget_s={budget_s} is not positive")


def checked_start(order: Tensor, width: int, num_groups: int) -> np.ndarray:
    """Starting order of a search as an array.

    Raises:
        ValueError: if it is no permutation of the channels, or takes one out of its group.
    """
    check_order(order)
    if order.shape != (width,):
        raise ValueError(f"an order of shape {tuple(order.shape)} does not fit {width} channels")
    start = order.cpu().numpy()
    size = width // num_groups
    if (start // size != np.arange(width) // size).any():
        slot = int(np.argmax(start // size != np.arange(width) // size))
        raise ValueError(f"the starting order takes channel {start[slot]} to slot {slot}, across {num_groups} groups")
    return start


class Clock:
    """Wall-clock budget, counted from when the clock is made; without one it is never over."""

    def __init__(self, budget_s: float | None) -> None:
        self.budget_s = budget_s
        self._start = time.perf_counter()

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    def is_over(self) -> bool:
        return self.budget_s is not None and self.elapsed_s() >= self.budget_s
