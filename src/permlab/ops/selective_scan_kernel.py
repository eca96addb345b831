"""The CPU kernel of the selective scan: a fused forward pass and its adjoint, compiled by numba.

Channels are the vector lanes. Those that share B and C are cut into blocks of as many as there are
lanes; one sequence and one block make one task, which walks along the sequence with its states in the
first-level cache, chunk by chunk. A chunk's tokens are copied to local tiles `[token, lane]`, so tensors
may have any strides, and lanes after a group's last channel are zero.

How the work is cut depends on shapes only, and sums over sequences and blocks are left to the
caller as one partial result per task: the result has the same bits for any number of threads.

B and C are either one number for all lanes of a token, or one for each lane at every token. Which of the
two is known from their types when the kernel is compiled, so neither pays for the other.

Local arrays hold one quantity each, `[state, lane]` or `[token, lane]`: whether two of them overlap
is then settled once per token, outside the loop over lanes, which vectorises.

Nothing here is checked: shapes and types are the caller's duty.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import no_type_check

import numpy as np
from numba import boolean, from_dtype, int64, types, void
from numba.extending import overload

from permlab.ops.kernel import LOG2_E, compile_kernel, exp2, piece

# Elementary functions: the ones of the C library do not vectorise.


def sigmoid(x):
    """1 / (1 + e^-x), in compiled code only."""
    raise NotImplementedError("sigmoid can be called from compiled code only")


def softplus(x):
    """log(1 + e^x), in compiled code only."""
    raise NotImplementedError("softplus can be called from compiled code only")


@no_type_check
def _make_sigmoid(real):
    one, slope = real(1), real(-LOG2_E)

    def compiled(x):
        return one / (one + exp2(x * slope))

    return compiled


@no_type_check
def _make_softplus(real, num_terms):
    """max(x, 0) + log(1 + w) with w = e^-|x|, the logarithm as 2 artanh(w / (2 + w)); w / (2 + w) <= 1/3."""
    coefficients = np.array([1 / (2 * k + 1) for k in range(num_terms - 1, -1, -1)], real)
    zero, two, slope = real(0), real(2), real(LOG2_E)

    def compiled(x):
        w = exp2((x if x < zero else -x) * slope)
        r = w / (two + w)
        square = r * r
        p = coefficients[0]
        for k in range(1, num_terms):
            p = p * square + coefficients[k]
        return (zero if x < zero else x) + two * r * p

    return compiled


_SIGMOID = {types.float32: _make_sigmoid(np.float32), types.float64: _make_sigmoid(np.float64)}
_SOFTPLUS = {types.float32: _make_softplus(np.float32, 8), types.float64: _make_softplus(np.float64, 17)}


# No reassociation in these: it would cancel the rounding of exp2.
@overload(sigmoid, jit_options={"fastmath": {"contract"}})
@no_type_check
def _sigmoid(x):
    return _SIGMOID[x]


@overload(softplus, jit_options={"fastmath": {"contract"}})
@no_type_check
def _softplus(x):
    return _SOFTPLUS[x]


# Coefficients of the states: `[b, g, s, l]` of every token, or `[d, s]` of every channel


def part_of(coefficients, i, group, channel, end, lanes):
    """What one task reads: `[s, l]`, or a tile `[1, s, lanes]` of its channels; in compiled code only."""
    raise NotImplementedError("part_of can be called from compiled code only")


def coefficient(part, s, t):
    """A state's coefficient at a token: a number, or a row `[lanes]`; in compiled code only."""
    raise NotImplementedError("coefficient can be called from compiled code only")


def pick(value, k):
    """A lane's coefficient; in compiled code only."""
    raise NotImplementedError("pick can be called from compiled code only")


def open_sum(part, s, value):
    """An empty sum of gradients: zero for one token, or the row that all tokens add to; in compiled code only."""
    raise NotImplementedError("open_sum can be called from compiled code only")


def add(total, k, value):
    """The sum with what a lane adds to it; in compiled code only."""
    raise NotImplementedError("add can be called from compiled code only")


def close_sum(part, s, t, total):
    """Write a token's sum where it belongs; in compiled code only."""
    raise NotImplementedError("close_sum can be called from compiled code only")


@overload(part_of)
@no_type_check
def _part_of(coefficients, i, group, channel, end, lanes):
    if coefficients.ndim == 4:
        return lambda coefficients, i, group, channel, end, lanes: coefficients[i, group]

    def tile(coefficients, i, group, channel, end, lanes):
        part = np.zeros((1, coefficients.shape[1], lanes), coefficients.dtype)
        for k in range(min(lanes, end - channel)):
            for s in range(coefficients.shape[1]):
                part[0, s, k] = coefficients[channel + k, s]
        return part

    return tile


@overload(coefficient, inline="always")
@no_type_check
def _coefficient(part, s, t):
    return (lambda part, s, t: part[s, t]) if part.ndim == 2 else (lambda part, s, t: part[0, s])


@overload(pick, inline="always")
@no_type_check
def _pick(value, k):
    return (lambda value, k: value[k]) if isinstance(value, types.Array) else (lambda value, k: value)


@overload(open_sum, inline="always")
@no_type_check
def _open_sum(part, s, value):
    # From a zero that the compiler knows, 32 lanes are summed a third slower.
    return (lambda part, s, value: value * 0) if part.ndim == 2 else (lambda part, s, value: part[0, s])


@overload(add, inline="always")
@no_type_check
def _add(total, k, value):
    def to_row(total, k, value):
        total[k] += value
        return total

    return to_row if isinstance(total, types.Array) else (lambda total, k, value: total + value)


@overload(close_sum, inline="always")
@no_type_check
def _close_sum(part, s, t, total):
    def write(part, s, t, total):
        part[s, t] = total

    return write if part.ndim == 2 else (lambda part, s, t, total: None)


# Tiles


@piece
@no_type_check
def _load(tile, array, i, channel, end, start, size):
    """tile[t, k] = array[i, channel + k, start + t], zero from `end` on; the inner loop runs along the denser axis."""
    lanes = tile.shape[1]
    width = min(lanes, end - channel)
    if array.strides[2] < array.strides[1]:
        for k in range(width):
            for t in range(size):
                tile[t, k] = array[i, channel + k, start + t]
    else:
        for t in range(size):
            for k in range(width):
                tile[t, k] = array[i, channel + k, start + t]
    for t in range(size):
        for k in range(width, lanes):
            tile[t, k] = 0


@piece
@no_type_check
def _store(array, tile, i, channel, end, start, size):
    """array[i, channel + k, start + t] = tile[t, k]."""
    lanes = tile.shape[1]
    width = min(lanes, end - channel)
    if array.strides[2] < array.strides[1]:
        for k in range(width):
            for t in range(size):
                array[i, channel + k, start + t] = tile[t, k]
    else:
        for t in range(size):
            for k in range(width):
                array[i, channel + k, start + t] = tile[t, k]


@piece
@no_type_check
def _copy(target, source):
    for s in range(source.shape[0]):
        for k in range(source.shape[1]):
            target[s, k] = source[s, k]


@piece
@no_type_check
def _load_rate(rate, A, channel, end):
    """rate[s, k] = A[channel + k, s] log2(e), so that decays are powers of two."""
    scale = rate.dtype.type(LOG2_E)
    rate[:] = 0
    for k in range(min(rate.shape[1], end - channel)):
        for s in range(A.shape[1]):
            rate[s, k] = A[channel + k, s] * scale


@piece
@no_type_check
def _load_row(row, vector, channel, end):
    row[:] = 0
    for k in range(min(row.shape[0], end - channel)):
        row[k] = vector[channel + k]


@piece
@no_type_check
def _load_state(state, array, i, channel, end):
    """state[s, k] = array[i, channel + k, s]; zero where there is no array."""
    state[:] = 0
    if array.size > 0:
        for k in range(min(state.shape[1], end - channel)):
            for s in range(state.shape[0]):
                state[s, k] = array[i, channel + k, s]


@piece
@no_type_check
def _store_state(array, state, i, channel, end):
    if array.size > 0:
        for k in range(min(state.shape[1], end - channel)):
            for s in range(state.shape[0]):
                array[i, channel + k, s] = state[s, k]


@piece
@no_type_check
def _place(task, num_blocks, num_groups, num_channels, lanes):
    """Sequence, block and group of a task, its first channel and the end of its group."""
    i, block = task // num_blocks, task % num_blocks
    blocks_per_group, channels_per_group = num_blocks // num_groups, num_channels // num_groups
    group = block // blocks_per_group
    channel = group * channels_per_group + block % blocks_per_group * lanes
    return i, block, group, channel, (group + 1) * channels_per_group


# Pieces of the forward pass


@piece
@no_type_check
def _step_sizes(delta, push, u, bias, has_softplus, size):
    """Turn delta as given into step sizes, and set push = delta * u."""
    lanes = delta.shape[1]
    for t in range(size):
        if has_softplus:
            for k in range(lanes):
                delta[t, k] = softplus(delta[t, k] + bias[k])
        else:
            for k in range(lanes):
                delta[t, k] = delta[t, k] + bias[k]
        for k in range(lanes):
            push[t, k] = delta[t, k] * u[t, k]


@piece
@no_type_check
def _gate(y, z, size):
    """y *= silu(z)."""
    lanes = y.shape[1]
    for t in range(size):
        for k in range(lanes):
            y[t, k] *= z[t, k] * sigmoid(z[t, k])


@no_type_check
def _forward(
    first, last, u, delta, A, B, C, D, z, bias, initial, has_softplus, num_groups, y, final, checkpoints, stride,
):  # fmt: skip
    """Scan tasks first..last-1, writing `y`, the last state and every `stride`-th.

    Shapes:
        u, delta, y: [b, d, l].  A: [d, s].  B, C: [b, g, s, l] or [d, s].  D, bias: [d].  z: as u, or empty.
        initial, final: [b, d, s], or empty.
        checkpoints: [b, blocks, ceil(l / stride), s, lanes], or empty where none is wanted.
    """
    num_blocks, lanes = checkpoints.shape[1], checkpoints.shape[4]
    num_channels, num_tokens, num_states = u.shape[1], u.shape[2], A.shape[1]
    weight, offset = np.empty(lanes, y.dtype), np.empty(lanes, y.dtype)
    rate, state = np.empty((num_states, lanes), y.dtype), np.empty((num_states, lanes), y.dtype)
    u_tile, delta_tile = np.empty((stride, lanes), y.dtype), np.empty((stride, lanes), y.dtype)
    push, y_tile, z_tile = np.empty_like(u_tile), np.empty_like(u_tile), np.empty_like(u_tile)
    for task in range(first, last):
        i, block, group, channel, end = _place(task, num_blocks, num_groups, num_channels, lanes)
        B_part, C_part = part_of(B, i, group, channel, end, lanes), part_of(C, i, group, channel, end, lanes)
        _load_rate(rate, A, channel, end)
        _load_row(weight, D, channel, end)
        _load_row(offset, bias, channel, end)
        _load_state(state, initial, i, channel, end)
        for start in range(0, num_tokens, stride):
            size = min(stride, num_tokens - start)
            if checkpoints.size > 0:
                _copy(checkpoints[i, block, start // stride], state)
            _load(u_tile, u, i, channel, end, start, size)
            _load(delta_tile, delta, i, channel, end, start, size)
            _step_sizes(delta_tile, push, u_tile, offset, has_softplus, size)
            for t in range(size):
                for k in range(lanes):
                    y_tile[t, k] = weight[k] * u_tile[t, k]
                for s in range(num_states):
                    b, c = coefficient(B_part, s, start + t), coefficient(C_part, s, start + t)
                    for k in range(lanes):
                        h = exp2(delta_tile[t, k] * rate[s, k]) * state[s, k] + push[t, k] * pick(b, k)
                        state[s, k] = h
                        y_tile[t, k] += h * pick(c, k)
            if z.size > 0:
                _load(z_tile, z, i, channel, end, start, size)
                _gate(y_tile, z_tile, size)
            _store(y, y_tile, i, channel, end, start, size)
        _store_state(final, state, i, channel, end)


# Pieces of the backward pass


@piece
@no_type_check
def _slopes(slope, delta, bias, has_softplus, size):
    """Derivative of the step sizes by delta as given."""
    lanes = slope.shape[1]
    for t in range(size):
        if has_softplus:
            for k in range(lanes):
                slope[t, k] = sigmoid(delta[t, k] + bias[k])
        else:
            slope[t] = 1


@piece
@no_type_check
def _replay(delta, push, rate, B, start, size, states, decays):
    """Recompute a chunk from its checkpoint in states[0]: states[t + 1] = h_t, decays[t] = exp(delta_t A)."""
    lanes = delta.shape[1]
    for t in range(size):
        for s in range(rate.shape[0]):
            b = coefficient(B, s, start + t)
            for k in range(lanes):
                decay = exp2(delta[t, k] * rate[s, k])
                decays[t, s, k] = decay
                states[t + 1, s, k] = decay * states[t, s, k] + push[t, k] * pick(b, k)


@piece
@no_type_check
def _ungate(grad_y, z, grad_z, u, D, C, start, size, states):
    """From the gradient of y * silu(z) to those of y (in place) and of z."""
    lanes = grad_y.shape[1]
    for t in range(size):
        for k in range(lanes):
            grad_z[t, k] = D[k] * u[t, k]
        for s in range(states.shape[1]):
            c = coefficient(C, s, start + t)
            for k in range(lanes):
                grad_z[t, k] += states[t + 1, s, k] * pick(c, k)
        for k in range(lanes):
            gate = sigmoid(z[t, k])
            grad_z[t, k] *= grad_y[t, k] * (gate + z[t, k] * gate * sigmoid(-z[t, k]))
            grad_y[t, k] *= z[t, k] * gate


@piece
@no_type_check
def _retreat(
    delta, push, rate, B, C, start, size, states, decays, grad_y, grad_state, grad_rate, by_exponent, by_push,
    grad_B, grad_C,
):  # fmt: skip
    """Carry the gradient of the state back over a chunk.

    Leaves in `by_exponent` the gradient by delta of the decays, over ln 2, and in `by_push` the gradient of push.
    """
    lanes = delta.shape[1]
    for t in range(size - 1, -1, -1):
        by_exponent[t] = 0
        by_push[t] = 0
        for s in range(rate.shape[0]):
            b, c = coefficient(B, s, start + t), coefficient(C, s, start + t)
            sum_b, sum_c = open_sum(grad_B, s, b), open_sum(grad_C, s, c)
            for k in range(lanes):
                grad = grad_state[s, k] + grad_y[t, k] * pick(c, k)
                sum_b = add(sum_b, k, grad * push[t, k])
                sum_c = add(sum_c, k, grad_y[t, k] * states[t + 1, s, k])
                by_push[t, k] += grad * pick(b, k)
                grad *= decays[t, s, k]
                grad_state[s, k] = grad
                grad *= states[t, s, k]
                grad_rate[s, k] += grad * delta[t, k]
                by_exponent[t, k] += grad * rate[s, k]
            close_sum(grad_B, s, start + t, sum_b)
            close_sum(grad_C, s, start + t, sum_c)


@piece
@no_type_check
def _finish(u, delta, D, slope, grad_y, by_exponent, by_push, grad_D, grad_bias, size):
    """Turn `by_push` into the gradient of u and `by_exponent` into that of delta as given; add to D's and the bias'."""
    lanes = u.shape[1]
    ln_2 = u.dtype.type(math.log(2))
    for t in range(size):
        for k in range(lanes):
            grad_D[k] += grad_y[t, k] * u[t, k]
            by_exponent[t, k] = (ln_2 * by_exponent[t, k] + u[t, k] * by_push[t, k]) * slope[t, k]
            grad_bias[k] += by_exponent[t, k]
            by_push[t, k] = by_push[t, k] * delta[t, k] + D[k] * grad_y[t, k]


@no_type_check
def _backward(
    first, last, u, delta, A, B, C, D, z, bias, initial, has_softplus, num_groups, checkpoints, stride, grad_y,
    grad_final, grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial,
):  # fmt: skip
    """Adjoint of the forward pass for tasks first..last-1, chunk by chunk from the end.

    Shapes:
        As for the forward pass.  grad_A: [b, blocks, s, lanes], grad_D, grad_bias: [b, blocks, lanes], one part
        per task.  grad_B, grad_C: [b, blocks, s, l], or, of what is given by channel, zeros [b, blocks, 1, s, lanes].
    """
    num_blocks, lanes = checkpoints.shape[1], checkpoints.shape[4]
    num_channels, num_tokens, num_states = u.shape[1], u.shape[2], A.shape[1]
    weight, offset = np.empty(lanes, u.dtype), np.empty(lanes, u.dtype)
    rate, grad_state = np.empty((num_states, lanes), u.dtype), np.empty((num_states, lanes), u.dtype)
    u_tile, delta_tile = np.empty((stride, lanes), u.dtype), np.empty((stride, lanes), u.dtype)
    y_tile, z_tile, push = np.empty_like(u_tile), np.empty_like(u_tile), np.empty_like(u_tile)
    slope, by_exponent, by_push = np.empty_like(u_tile), np.empty_like(u_tile), np.empty_like(u_tile)
    states = np.empty((stride + 1, num_states, lanes), u.dtype)
    decays = np.empty((stride, num_states, lanes), u.dtype)
    for task in range(first, last):
        i, block, group, channel, end = _place(task, num_blocks, num_groups, num_channels, lanes)
        B_part, C_part = part_of(B, i, group, channel, end, lanes), part_of(C, i, group, channel, end, lanes)
        _load_rate(rate, A, channel, end)
        _load_row(weight, D, channel, end)
        _load_row(offset, bias, channel, end)
        _load_state(grad_state, grad_final, i, channel, end)
        sum_A, sum_D, sum_bias = grad_A[i, block], grad_D[i, block], grad_bias[i, block]
        for chunk in range(checkpoints.shape[2] - 1, -1, -1):
            start = chunk * stride
            size = min(stride, num_tokens - start)
            _copy(states[0], checkpoints[i, block, chunk])
            _load(u_tile, u, i, channel, end, start, size)
            _load(delta_tile, delta, i, channel, end, start, size)
            _load(y_tile, grad_y, i, channel, end, start, size)
            _slopes(slope, delta_tile, offset, has_softplus, size)
            _step_sizes(delta_tile, push, u_tile, offset, has_softplus, size)
            _replay(delta_tile, push, rate, B_part, start, size, states, decays)
            if z.size > 0:
                _load(z_tile, z, i, channel, end, start, size)
                _ungate(y_tile, z_tile, by_push, u_tile, weight, C_part, start, size, states)
                _store(grad_z, by_push, i, channel, end, start, size)
            _retreat(
                delta_tile, push, rate, B_part, C_part, start, size, states, decays, y_tile, grad_state, sum_A,
                by_exponent, by_push, grad_B[i, block], grad_C[i, block],
            )  # fmt: skip
            _finish(u_tile, delta_tile, weight, slope, y_tile, by_exponent, by_push, sum_D, sum_bias, size)
            _store(grad_delta, by_exponent, i, channel, end, start, size)
            _store(grad_u, by_push, i, channel, end, start, size)
        _store_state(grad_initial, grad_state, i, channel, end)


@cache
def compiled(dtype: np.dtype, by_channel: tuple[bool, bool]) -> tuple[Callable[..., None], Callable[..., None]]:
    """The forward and the backward kernel for float32 or float64; `by_channel` says how B and C are given."""
    real = from_dtype(dtype)
    tensor, matrix, vector = real[:, :, :], real[:, :], real[:]
    checkpoints, parts, rows = real[:, :, :, :, ::1], real[:, :, :, ::1], real[:, :, ::1]
    B, C = (matrix if given else real[:, :, :, :] for given in by_channel)
    grad_B, grad_C = (checkpoints if given else parts for given in by_channel)
    inputs = (int64, int64, tensor, tensor, matrix, B, C, vector, tensor, vector, tensor, boolean, int64)
    gradients = (tensor, tensor, parts, grad_B, grad_C, rows, tensor, rows, tensor)
    forward = void(*inputs, tensor, tensor, checkpoints, int64)
    backward = void(*inputs, checkpoints, int64, tensor, tensor, *gradients)
    return compile_kernel(_forward, forward), compile_kernel(_backward, backward)
