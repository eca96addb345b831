"""The CPU kernel of the linear assignment problem: a reduction of the rows, then shortest augmenting paths.

Nothing here is checked but whether there is an assignment: shapes and types are the caller's duty.
"""

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import numpy as np
from numba import float64, int64, void

from permlab.ops.kernel import compile_kernel, piece


@piece
@no_type_check
def _reduce_rows(cost, price, row_of, column_of, free):
    """Each row takes its cheapest column, at a price that makes its second cheapest as good.

    Returns how many rows lost theirs to a later one and stand in `free`, -1 if a row has no column.
    """
    n = cost.shape[0]
    num_free = 0
    for i in range(n):
        least, second, best, other = np.inf, np.inf, 0, 0
        for j in range(n):
            value = cost[i, j] - price[j]
            if value < second:
                if value < least:
                    second, other, least, best = least, best, value, j
                else:
                    second, other = value, j
        if not least < np.inf:
            return -1
        if least < second < np.inf:
            price[best] -= second - least
        elif second == least and row_of[best] >= 0:
            best = other
        loser = row_of[best]
        row_of[best] = i
        column_of[i] = best
        if loser >= 0:
            column_of[loser] = -1
            free[num_free] = loser
            num_free += 1
    return num_free


@piece
@no_type_check
def _nearest(distance, lanes):
    """Place of the least distance above -inf, -1 if there is none below inf; `lanes` is scratch of 16."""
    n = distance.size
    lanes[:] = np.inf
    for start in range(0, n - 15, 16):
        for lane in range(16):
            value = distance[start + lane]
            value = value if value > -np.inf else np.inf
            lanes[lane] = min(lanes[lane], value)
    least = lanes.min()
    for j in range(n - n % 16, n):
        if -np.inf < distance[j] < least:
            least = distance[j]
    if not least < np.inf:
        return -1
    for j in range(n):
        if distance[j] == least:
            return j
    return -1


@piece
@no_type_check
def _augment(cost, price, row_of, column_of, start, distance, settled, previous, done, lanes):
    """Assign a free row along the shortest path to a free column; False if there is none.

    The distance of a column that has been settled is -inf here, which no path is shorter than.
    """
    n = cost.shape[0]
    num_done, i, length, origin, end = 0, start, 0.0, 0.0, -1
    distance[:] = np.inf
    while end < 0:
        row = cost[i]
        for j in range(n):
            reach = row[j] - price[j] - origin
            shorter = reach < distance[j]
            distance[j] = reach if shorter else distance[j]
            previous[j] = i if shorter else previous[j]
        nearest = _nearest(distance, lanes)
        if nearest < 0:
            return False
        length = distance[nearest]
        if row_of[nearest] < 0:
            end = nearest
        else:
            settled[nearest] = length
            distance[nearest] = -np.inf
            done[num_done] = nearest
            num_done += 1
            i = row_of[nearest]
            origin = cost[i, nearest] - price[nearest] - length
    for k in range(num_done):
        price[done[k]] += settled[done[k]] - length
    while True:
        i = previous[end]
        row_of[end] = i
        after = column_of[i]
        column_of[i] = end
        if i == start:
            return True
        end = after


@piece
@no_type_check
def _is_cheapest_in_every_row(cost):
    """Whether no entry is less than that of its row on the diagonal."""
    for i in range(cost.shape[0]):
        least = cost[i, i]
        if not least < np.inf:
            return False
        for j in range(cost.shape[0]):
            if cost[i, j] < least:
                return False
    return True


@piece
@no_type_check
def _prefer_identity(cost, column_of, done):
    """On every cycle of the assignment on which the identity costs no more, up to rounding, take the identity.

    An assignment of least cost is one on each of its cycles, so if the identity is one as well, this gives it.
    """
    done[:] = 0
    for start in range(done.size):
        gain = size = 0.0
        length, i = 0, start
        while done[i] == 0:
            done[i] = 1
            gain += cost[i, i] - cost[i, column_of[i]]
            size += abs(cost[i, i]) + abs(cost[i, column_of[i]])
            length += 1
            i = column_of[i]
        if length < 2 or not size < np.inf or gain > 2.3e-16 * length * size:
            continue
        for _ in range(length):
            after = column_of[i]
            column_of[i] = i
            i = after


@no_type_check
def _assign(first, last, costs, orders, feasible):
    """The assignment of least cost of matrices first..last - 1, the identity where there is none of less.

    Shapes:
        costs: [batch, n, n], inf where a pair is forbidden.  orders: [batch, n], the column of every row.
        feasible: [batch], 0 where the forbidden pairs leave none.
    """
    n = costs.shape[1]
    price, distance, settled, lanes = np.empty(n), np.empty(n), np.empty(n), np.empty(16)
    row_of, free, previous, done = np.empty((4, n), np.int64)
    for item in range(first, last):
        cost, column_of = costs[item], orders[item]
        if _is_cheapest_in_every_row(cost):
            column_of[:] = np.arange(n)
            feasible[item] = True
            continue
        row_of[:] = -1
        column_of[:] = -1
        price[:] = 0
        num_free = _reduce_rows(cost, price, row_of, column_of, free)
        found = num_free >= 0
        for k in range(num_free):
            if found:
                found = _augment(cost, price, row_of, column_of, free[k], distance, settled, previous, done, lanes)
        feasible[item] = found
        if found:
            _prefer_identity(cost, column_of, done)


@cache
def compiled() -> Callable[..., None]:
    """The kernel."""
    return compile_kernel(_assign, void(int64, int64, float64[:, :, ::1], int64[:, ::1], int64[::1]))
