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

from permlab.ops.kernel import compile_kernel, exp2, piece

FAR = 1e13
_LEAST = 1e-37  # smaller results are zero: denormal numbers are slow


@piece
@no_type_check
def _greatest(values, lanes):
    """Maximum; `lanes` is scratch of 16, for a running maximum of all values would not be vectorised."""
    n = values.size
    if n < 16:
        return values.max()
    lanes[:] = values[:16]
    for start in range(16, n - 15, 16):
        for lane in range(16):
            lanes[lane] = max(lanes[lane], values[start + lane])
    for lane in range(16):
        lanes[lane] = max(lanes[lane], values[n - 16 + lane])
    return lanes.max()


# Exact half-sweeps


@piece
@no_type_check
def _row_potentials(scores, scale, columns, rows):
    """rows[i] = -log2 sum_j 2^(scale scores[i, j] + columns[j])."""
    n = scores.shape[0]
    shifted = np.empty(n, np.float64)
    small, lanes = np.empty(n, scores.dtype), np.empty(16, np.float64)
    for i in range(n):
        for j in range(n):
            shifted[j] = scores[i, j] * scale + columns[j]
        most = _greatest(shifted, lanes)
        total = scores.dtype.type(0)
        for j in range(n):
            small[j] = shifted[j] - most
        for j in range(n):
            total += exp2(small[j])
        rows[i] = -(most + math.log2(total))


@piece
@no_type_check
def _column_potentials(scores, scale, rows, columns):
    """columns[j] = -log2 sum_i 2^(scale scores[i, j] + rows[i])."""
    n = scores.shape[0]
    most = np.full(n, -np.inf)
    total = np.zeros(n, scores.dtype)
    small = np.empty(n, scores.dtype)
    for i in range(n):
        for j in range(n):
            most[j] = max(most[j], scores[i, j] * scale + rows[i])
    for i in range(n):
        for j in range(n):
            small[j] = scores[i, j] * scale + rows[i] - most[j]
        for j in range(n):
            total[j] += exp2(small[j])
    for j in range(n):
        columns[j] = -(most[j] + math.log2(total[j]))


@piece
@no_type_check
def _absorb(scores, scale, rows, columns, matrix):
    """matrix = 2^(scale scores + rows + columns)."""
    n = scores.shape[0]
    small = np.empty(n, scores.dtype)
    for i in range(n):
        for j in range(n):
            small[j] = scores[i, j] * scale + rows[i] + columns[j]
        for j in range(n):
            matrix[i, j] = exp2(small[j])


# Forward


@piece
@no_type_check
def _start(scores, scale, rows, matrix):
    """Row maxima as potentials, and their matrix; False if a row or column has no finite maximum."""
    n = scores.shape[0]
    real = scores.dtype.type
    most = np.full(n, -np.inf, scores.dtype)
    factor, lanes = real(scale), np.empty(16, scores.dtype)
    for i in range(n):
        greatest = _greatest(scores[i], lanes)
        if not abs(greatest) < np.inf:
            return False
        rows[i] = -greatest * scale
        for j in range(n):
            most[j] = max(most[j], scores[i, j])
        for j in range(n):
            matrix[i, j] = exp2((scores[i, j] - greatest) * factor)
    finite = True
    for j in range(n):
        finite &= abs(most[j]) < np.inf
    return finite


@piece
@no_type_check
def _sweep(matrix, v, u, total):
    """u = 1 / (matrix v) and total = matrix^T u, in one pass; False where a scaling is far from one."""
    n = matrix.shape[0]
    real = matrix.dtype.type
    far, near = real(FAR), real(1 / FAR)
    total[:] = 0
    for i in range(n):
        row = matrix[i]
        dot = real(0)
        for j in range(n):
            dot += row[j] * v[j]
        if not near < dot < far:
            return False
        scaling = real(1) / dot
        u[i] = scaling
        for j in range(n):
            total[j] += scaling * row[j]
    close = True
    for j in range(n):
        close &= near < total[j] < far
    return close


@no_type_check
def _forward(first, last, scores, scale, matrices, u, v, epochs, row_potentials, column_potentials, usable):
    """Matrices first..last - 1.

    Shapes:
        scores, matrices: [batch, n, n].  u, v: [batch, sweep, n], scalings after every sweep.
        epochs: [batch, sweep], the line of the potentials [batch, 1 + sweep, n] that they are relative to;
        lines that no sweep refers to are not written.  usable: [batch], 0 where scores have no finite maximum.
    """
    n, num_sweeps = scores.shape[1], u.shape[1]
    real = scores.dtype.type
    total, ones = np.empty(n, scores.dtype), np.ones(n, scores.dtype)
    latest = np.empty(n, np.float64)
    for item in range(first, last):
        matrix, rows, columns = matrices[item], row_potentials[item], column_potentials[item]
        usable[item] = _start(scores[item], scale, rows[0], matrix)
        if not usable[item]:
            continue
        columns[0, :] = 0
        epoch, scaling = 0, ones
        for k in range(num_sweeps):
            if _sweep(matrix, scaling, u[item, k], total):
                for j in range(n):
                    v[item, k, j] = real(1) / total[j]
            else:
                for j in range(n):
                    latest[j] = columns[epoch, j] + math.log2(scaling[j])
                epoch = k + 1
                _row_potentials(scores[item], scale, latest, rows[epoch])
                _column_potentials(scores[item], scale, rows[epoch], columns[epoch])
                _absorb(scores[item], scale, rows[epoch], columns[epoch], matrix)
                u[item, k, :] = 1
                v[item, k, :] = 1
            epochs[item, k] = epoch
            scaling = v[item, k]
        least, by_row = real(_LEAST), u[item, num_sweeps - 1]
        for i in range(n):
            for j in range(n):
                value = matrix[i, j] * by_row[i] * scaling[j]
                matrix[i, j] = value if value >= least else (value if value != value else real(0))


# Backward


@piece
@no_type_check
def _relative(scalings, last, potentials, last_potentials, result):
    """result = scalings / last * 2^(potentials - last_potentials), and whether all of it is near one."""
    real = result.dtype.type
    far, near = real(FAR), real(1 / FAR)
    close = True
    for j in range(result.size):
        difference = potentials[j] - last_potentials[j]
        value = scalings[j] / last[j]
        if difference != 0:
            value *= real(2.0 ** min(max(difference, -100.0), 100.0))
        result[j] = value
        close &= near < value < far
    return close


@piece
@no_type_check
def _sweep_back(matrix, push, u, before, carried, x, total):
    """The adjoint of one sweep in one pass.

    x = u (carried - u (matrix push)), and total = matrix^T x, to which `before` is applied by the caller.
    Four rows are taken together, which hides the time that a sum takes to arrive.
    """
    n = matrix.shape[0]
    real = matrix.dtype.type
    total[:] = 0
    whole = n - n % 4
    for i in range(0, whole, 4):
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
    for i in range(whole, n):
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
def _sweep_back_exactly(scores, scale, rows, columns, before, grad_columns, carried, grad, total):
    """The same by exponentials: subtracts the sweep's share from `grad`; total = adjoint of `before`, negated."""
    n = scores.shape[0]
    small, weight = np.empty(n, scores.dtype), np.empty(n, scores.dtype)
    total[:] = 0
    for i in range(n):
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


@no_type_check
def _backward(
    first, last, scores, scale, matrices, u, v, epochs, row_potentials, column_potentials, grad_matrices, grads
):
    """Gradients of `scores` times temperature, from the results and what the forward pass left; shapes as there."""
    n, num_sweeps = scores.shape[1], u.shape[1]
    real = scores.dtype.type
    factor = real(scale * math.log(2.0))
    # Terms of rank one that are to be taken off the gradient, times the matrix.
    left, right = np.empty((2 * num_sweeps, n), scores.dtype), np.empty((2 * num_sweeps, n), scores.dtype)
    by_row, by_column, earlier = np.empty(n, scores.dtype), np.empty(n, scores.dtype), np.empty(n, scores.dtype)
    carried, grad_columns, total = np.empty(n, scores.dtype), np.empty(n, scores.dtype), np.empty(n, scores.dtype)
    ones, sums = np.ones(n, scores.dtype), np.empty(n, scores.dtype)
    rows_now, columns_now, columns_before = np.empty(n), np.empty(n), np.empty(n)
    for item in range(first, last):
        matrix, rows, columns = matrices[item], row_potentials[item], column_potentials[item]
        final = epochs[item, num_sweeps - 1]
        grad, grad_matrix = grads[item], grad_matrices[item]
        grad_columns[:] = 0
        for i in range(n):
            dot = real(0)
            for j in range(n):
                value = matrix[i, j] * grad_matrix[i, j]
                grad[i, j] = value
                dot += value
                grad_columns[j] += value
            carried[i] = dot
        count = 0
        for k in range(num_sweeps - 1, -1, -1):
            epoch = epochs[item, k]
            previous = epochs[item, k - 1] if k > 0 else 0
            v_before = v[item, k - 1] if k > 0 else ones
            close = _relative(u[item, k], u[item, num_sweeps - 1], rows[epoch], rows[final], by_row)
            close &= _relative(v[item, k], v[item, num_sweeps - 1], columns[epoch], columns[final], by_column)
            close &= _relative(v_before, v[item, num_sweeps - 1], columns[previous], columns[final], earlier)
            if close:
                for j in range(n):
                    right[count, j] = by_column[j] * grad_columns[j]
                _sweep_back(matrix, right[count], by_row, earlier, carried, left[count + 1], total)
                for j in range(n):
                    left[count, j] = by_row[j]
                    right[count + 1, j] = earlier[j]
                    grad_columns[j] = -earlier[j] * total[j]
                count += 2
            else:
                for j in range(n):
                    rows_now[j] = rows[epoch, j] + math.log2(u[item, k, j])
                    columns_now[j] = columns[epoch, j] + math.log2(v[item, k, j])
                    columns_before[j] = columns[previous, j] + math.log2(v_before[j])
                _sweep_back_exactly(
                    scores[item], scale, rows_now, columns_now, columns_before, grad_columns, carried, grad, total
                )
                for j in range(n):
                    grad_columns[j] = -total[j]
            carried[:] = 0
        for i in range(n):
            sums[:] = 0
            for term in range(0, count, 2):
                first_weight, second_weight = left[term, i], left[term + 1, i]
                for j in range(n):
                    sums[j] += first_weight * right[term, j] + second_weight * right[term + 1, j]
            for j in range(n):
                grad[i, j] = (grad[i, j] - matrix[i, j] * sums[j]) * factor


@cache
def compiled(dtype: np.dtype) -> tuple[Callable[..., None], Callable[..., None]]:
    """The forward and the backward kernel for float32 or float64."""
    real = from_dtype(dtype)
    single, double = real[:, :, ::1], float64[:, :, ::1]
    kept = (single, single, int64[:, ::1], double, double)
    forward = void(int64, int64, single, float64, single, *kept, int64[::1])
    backward = void(int64, int64, single, float64, single, *kept, single, single)
    return compile_kernel(_forward, forward), compile_kernel(_backward, backward)
