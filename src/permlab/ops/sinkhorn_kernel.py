"""The CPU kernel of Sinkhorn's normalisation: scaled sums in place of exponentials, and their adjoint.

A matrix K = 2^(scores + row potential + column potential) is held, and a sweep of row and
column sums of K times scalings costs one pass over it. When a scaling leaves [1 / FAR, FAR], that
sweep is done again exactly, by logarithms of sums of exponentials in float64, and K is computed anew
from its potentials, scalings one. So what is lost to underflow in K has a weight below 1e-11,
whatever the scores, and at temperatures that are not very low nearly all sweeps are the cheap ones.

Sweep k turns column scalings v[k - 1] into u[k] = 1 / (K v[k - 1]) and v[k] = 1 / (K^T u[k]). Its
adjoint needs both again, relative to the last ones, with the result in the place of K: no exponential is
computed on the way back either, but for sweeps whose scalings were far from the last.

Potentials are in bits: scores are multiplied by log2(e) / temperature, here called `scale`.

Nothing here is checked but whether scores are usable: shapes and types are the caller's duty.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import no_type_check

import numpy as np
from numba import float64, from_dtype, int64, void

from permlab.ops.kernel import compile_kernel, exp2, gather_team, meet, piece

FAR = 1e13
_LEAST = 1e-37  # smaller results are zero: denormal numbers are slow


@piece
@no_type_check
def _greatest(values, scratch):
    """Maximum of numbers without NaN, by halves, as a running maximum is not vectorised; scratch of the same length."""
    n = values.size
    greatest = values[n - 1]
    for j in range(n):
        scratch[j] = values[j]
    while n > 32:
        half = n // 2
        greatest = max(greatest, scratch[n - 1])
        for j in range(half):
            scratch[j] = scratch[j] if scratch[j] > scratch[half + j] else scratch[half + j]
        n = half
    for j in range(n):
        greatest = scratch[j] if scratch[j] > greatest else greatest
    return greatest


# Exact half-sweeps


@piece
@no_type_check
def _row_potentials(start, end, scores, scale, columns, rows):
    """rows[i] = -log2 sum_j 2^(scale scores[i, j] + columns[j]) for i in start..end - 1."""
    n = scores.shape[0]
    shifted = np.empty(n, np.float64)
    small, scratch = np.empty(n, scores.dtype), np.empty(n, np.float64)
    for i in range(start, end):
        for j in range(n):
            shifted[j] = scores[i, j] * scale + columns[j]
        most = _greatest(shifted, scratch)
        total = scores.dtype.type(0)
        for j in range(n):
            small[j] = shifted[j] - most
        for j in range(n):
            total += exp2(small[j])
        rows[i] = -(most + math.log2(total))


@piece
@no_type_check
def _column_potentials(start, end, scores, scale, rows, columns):
    """columns[j] = -log2 sum_i 2^(scale scores[i, j] + rows[i]) for j in start..end - 1."""
    n, width = scores.shape[0], end - start
    most = np.full(width, -np.inf)
    total = np.zeros(width, scores.dtype)
    small = np.empty(width, scores.dtype)
    for i in range(n):
        row = scores[i, start:end]
        for j in range(width):
            most[j] = max(most[j], row[j] * scale + rows[i])
    for i in range(n):
        row = scores[i, start:end]
        for j in range(width):
            small[j] = row[j] * scale + rows[i] - most[j]
        for j in range(width):
            total[j] += exp2(small[j])
    for j in range(width):
        columns[start + j] = -(most[j] + math.log2(total[j]))


@piece
@no_type_check
def _absorb(start, end, scores, scale, rows, columns, matrix):
    """matrix = 2^(scale scores + rows + columns) in rows start..end - 1."""
    n = scores.shape[0]
    small = np.empty(n, scores.dtype)
    for i in range(start, end):
        for j in range(n):
            small[j] = scores[i, j] * scale + rows[i] + columns[j]
        for j in range(n):
            matrix[i, j] = exp2(small[j])


# Forward


@piece
@no_type_check
def _start(start, end, scores, scale, rows, matrix, most):
    """Row maxima as potentials, their matrix, and column maxima; False if a row has NaN or no finite maximum."""
    n = scores.shape[0]
    real = scores.dtype.type
    most[:] = -np.inf
    factor, scratch = real(scale), np.empty(n, scores.dtype)
    finite = True
    for i in range(start, end):
        row = scores[i]
        greatest = _greatest(row, scratch)
        finite &= abs(greatest) < np.inf
        rows[i] = -greatest * scale
        for j in range(n):
            finite &= row[j] == row[j]
        for j in range(n):
            most[j] = row[j] if row[j] > most[j] else most[j]
        for j in range(n):
            matrix[i, j] = exp2((row[j] - greatest) * factor)
    return finite


@piece
@no_type_check
def _sweep(start, end, matrix, v, u, total):
    """u = 1 / (matrix v) and total = matrix^T u over some rows, in one pass; False where u is far from one.

    Four rows are taken together, which hides the time that a sum takes to arrive.
    """
    n = matrix.shape[0]
    real = matrix.dtype.type
    far, near = real(FAR), real(1 / FAR)
    total[:] = 0
    close = True
    whole = end - (end - start) % 4
    for i in range(start, whole, 4):
        a, b, c, d = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        p, q, r, s = real(0), real(0), real(0), real(0)
        for j in range(n):
            value = v[j]
            p += a[j] * value
            q += b[j] * value
            r += c[j] * value
            s += d[j] * value
        close &= near < p < far
        close &= near < q < far
        close &= near < r < far
        close &= near < s < far
        p, q, r, s = real(1) / p, real(1) / q, real(1) / r, real(1) / s
        u[i], u[i + 1], u[i + 2], u[i + 3] = p, q, r, s
        for j in range(n):
            total[j] += p * a[j] + q * b[j] + r * c[j] + s * d[j]
    for i in range(whole, end):
        row = matrix[i]
        p = real(0)
        for j in range(n):
            p += row[j] * v[j]
        close &= near < p < far
        p = real(1) / p
        u[i] = p
        for j in range(n):
            total[j] += p * row[j]
    return close


@piece
@no_type_check
def _add_up(parts, total):
    """total = sum of the threads' parts."""
    total[:] = parts[0]
    for thread in range(1, parts.shape[0]):
        for j in range(total.size):
            total[j] += parts[thread, j]


@piece
@no_type_check
def _bounds(part, num_parts, n):
    return n * part // num_parts, n * (part + 1) // num_parts


@no_type_check
def _forward(
    first, last, thread, team, counter, shared, scores, scale, matrices, u, v, epochs, row_potentials,
    column_potentials, usable
):  # fmt: skip
    """Matrices first..last - 1, by all threads of a team together.

    Rows are in as many parts as `shared` has, which the threads take in turn: results are the same for any team.

    Shapes:
        shared: [2, part, n], what the threads tell each other.
        scores, matrices: [batch, n, n].  u, v: [batch, sweep, n], scalings after every sweep.
        epochs: [batch, sweep], the line of the potentials [batch, 1 + sweep, n] that they are relative to;
        lines that no sweep refers to are not written.  usable: [batch], 0 where scores have no finite maximum.
    """
    if not gather_team(counter, team):
        return
    n, num_sweeps, num_parts = scores.shape[1], u.shape[1], shared.shape[1]
    real = scores.dtype.type
    far, near = real(FAR), real(1 / FAR)
    total, scaling, latest = np.empty(n, scores.dtype), np.empty(n, scores.dtype), np.empty(n, np.float64)
    turn = 0
    for item in range(first, last):
        matrix, rows, columns = matrices[item], row_potentials[item], column_potentials[item]
        for part in range(thread, num_parts, team):
            start, end = _bounds(part, num_parts, n)
            if not _start(start, end, scores[item], scale, rows[0], matrix, shared[turn, part]):
                shared[turn, part, 0] = np.inf
            columns[0, start:end] = 0
        meet(counter, team)
        finite = True
        for j in range(n):
            most = shared[turn, 0, j]
            for part in range(1, num_parts):
                most = max(most, shared[turn, part, j])
            finite &= abs(most) < np.inf
        turn = 1 - turn
        usable[item] = finite
        if not finite:
            continue
        epoch = 0
        scaling[:] = 1
        for k in range(num_sweeps):
            for part in range(thread, num_parts, team):
                start, end = _bounds(part, num_parts, n)
                if not _sweep(start, end, matrix, scaling, u[item, k], shared[turn, part]):
                    shared[turn, part, 0] = np.nan
            meet(counter, team)
            _add_up(shared[turn], total)
            turn = 1 - turn
            close = True
            for j in range(n):
                close &= near < total[j] < far
            if close:
                for j in range(n):
                    scaling[j] = real(1) / total[j]
            else:
                for j in range(n):
                    latest[j] = columns[epoch, j] + math.log2(scaling[j])
                epoch = k + 1
                for part in range(thread, num_parts, team):
                    start, end = _bounds(part, num_parts, n)
                    _row_potentials(start, end, scores[item], scale, latest, rows[epoch])
                meet(counter, team)
                for part in range(thread, num_parts, team):
                    start, end = _bounds(part, num_parts, n)
                    _column_potentials(start, end, scores[item], scale, rows[epoch], columns[epoch])
                meet(counter, team)
                for part in range(thread, num_parts, team):
                    start, end = _bounds(part, num_parts, n)
                    _absorb(start, end, scores[item], scale, rows[epoch], columns[epoch], matrix)
                    u[item, k, start:end] = 1
                scaling[:] = 1
            if thread == 0:
                v[item, k] = scaling
                epochs[item, k] = epoch
        least, by_row = real(_LEAST), u[item, num_sweeps - 1]
        for part in range(thread, num_parts, team):
            start, end = _bounds(part, num_parts, n)
            for i in range(start, end):
                row, weight = matrix[i], by_row[i]
                for j in range(n):
                    value = row[j] * weight * scaling[j]
                    row[j] = real(0) if value < least else value


# Backward


@piece
@no_type_check
def _relative(scalings, last, same, potentials, last_potentials, result):
    """result = scalings / last * 2^(potentials - last_potentials), and whether all of it is near one.

    Args:
        same: whether the potentials are.
    """
    real = result.dtype.type
    far, near = real(FAR), real(1 / FAR)
    close = True
    if same:
        for j in range(result.size):
            result[j] = scalings[j] / last[j]
            close &= near < result[j] < far
        return close
    for j in range(result.size):
        difference = potentials[j] - last_potentials[j]
        value = scalings[j] / last[j] * real(2.0 ** min(max(difference, -100.0), 100.0))
        result[j] = value
        close &= near < value < far
    return close


@piece
@no_type_check
def _sweep_back(start, end, matrix, push, u, carried, x, total):
    """The adjoint of one sweep over some rows, in one pass.

    x = u (carried - u (matrix push)), and total = matrix^T x.
    """
    n = matrix.shape[0]
    real = matrix.dtype.type
    total[:] = 0
    whole = end - (end - start) % 4
    for i in range(start, whole, 4):
        a, b, c, d = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        p, q, r, s = real(0), real(0), real(0), real(0)
        for j in range(n):
            p += a[j] * push[j]
            q += b[j] * push[j]
            r += c[j] * push[j]
            s += d[j] * push[j]
        p, q = u[i] * (carried[i] - u[i] * p), u[i + 1] * (carried[i + 1] - u[i + 1] * q)
        r, s = u[i + 2] * (carried[i + 2] - u[i + 2] * r), u[i + 3] * (carried[i + 3] - u[i + 3] * s)
        x[i], x[i + 1], x[i + 2], x[i + 3] = p, q, r, s
        for j in range(n):
            total[j] += p * a[j] + q * b[j] + r * c[j] + s * d[j]
    for i in range(whole, end):
        row = matrix[i]
        p = real(0)
        for j in range(n):
            p += row[j] * push[j]
        p = u[i] * (carried[i] - u[i] * p)
        x[i] = p
        for j in range(n):
            total[j] += p * row[j]


@piece
@no_type_check
def _sweep_back_exactly(start, end, scores, scale, rows, columns, before, grad_columns, carried, grad, total):
    """The same by exponentials: subtracts the sweep's share from `grad`; total = adjoint of `before`, negated."""
    n = scores.shape[0]
    small, weight = np.empty(n, scores.dtype), np.empty(n, scores.dtype)
    total[:] = 0
    for i in range(start, end):
        for j in range(n):
            small[j] = scores[i, j] * scale + rows[i] + columns[j]
        dot = scores.dtype.type(0)
        for j in range(n):
            weight[j] = exp2(small[j]) * grad_columns[j]
            dot += weight[j]
        by_row = carried[i] - dot
        for j in range(n):
            small[j] = scores[i, j] * scale + rows[i] + before[j]
        for j in range(n):
            value = exp2(small[j]) * by_row
            total[j] += value
            grad[i, j] -= value + weight[j]


@piece
@no_type_check
def _take_off(start, end, matrix, left, right, factor, sums, grad):
    """grad = factor (grad - matrix * left right) in some rows, four of them together.

    Shapes:
        left: [n, term], terms by twos.  right: [term, n].  sums: [4, n], scratch.
    """
    n, num_terms = matrix.shape[0], left.shape[1]
    for first in range(start, end, 4):
        rows = min(4, end - first)
        sums[:] = 0
        if rows == 4:
            a, b, c, d = sums[0], sums[1], sums[2], sums[3]
            for term in range(0, num_terms, 2):
                x, y = right[term], right[term + 1]
                p, q, r, s = left[first, term], left[first + 1, term], left[first + 2, term], left[first + 3, term]
                t, u = left[first, term + 1], left[first + 1, term + 1]
                v, w = left[first + 2, term + 1], left[first + 3, term + 1]
                for j in range(n):
                    a[j] += p * x[j] + t * y[j]
                    b[j] += q * x[j] + u * y[j]
                    c[j] += r * x[j] + v * y[j]
                    d[j] += s * x[j] + w * y[j]
        else:
            for row in range(rows):
                for term in range(num_terms):
                    weight = left[first + row, term]
                    for j in range(n):
                        sums[row, j] += weight * right[term, j]
        for row in range(rows):
            for j in range(n):
                grad[first + row, j] = (grad[first + row, j] - matrix[first + row, j] * sums[row, j]) * factor


@no_type_check
def _backward(
    first, last, thread, team, counter, shared, scores, scale, matrices, u, v, epochs, row_potentials,
    column_potentials, grad_matrices, grads
):  # fmt: skip
    """Gradients of `scores` times temperature, from the results and what the forward pass left; shapes as there."""
    if not gather_team(counter, team):
        return
    n, num_sweeps, num_parts = scores.shape[1], u.shape[1], shared.shape[1]
    real = scores.dtype.type
    factor = real(scale * math.log(2.0))
    turn = 0
    # Terms of rank one that are to be taken off the gradient, times the matrix.
    left, right = np.empty((n, 2 * num_sweeps), scores.dtype), np.empty((2 * num_sweeps, n), scores.dtype)
    by_row, by_column, earlier = np.empty(n, scores.dtype), np.empty(n, scores.dtype), np.empty(n, scores.dtype)
    carried, grad_columns, total = np.empty(n, scores.dtype), np.empty(n, scores.dtype), np.empty(n, scores.dtype)
    ones, x, sums = np.ones(n, scores.dtype), np.empty(n, scores.dtype), np.empty((4, n), scores.dtype)
    rows_now, columns_now, columns_before = np.empty(n), np.empty(n), np.empty(n)
    for item in range(first, last):
        matrix, rows, columns = matrices[item], row_potentials[item], column_potentials[item]
        grad, grad_matrix = grads[item], grad_matrices[item]
        final, last_u, last_v = epochs[item, num_sweeps - 1], u[item, num_sweeps - 1], v[item, num_sweeps - 1]
        for part in range(thread, num_parts, team):
            start, end = _bounds(part, num_parts, n)
            partial = shared[turn, part]
            partial[:] = 0
            for i in range(start, end):
                dot = real(0)
                for j in range(n):
                    value = matrix[i, j] * grad_matrix[i, j]
                    grad[i, j] = value
                    dot += value
                    partial[j] += value
                carried[i] = dot
        meet(counter, team)
        _add_up(shared[turn], grad_columns)
        turn = 1 - turn
        count = 0
        for k in range(num_sweeps - 1, -1, -1):
            epoch = epochs[item, k]
            previous = epochs[item, k - 1] if k > 0 else 0
            v_before = v[item, k - 1] if k > 0 else ones
            close = _relative(u[item, k], last_u, epoch == final, rows[epoch], rows[final], by_row)
            close &= _relative(v[item, k], last_v, epoch == final, columns[epoch], columns[final], by_column)
            close &= _relative(v_before, last_v, previous == final, columns[previous], columns[final], earlier)
            if close:
                for j in range(n):
                    right[count, j] = by_column[j] * grad_columns[j]
                for part in range(thread, num_parts, team):
                    start, end = _bounds(part, num_parts, n)
                    _sweep_back(start, end, matrix, right[count], by_row, carried, x, shared[turn, part])
                    for i in range(start, end):
                        left[i, count] = by_row[i]
                        left[i, count + 1] = x[i]
                right[count + 1] = earlier
                meet(counter, team)
                _add_up(shared[turn], total)
                for j in range(n):
                    grad_columns[j] = -earlier[j] * total[j]
                count += 2
            else:
                for j in range(n):
                    rows_now[j] = rows[epoch, j] + math.log2(u[item, k, j])
                    columns_now[j] = columns[epoch, j] + math.log2(v[item, k, j])
                    columns_before[j] = columns[previous, j] + math.log2(v_before[j])
                for part in range(thread, num_parts, team):
                    start, end = _bounds(part, num_parts, n)
                    _sweep_back_exactly(
                        start, end, scores[item], scale, rows_now, columns_now, columns_before, grad_columns,
                        carried, grad, shared[turn, part]
                    )  # fmt: skip
                meet(counter, team)
                _add_up(shared[turn], total)
                for j in range(n):
                    grad_columns[j] = -total[j]
            turn = 1 - turn
            carried[:] = 0
        for part in range(thread, num_parts, team):
            start, end = _bounds(part, num_parts, n)
            _take_off(start, end, matrix, left[:, :count], right, factor, sums, grad)


@cache
def compiled(dtype: np.dtype) -> tuple[Callable[..., None], Callable[..., None]]:
    """The forward and the backward kernel for float32 or float64."""
    real = from_dtype(dtype)
    single, double = real[:, :, ::1], float64[:, :, ::1]
    kept = (single, single, int64[:, ::1], double, double)
    team = (int64, int64, int64, int64, int64, single)
    forward = void(*team, single, float64, single, *kept, int64[::1])
    backward = void(*team, single, float64, single, *kept, single, single)
    return compile_kernel(_forward, forward), compile_kernel(_backward, backward)
