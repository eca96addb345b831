"""The CPU kernels of the channel searches, compiled by numba.

Names used throughout, for one block of m channels and one row of scores: `last` is the n-th and
`first` the (n+1)-th largest score of the block, the last one kept and the first one lost. The
`bar` of a channel is the n-th largest score of the block's *other* channels, `first` for a
channel that is kept and `last` for one that is not: whatever takes the channel's slot is kept if
it exceeds the bar, and the row retains max(bar, newcomer) where it retained max(bar, channel).
So what a block gains from an exchange needs two rows of numbers, whatever n and m are.

Scores are float32 `[channel, row]`: a channel's scores are consecutive, and rows are the vector
lanes. What is compared between channels is summed in float32 inside a tile and in float64 across tiles.

Nothing here is checked: shapes and types are the caller's duty.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, no_type_check

import numpy as np
from numba import boolean, float32, float64, int16, int64, njit, void

from permlab.ops.kernel import compile_kernel

# Reassociation lets sums over rows be vectorised; scores are finite.
_OPTIONS: dict[str, Any] = {
    "fastmath": {"contract", "reassoc", "nsz", "nnan"},
    "error_model": "numpy",
    "no_cfunc_wrapper": True,
}
# Rows of a tile: 64 channels of it stay in the second-level cache.
_TILE = 512
_STRIPE = 32


# Retained scores


@no_type_check
def _refresh(scores, order, blocks, n, m, last, first, kept):
    """Recompute what is known of some blocks.

    Shapes:
        scores: [channel, row].  order: [channel].  blocks: indices.  last, first: [block, row].
        kept: [block], the retained score.
    """
    num_rows = scores.shape[1]
    # The n + 1 largest scores so far, and what is on its way down.
    top, falling = np.empty((n + 1, _TILE), np.float32), np.empty(_TILE, np.float32)
    for block in blocks:
        total = 0.0
        for start in range(0, num_rows, _TILE):
            size = min(_TILE, num_rows - start)
            top[:] = -1
            for slot in range(m):
                channel = order[block * m + slot]
                for r in range(size):
                    falling[r] = scores[channel, start + r]
                for rank in range(min(slot, n) + 1):
                    for r in range(size):
                        held, new = top[rank, r], falling[r]
                        top[rank, r] = max(held, new)
                        falling[r] = min(held, new)
            for rank in range(n):
                for r in range(size):
                    total += np.float64(top[rank, r])
            for r in range(size):
                last[block, start + r] = top[n - 1, r]
                first[block, start + r] = top[n, r]
        kept[block] = total


@no_type_check
def _raise_bars(scores, channels, blocks, last, first, bars, own):
    """bars[i] = the bars of channels[i], which sits in blocks[i]; own[i] = what it retains there, as below.

    Shapes:
        channels, blocks, own: [k].  bars: [k, row].
    """
    for i in range(channels.shape[0]):
        channel, block = channels[i], blocks[i]
        total = 0.0
        for r in range(scores.shape[1]):
            score = scores[channel, r]
            bar = first[block, r] if score >= last[block, r] else last[block, r]
            bars[i, r] = bar
            total += np.float64(max(bar, score))
        own[i] = total


@no_type_check
def _exchange(scores, channels, bars, retained):
    """retained[i, j] = sum over rows of max(bars[i], scores[channels[j]]): the retained score of i's block, but for
    a number that depends on i only, if channels[j] takes the slot that bars[i] belongs to.

    Shapes:
        bars: [k, row].  channels: [c].  retained: [k, c], k and c even.
    """
    num_bars, num_rows = bars.shape
    retained[:] = 0
    for start in range(0, num_rows, _TILE):
        stop = min(num_rows, start + _TILE)
        for stripe in range(0, channels.shape[0], _STRIPE):
            # Two bars by two channels at a time: every number read is used twice.
            for i in range(0, num_bars, 2):
                bar, other_bar = bars[i, start:stop], bars[i + 1, start:stop]
                for j in range(stripe, min(channels.shape[0], stripe + _STRIPE), 2):
                    score, other_score = scores[channels[j], start:stop], scores[channels[j + 1], start:stop]
                    a = b = c = d = np.float32(0)
                    for r in range(stop - start):
                        a += max(bar[r], score[r])
                        b += max(bar[r], other_score[r])
                        c += max(other_bar[r], score[r])
                        d += max(other_bar[r], other_score[r])
                    retained[i, j] += a
                    retained[i, j + 1] += b
                    retained[i + 1, j] += c
                    retained[i + 1, j + 1] += d


_refresh_piece = njit(**_OPTIONS | {"no_cpython_wrapper": True})(_refresh)


@no_type_check
def _climb(scores, order, n, m, size, last, first, kept):
    """For one position after the other, make the swap that gains most, until no swap of two channels gains.

    Gains are summed in float32: meant for few rows.

    Shapes:
        As for `_refresh`, for all blocks; all of it is kept up to date.
    Args:
        size: channels of a group, which none leaves.
    """
    width, num_rows = scores.shape
    pair = np.empty(2, np.int64)
    quiet = place = 0
    while quiet < width:
        a, best, partner = place // m, np.float32(0), -1
        for other in range(place // size * size, (place // size + 1) * size):
            b = other // m
            if a == b:
                continue
            x, y, gain = scores[order[place]], scores[order[other]], np.float32(0)
            for r in range(num_rows):
                bar = first[a, r] if x[r] >= last[a, r] else last[a, r]
                other_bar = first[b, r] if y[r] >= last[b, r] else last[b, r]
                gain += (max(bar, y[r]) - max(bar, x[r])) + (max(other_bar, x[r]) - max(other_bar, y[r]))
            # What is less than the rounding of the sums is no gain.
            if gain > best and gain > 1e-6 * (kept[a] + kept[b]):
                best, partner = gain, other
        quiet += 1
        if partner >= 0:
            order[place], order[partner] = order[partner], order[place]
            pair[0], pair[1] = a, partner // m
            _refresh_piece(scores, order, pair, n, m, last, first, kept)
            quiet = 0
        place = (place + 1) % width


# Reconstruction


@no_type_check
def _boundaries(scores, mask, order, block, m, last, first):
    """Slots of a block's last kept and first lost channel in every row; of equal scores the lower slot is kept first.

    Shapes:
        scores, mask: [row, channel].  last, first: [row, block].
    """
    for r in range(scores.shape[0]):
        low = high = -1
        for slot in range(m):
            channel = order[block * m + slot]
            if mask[r, channel]:
                if low < 0 or scores[r, channel] <= scores[r, order[block * m + low]]:
                    low = slot
            elif high < 0 or scores[r, channel] > scores[r, order[block * m + high]]:
                high = slot
        last[r, block], first[r, block] = low, high


@njit(**_OPTIONS | {"no_cpython_wrapper": True})
@no_type_check
def _enter(scores, mask, order, row, block, slot, m, newcomer, last, first):
    """Whether a newcomer is kept in the slot of another channel, and the third channel that this switches, or -1."""
    kept = mask[row, order[block * m + slot]]
    rival = first[row, block] if kept else last[row, block]
    channel = order[block * m + rival]
    a, b = scores[row, newcomer], scores[row, channel]
    enters = a > b or (a == b and slot < rival)
    return enters, channel if enters != kept else -1


@njit(**_OPTIONS | {"no_cpython_wrapper": True})
@no_type_check
def _switches(scores, weights, mask, order, m, row, i, j, last, first, channels, steps):
    """Channels that a row keeps or loses anew if positions i and j trade, and by how much the lost weight changes."""
    count = 0
    a, b = order[i], order[j]
    keeps_b, rival_a = _enter(scores, mask, order, row, i // m, i % m, m, b, last, first)
    keeps_a, rival_b = _enter(scores, mask, order, row, j // m, j % m, m, a, last, first)
    for channel, changes in (
        (a, keeps_a != mask[row, a]),
        (b, keeps_b != mask[row, b]),
        (rival_a, rival_a >= 0),
        (rival_b, rival_b >= 0),
    ):
        if changes:
            channels[row, count] = channel
            steps[row, count] = weights[row, channel] if mask[row, channel] else -weights[row, channel]
            count += 1
    return count


@no_type_check
def _descend(
    first_swap, last_swap, pairs, least_gain, scores, weights, mask, order, m, part_of_row, hessians, pull, last, first
):  # fmt: skip
    """Try swaps first_swap..last_swap-1 and make those that lower the sum of tr(D H D^T), D being the lost weight.

    If a row's D changes by a vector e, its term changes by 2 e H D + e H e; e has at most four entries.

    Shapes:
        pairs: [swap, 2], positions in different blocks.  scores, weights, mask: [row, channel].
        part_of_row: [row], index into hessians [part, channel, channel].  pull: [row, channel], D H.
        last, first: [row, block], see `_boundaries`.
    Returns:
        How much the objective fell.
    """
    num_rows, width = scores.shape
    channels, steps = np.empty((num_rows, 4), np.int64), np.empty((num_rows, 4), np.float64)
    counts = np.empty(num_rows, np.int64)
    fallen = 0.0
    for swap in range(first_swap, last_swap):
        i, j = pairs[swap, 0], pairs[swap, 1]
        change = 0.0
        for row in range(num_rows):
            count = _switches(scores, weights, mask, order, m, row, i, j, last, first, channels, steps)
            counts[row] = count
            hessian = hessians[part_of_row[row]]
            for k in range(count):
                channel = channels[row, k]
                slope = 2 * pull[row, channel] + steps[row, k] * hessian[channel, channel]
                for h in range(k):
                    slope += 2 * steps[row, h] * hessian[channels[row, h], channel]
                change += steps[row, k] * slope
        if not change < -least_gain:
            continue
        fallen -= change
        for row in range(num_rows):
            hessian = hessians[part_of_row[row]]
            for k in range(counts[row]):
                channel, step = channels[row, k], steps[row, k]
                mask[row, channel] = not mask[row, channel]
                for other in range(width):
                    pull[row, other] += step * hessian[channel, other]
        order[i], order[j] = order[j], order[i]
        _boundaries_piece(scores, mask, order, i // m, m, last, first)
        _boundaries_piece(scores, mask, order, j // m, m, last, first)
    return fallen


_boundaries_piece = njit(**_OPTIONS | {"no_cpython_wrapper": True})(_boundaries)


class Kernels(NamedTuple):
    """Compiled functions of this file, by their names without the underscore."""

    refresh: Callable[..., None]
    raise_bars: Callable[..., None]
    exchange: Callable[..., None]
    climb: Callable[..., None]


@cache
def retention_kernels() -> Kernels:
    """What searches on the retained score need; compiled at the first call."""
    wide, single, sums, indices = float32[:, ::1], float64[:, ::1], float64[::1], int64[::1]
    return Kernels(
        refresh=compile_kernel(_refresh, void(wide, indices, indices, int64, int64, wide, wide, sums), _OPTIONS),
        raise_bars=compile_kernel(_raise_bars, void(wide, indices, indices, wide, wide, wide, sums), _OPTIONS),
        exchange=compile_kernel(_exchange, void(wide, indices, wide, single), _OPTIONS),
        climb=compile_kernel(_climb, void(wide, indices, int64, int64, int64, wide, wide, sums), _OPTIONS),
    )


@cache
def reconstruction_kernels() -> tuple[Callable[..., None], Callable[..., float]]:
    """`_boundaries` and `_descend`, compiled at the first call."""
    matrix, mask, slots, indices = float64[:, ::1], boolean[:, ::1], int16[:, ::1], int64[::1]
    boundaries = void(matrix, mask, indices, int64, int64, slots, slots)
    descend = float64(
        int64, int64, int64[:, ::1], float64, matrix, matrix, mask, indices, int64, indices, float64[:, :, ::1], matrix,
        slots, slots,
    )  # fmt: skip
    return compile_kernel(_boundaries, boundaries, _OPTIONS), compile_kernel(_descend, descend, _OPTIONS)
