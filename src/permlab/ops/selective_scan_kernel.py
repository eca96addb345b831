"""The CPU kernel of the selective scan: a fused forward pass and its adjoint, compiled by numba.

Channels are the vector lanes. They are cut into groups of `LANES`; one sequence and one group make
one task, and a task walks along the sequence with its states in the first-level cache. Arrays are
token-major, `[b, l, g, LANES]` for g groups, so the lanes of a token are adjacent in memory.

How the work is cut depends on shapes only, and sums over sequences and groups are left to the
caller as one partial result per task: the result has the same bits for any number of threads.

Local arrays hold one quantity per plane, `[quantity, state, lane]`. The compiler then proves once
per token that planes do not overlap, and vectorises; with quantities interleaved it cannot.

Nothing here is checked: shapes, types and layout are the caller's duty.
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit, types
from numba.extending import overload

LANES = 64
LOG2_E = math.log2(math.e)


@no_type_check
def _compile(function):
    """Compile at the first call; keep the machine code on disk where a cache directory is writable."""
    # Reassociation lets sums over lanes be vectorised; NaN and infinity keep their meaning.
    options = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)


@no_type_check
def _power_of_two(real, integer, mantissa, degree):
    """Build x -> 2^x from arithmetic that vectorises, right to about one unit in the last place.

    x = n + r with |r| <= 1/2. Adding `magic` puts n into the low bits of the mantissa, from where
    a shift moves it into the exponent; 2^r is a Taylor polynomial of `degree`.
    """
    coefficients = np.array([math.log(2) ** k / math.factorial(k) for k in range(degree, -1, -1)], real)
    num_coefficients = degree + 1
    magic, shift = real(1.5 * 2**mantissa), integer(mantissa)
    smallest, largest = real(np.finfo(real).minexp), real(np.finfo(real).maxexp)
    zero, infinity = real(0), real(np.inf)

    def power(x):
        rounded = x + magic
        r = x - (rounded - magic)
        p = coefficients[0]
        for k in range(1, num_coefficients):
            p = p * r + coefficients[k]
        bits = integer(real(p).view(integer) + (real(rounded).view(integer) << shift))
        p = zero if x < smallest else bits.view(real)
        return infinity if x >= largest else p

    return power


_POWERS = {
    types.float32: _power_of_two(np.float32, np.int32, mantissa=23, degree=7),
    types.float64: _power_of_two(np.float64, np.int64, mantissa=52, degree=13),
}


def exp2(x):
    """2^x, in compiled code only."""
    raise NotImplementedError("exp2 can be called from compiled code only")


# Reassociation stays off here, since it would cancel `magic`.
@overload(exp2, jit_options={"fastmath": {"contract"}})
@no_type_check
def _exp2(x):
    return _POWERS[x]


@_compile
@no_type_check
def forward(first, last, u, delta, rate, B, C, D, y, checkpoints, stride):
    """Scan tasks first..last-1, writing `y` and every `stride`-th state.

    Shapes:
        u, delta, y: [b, l, g, LANES].  rate: A * log2(e), [s, g, LANES].  B, C: [b, l, s].
        D: [g, LANES].  checkpoints: [b, g, ceil(l / stride), s, LANES], or empty where none is wanted.
    """
    _, length, num_groups, _ = u.shape
    num_states = rate.shape[0]
    state = np.empty((2, num_states, LANES), u.dtype)  # rate, h
    row = np.empty((3, LANES), u.dtype)  # delta, delta * u, y
    for task in range(first, last):
        i, group = task // num_groups, task % num_groups
        for s in range(num_states):
            for k in range(LANES):
                state[0, s, k] = rate[s, group, k]
                state[1, s, k] = 0
        for t in range(length):
            if checkpoints.size > 0 and t % stride == 0:
                checkpoints[i, group, t // stride] = state[1]
            for k in range(LANES):
                row[0, k] = delta[i, t, group, k]
                row[1, k] = delta[i, t, group, k] * u[i, t, group, k]
                row[2, k] = D[group, k] * u[i, t, group, k]
            for s in range(num_states):
                b, c = B[i, t, s], C[i, t, s]
                for k in range(LANES):
                    h = exp2(row[0, k] * state[0, s, k]) * state[1, s, k] + row[1, k] * b
                    state[1, s, k] = h
                    row[2, k] += h * c
            for k in range(LANES):
                y[i, t, group, k] = row[2, k]


@_compile
@no_type_check
def _replay(task, start, size, u, delta, B, rate, row, states, decays):
    """Recompute one chunk: states[t + 1] = h_t and decays[t] = exp(delta_t A), from the checkpoint in states[0]."""
    i, group = task // u.shape[2], task % u.shape[2]
    for t in range(size):
        for k in range(LANES):
            row[0, k] = delta[i, start + t, group, k]
            row[1, k] = row[0, k] * u[i, start + t, group, k]
        for s in range(rate.shape[0]):
            b = B[i, start + t, s]
            for k in range(LANES):
                decay = exp2(row[0, k] * rate[s, k])
                decays[t, s, k] = decay
                states[t + 1, s, k] = decay * states[t, s, k] + row[1, k] * b


@_compile
@no_type_check
def backward(
    first,
    last,
    u,
    delta,
    rate,
    B,
    C,
    D,
    checkpoints,
    stride,
    grad_y,
    grad_u,
    grad_delta,
    grad_A,
    grad_B,
    grad_C,
    grad_D,
):
    """Adjoint of `forward` for tasks first..last-1, chunk by chunk from the end.

    Shapes:
        As for `forward`.  grad_A: [b, s, g, LANES] and grad_D: [b, g, LANES], one part per sequence.
        grad_B, grad_C: [b, g, l, s], one part per group.
    """
    _, length, num_groups, _ = u.shape
    num_states = rate.shape[0]
    ln_2 = u.dtype.type(math.log(2))
    local = np.empty((3, num_states, LANES), u.dtype)  # rate, gradient of h, gradient of A
    states = np.empty((stride + 1, num_states, LANES), u.dtype)
    decays = np.empty((stride, num_states, LANES), u.dtype)
    row = np.empty((6, LANES), u.dtype)  # delta, delta * u, gradients of y, of delta * A, of delta * u, of D
    for task in range(first, last):
        i, group = task // num_groups, task % num_groups
        local[1:] = 0
        row[5] = 0
        for s in range(num_states):
            for k in range(LANES):
                local[0, s, k] = rate[s, group, k]
        for chunk in range(checkpoints.shape[2] - 1, -1, -1):
            start = chunk * stride
            size = min(stride, length - start)
            states[0] = checkpoints[i, group, chunk]
            _replay(task, start, size, u, delta, B, local[0], row, states, decays)
            for t in range(size - 1, -1, -1):
                for k in range(LANES):
                    row[0, k] = delta[i, start + t, group, k]
                    row[1, k] = row[0, k] * u[i, start + t, group, k]
                    row[2, k] = grad_y[i, start + t, group, k]
                    row[3, k] = 0
                    row[4, k] = 0
                for s in range(num_states):
                    b, c = B[i, start + t, s], C[i, start + t, s]
                    sum_b = sum_c = u.dtype.type(0)
                    for k in range(LANES):
                        grad_h = local[1, s, k] + row[2, k] * c
                        sum_b += grad_h * row[1, k]
                        sum_c += row[2, k] * states[t + 1, s, k]
                        row[4, k] += grad_h * b
                        grad_h *= decays[t, s, k]
                        local[1, s, k] = grad_h
                        grad_h *= states[t, s, k]
                        local[2, s, k] += grad_h * row[0, k]
                        row[3, k] += grad_h * local[0, s, k]
                    grad_B[i, group, start + t, s] = sum_b
                    grad_C[i, group, start + t, s] = sum_c
                for k in range(LANES):
                    x = u[i, start + t, group, k]
                    grad_u[i, start + t, group, k] = row[0, k] * row[4, k] + D[group, k] * row[2, k]
                    grad_delta[i, start + t, group, k] = ln_2 * row[3, k] + x * row[4, k]
                    row[5, k] += x * row[2, k]
        for k in range(LANES):
            grad_D[i, group, k] = row[5, k]
        for s in range(num_states):
            for k in range(LANES):
                grad_A[i, s, group, k] = local[2, s, k]
