"""The CPU kernels of the relaxations of sorting: one pass over each row of the matrix, and its adjoint.

Nothing here is checked: shapes, types and finite scores are the caller's duty.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, no_type_check

import numpy as np
from numba import float64, from_dtype, int64, void

from permlab.ops.kernel import LOG2_E, compile_kernel, exp2, piece


@piece
@no_type_check
def _normalise(row, total):
    factor = row.dtype.type(1) / total
    for j in range(row.size):
        row[j] *= factor


@piece
@no_type_check
def _through_softmax(row, grad, result):
    """result = gradient of the softmax's logits."""
    dot = row.dtype.type(0)
    for j in range(row.size):
        dot += row[j] * grad[j]
    for j in range(row.size):
        result[j] = row[j] * (grad[j] - dot)


@no_type_check
def _soft_sort(first, last, scores, ordered, inverse_temperature, squared, matrix):
    """matrix[i] = softmax_j(-|ordered_i - scores_j|^(2 if squared else 1) * inverse_temperature).

    The largest logit of a row is 0, as the scores have each ordered value among them.
    """
    n = scores.shape[1]
    factor = scores.dtype.type(-inverse_temperature * LOG2_E)
    for item in range(first, last):
        for i in range(n):
            row, values, value = matrix[item, i], scores[item], ordered[item, i]
            total = scores.dtype.type(0)
            if squared:
                for j in range(n):
                    difference = value - values[j]
                    row[j] = exp2(difference * difference * factor)
            else:
                for j in range(n):
                    row[j] = exp2(abs(value - values[j]) * factor)
            for j in range(n):
                total += row[j]
            _normalise(row, total)


@no_type_check
def _soft_sort_back(first, last, scores, ordered, inverse_temperature, squared, matrix, grad, by_scores, by_ordered):
    n = scores.shape[1]
    real = scores.dtype.type
    factor = real(-inverse_temperature * (2 if squared else 1))
    logits = np.empty(n, scores.dtype)
    for item in range(first, last):
        values, sums = scores[item], by_scores[item]
        sums[:] = 0
        for i in range(n):
            value = ordered[item, i]
            _through_softmax(matrix[item, i], grad[item, i], logits)
            if squared:
                for j in range(n):
                    logits[j] *= (value - values[j]) * factor
            else:
                for j in range(n):
                    difference = value - values[j]
                    sign = real(1) if difference > 0 else (real(-1) if difference < 0 else real(0))
                    logits[j] *= sign * factor
            total = real(0)
            for j in range(n):
                total += logits[j]
                sums[j] -= logits[j]
            by_ordered[item, i] = total


@no_type_check
def _neural_sort(first, last, scores, order, inverse_temperature, matrix):
    """matrix[i] = softmax_j(((n - 1 - 2 i) scores_j - sum_k |scores_j - scores_k|) * inverse_temperature).

    The largest logit of row i is that of the i-th largest score. Logits are sums of n terms that nearly
    cancel, so they are taken in float64.
    """
    n = scores.shape[1]
    factor = inverse_temperature * LOG2_E
    values, distances = np.empty(n, np.float64), np.empty(n, np.float64)
    for item in range(first, last):
        for j in range(n):
            values[j] = scores[item, j]
        distances[:] = 0
        for k in range(n):
            value = values[k]
            for j in range(n):
                distances[j] += abs(values[j] - value)
        for i in range(n):
            row, slope, top = matrix[item, i], float(n - 1 - 2 * i), order[item, i]
            most = slope * values[top] - distances[top]
            for j in range(n):
                row[j] = (slope * values[j] - distances[j] - most) * factor
            total = scores.dtype.type(0)
            for j in range(n):
                row[j] = exp2(row[j])
            for j in range(n):
                total += row[j]
            _normalise(row, total)


@no_type_check
def _neural_sort_back(first, last, scores, inverse_temperature, matrix, grad, by_scores):
    n = scores.shape[1]
    real = scores.dtype.type
    factor = real(inverse_temperature)
    logits, by_distance = np.empty(n, scores.dtype), np.empty(n, scores.dtype)
    for item in range(first, last):
        values, sums = scores[item], by_scores[item]
        sums[:] = 0
        by_distance[:] = 0
        for i in range(n):
            slope = real(n - 1 - 2 * i)
            _through_softmax(matrix[item, i], grad[item, i], logits)
            for j in range(n):
                sums[j] += slope * logits[j]
                by_distance[j] -= logits[j]
        for k in range(n):
            value, share = values[k], by_distance[k]
            for j in range(n):
                difference = values[j] - value
                sign = real(1) if difference > 0 else (real(-1) if difference < 0 else real(0))
                sums[j] += sign * (by_distance[j] + share)
        for j in range(n):
            sums[j] *= factor


class Kernels(NamedTuple):
    """Compiled functions of this file, by their names without the underscore."""

    soft_sort: Callable[..., None]
    soft_sort_back: Callable[..., None]
    neural_sort: Callable[..., None]
    neural_sort_back: Callable[..., None]


@cache
def compiled(dtype: np.dtype) -> Kernels:
    """The kernels for float32 or float64."""
    real = from_dtype(dtype)
    single, double, number = real[:, ::1], real[:, :, ::1], float64
    soft = (int64, int64, single, single, number, int64, double)
    return Kernels(
        compile_kernel(_soft_sort, void(*soft)),
        compile_kernel(_soft_sort_back, void(*soft, double, single, single)),
        compile_kernel(_neural_sort, void(int64, int64, single, int64[:, ::1], number, double)),
        compile_kernel(_neural_sort_back, void(int64, int64, single, number, double, double, single)),
    )
