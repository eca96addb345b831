"""Searches for the order of a weight's input channels that suits an N:M mask best.

`deal_and_match` and `swap_search` maximise the score that the mask retains; both move one channel
of every block at a time, to the blocks that together make the most of them, which is an assignment
problem. `reconstruction_search` minimises what the layer's output loses.
"""

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permlab.ops.nm import check_pattern, nm_mask
from permlab.permutation import check_order
from permlab.sparsity.search_kernel import reconstruction_kernels, retention_kernels

# Blocks that exchange channels at a time in `swap_search`; an assignment costs up to the cube of it.
_CHUNK = 512
# Standard deviation of the noise at the start of a cycle, in units of `_unit`, and what it is divided by until its end.
_HEAT, _FALL = 1.0, 5.0
# Rounds of a cycle; where there is time for more, a new cycle finds more than a slower one.
_CYCLE = 30_000
# Swaps that `reconstruction_search` draws at a time.
_DRAW = 64
# The last part of a cycle is without noise; with a budget the last part of it checks single swaps.
_COOL_FRACTION, _POLISH_FRACTION = 0.1, 0.03


def deal_and_match(
    scores: Float[Tensor, "o i"], *, n: int, m: int, num_groups: int = 1, num_sweeps: int = 1
) -> Int64[Tensor, " i"]:
    """Spread strong channels over the blocks, then match channels to blocks slot by slot.

    Channels are dealt like cards, in the order of their summed scores, to and fro over the blocks
    of m. Then, for one slot after the other, the channels in this slot of all blocks are taken out
    and put back where they retain most together. It never retains less than the dealt order.

    Shapes:
        o: outputs.  i: input channels, a multiple of num_groups * m.
    Args:
        scores: importance of every weight, not negative, any floating dtype.
        n: entries kept of every m, at least 1 and below m.
        m: length of a block.
        num_groups: equal consecutive stretches of channels that no channel may leave.
        num_sweeps: passes over the m slots; 0 only deals.
    Returns:
        int64 gather indices on the device of the scores.
    Raises:
        ValueError: if the scores are no floating-point matrix, negative or not finite, if n is not
            in 1..m-1, if num_groups does not divide the channels or m a group, or num_sweeps < 0.
    Source: Zhang et al. 2024, Plug-and-Play: An Efficient Post-training Pruning Method for Large
        Language Models (ICLR), channel permutation (HCR and LSA).
    Differs from source: nothing for one sweep and one group; further sweeps and groups are ours.
    Cost: O(o i^2 / m) time for a sweep and m assignments of i / m blocks, in float32 on one core;
        memory of (1 + 3 / m) float32 copies of the scores and two tables of (i / m)^2 float64.
    Example:
        >>> deal_and_match(torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 1.0, 3.0, 2.0]]), n=1, m=2)
        tensor([3, 0, 1, 2])
    """
    _check(scores, n, m, num_groups)
    if num_sweeps < 0:
        raise ValueError(f"num_sweeps={num_sweeps} is below 0")
    blocks = _Blocks(scores, _deal(scores, m, num_groups), n, m, num_groups)
    for _ in range(num_sweeps):
        for slot in range(m):
            for group in blocks.groups:
                blocks.match(group, np.full(len(group), slot))
    return torch.from_numpy(blocks.order).to(scores.device)


def swap_search(
    scores: Float[Tensor, "o i"],
    *,
    n: int,
    m: int,
    num_groups: int = 1,
    seed: int = 0,
    budget_s: float | None = None,
    order: Int64[Tensor, " i"] | None = None,
    num_rounds: int = 500,
) -> Int64[Tensor, " i"]:
    """Exchange channels between blocks until nothing is gained, and escape from where that leads.

    In a round every block gives up one channel, at random, and these channels are put back where
    they retain most together. Rounds are repeated until they gain little; then further rounds are
    made with noise on what is compared, which fades away (annealing); then single swaps are made
    while one gains. The best order met is returned: never worse than the start, nor than what
    the rounds before the first noise reach.

    Without a budget the result depends on the arguments only (and on how the processor rounds sums),
    and no swap of two channels retains more, up to rounding. With a budget the noisy rounds are as
    many as fit into it; the result then depends on the machine, and swaps are checked only while
    there is time.

    Shapes:
        o: outputs.  i: input channels, a multiple of num_groups * m.
    Args:
        scores: importance of every weight, not negative, any floating dtype; compared in float32.
        n: entries kept of every m, at least 1 and below m.
        m: length of a block.
        num_groups: equal consecutive stretches of channels that no channel may leave.
        seed: of the choice of channels and of the noise.
        budget_s: seconds of wall clock for the search, or None; compiling its kernels is not counted.
        order: where to start; None deals, see `deal_and_match`.
        num_rounds: noisy rounds where there is no budget; 0 stops at the first local optimum.
    Returns:
        int64 gather indices on the device of the scores.
    Raises:
        ValueError: if the scores are no floating-point matrix, negative or not finite, if n is not
            in 1..m-1, if num_groups does not divide the channels or m a group, if the order is no
            permutation or crosses groups, if budget_s is not positive or num_rounds < 0.
    Source: Pool & Yu 2021, Channel permutations for N:M sparsity (NeurIPS) for the problem and
        for escaping from local optima; Zhang et al. 2024 (RIA, ICLR) for the assignment.
    Differs from source: all blocks change in a round where Pool & Yu regroup two; slots are random
        where RIA's are fixed; escapes are annealed noise on the assignment. Any N:M.
    Cost: a round takes O(o i k / m) time with k = min(i / (m num_groups), 512) and assignments of
        k blocks; the final check of single swaps O(o i^2). One core, float32: the default takes a
        few hundredths of a second for 128 x 64 scores and one to two minutes for 4096 x 4096.
        Memory of (1 + 2 / m) float32 copies of the scores and O(k (k + o)).
    Example:
        >>> scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 1.0, 2.0]])
        >>> order = swap_search(scores, n=1, m=2)
        >>> sorted(pair.sum().item() for pair in scores.sum(0)[order].view(2, 2))  # the strong two are apart
        [9.0, 11.0]
    """
    _check(scores, n, m, num_groups)
    _check_budget(budget_s)
    if num_rounds < 0:
        raise ValueError(f"num_rounds={num_rounds} is below 0")
    retention_kernels()
    clock = _Clock(budget_s)
    start = _deal(scores, m, num_groups) if order is None else _checked_start(order, scores.shape[1], num_groups)
    blocks = _Blocks(scores, start, n, m, num_groups)
    generator = np.random.default_rng(seed)
    pace_s = _descend(blocks, generator, clock)
    schedule = _by_count(num_rounds) if budget_s is None else _by_clock(clock, budget_s, pace_s)
    _anneal(blocks, generator, schedule, clock)
    _polish(blocks, clock)
    return torch.from_numpy(blocks.order).to(scores.device)


def reconstruction_search(
    weights: Sequence[Float[Tensor, "_ i"]],
    hessians: Sequence[Float[Tensor, "i i"]],
    scores: Sequence[Float[Tensor, "_ i"]],
    *,
    n: int,
    m: int,
    num_groups: int = 1,
    order: Int64[Tensor, " i"] | None = None,
    num_swaps: int = 6000,
    seed: int = 0,
    budget_s: float | None = None,
) -> Int64[Tensor, " i"]:
    """Swap channels of different blocks wherever the pruned layers' output thereby loses less.

    The layers share their input channels and hence the order. The mask of each keeps, in every row, the n
    highest scores of every m consecutive channels. With D the weights that it removes and H the
    layer's Hessian, what is lost is `tr(D H D^T)`, summed over layers. Random swaps are tried one
    after the other and made if that sum falls, so the result is never worse than the start.

    Shapes:
        _: outputs of a layer, which differ.  i: input channels, a multiple of num_groups * m.
    Args:
        weights: one matrix for each layer, any floating dtype.
        hessians: one for each layer, `X^T X` of its inputs X. Layers may share one tensor, which is then stored once.
        scores: importance of every weight, not negative, for each layer.
        n: entries kept of every m, at least 1 and below m.
        m: length of a block.
        num_groups: equal consecutive stretches of channels that no channel may leave.
        order: where to start; None is `deal_and_match` on all scores.
        num_swaps: swaps to try.
        seed: of the swaps.
        budget_s: seconds of wall clock after which no further swap is tried, or None.
    Returns:
        int64 gather indices on the device of the first layer's scores.
    Raises:
        ValueError: if the lists are empty or differ in length, shapes do not fit, something is not
            floating point or not finite, and for the other arguments as in `swap_search`.
    Source: this repository; the objective is that of Frantar & Alistarh 2023, arXiv:2301.00774, eq. 1.
    Differs from source: the order is searched, the weights that stay are not updated.
    Cost: O(o) time for a swap that is tried and O(o i) for one that is made, o being the outputs of
        all layers, plus one product of size o i^2. float64 on one core: memory of three float64
        copies of the weights, and one of every Hessian.
    Example:
        >>> weight = torch.tensor([[2.0, 2.0, 1.0, 1.0]])
        >>> hessian = torch.eye(4)
        >>> reconstruction_search([weight], [hessian], [weight], n=1, m=2, order=torch.arange(4), num_swaps=20)
        tensor([3, 1, 2, 0])
    """
    _check_layers(weights, hessians, scores)
    for table in scores:
        _check(table, n, m, num_groups)
    _check_budget(budget_s)
    if num_swaps < 0:
        raise ValueError(f"num_swaps={num_swaps} is below 0")
    reconstruction_kernels()
    clock = _Clock(budget_s)
    joint = torch.cat([table.detach().to("cpu", torch.float64) for table in scores])
    if order is None:
        order = deal_and_match(joint, n=n, m=m, num_groups=num_groups)
    position = _checked_start(order, joint.shape[1], num_groups)
    layers = _Layers(weights, hessians, joint, position, n, m)
    generator = np.random.default_rng(seed)
    # Swaps between two looks at the clock: fewer where a swap takes long. The result does not depend on it.
    step = min(_DRAW, max(1, 2**26 // joint.numel()))
    for begin in range(0, num_swaps, _DRAW):
        pairs = _draw_pairs(joint.shape[1], m, num_groups, min(_DRAW, num_swaps - begin), generator)
        for first in range(0, len(pairs), step):
            if clock.is_over():
                return torch.from_numpy(layers.order).to(scores[0].device)
            layers.descend(pairs, first, min(len(pairs), first + step))
    return torch.from_numpy(layers.order).to(scores[0].device)


# The retained score


class _Blocks:
    """Channels in blocks of m, and what each block retains.

    Args:
        start: order to begin with; `order` is a copy that changes.
    """

    def __init__(self, scores: Tensor, start: np.ndarray, n: int, m: int, num_groups: int) -> None:
        self.scores, self.n, self.m = _columns(scores), n, m
        self.order = start.copy()
        width, num_rows = self.scores.shape
        num_blocks = width // m
        self.groups = np.arange(num_blocks).reshape(num_groups, -1)
        self._last, self._first = np.empty((2, num_blocks, num_rows), np.float32)
        self.kept = np.empty(num_blocks)
        self.refresh(np.arange(num_blocks))

    @property
    def total(self) -> float:
        return float(self.kept.sum())

    def refresh(self, blocks: np.ndarray) -> None:
        """Bring up to date what is known of blocks whose channels changed."""
        retention_kernels().refresh(
            self.scores, self.order, blocks, self.n, self.m, self._last, self._first, self.kept
        )  # fmt: skip

    def tabulate(self, blocks: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """What block i retains with block j's channel in its own one's place, but for a number that depends on i."""
        positions = blocks * self.m + slots
        return self._tabulate(positions, self._raise_bars(positions)[0])[: len(blocks)]

    def _raise_bars(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bars of channels at some positions, and what these retain there, see the kernel."""
        positions = _even(positions)
        bars, own = np.empty((len(positions), self.scores.shape[1]), np.float32), np.empty(len(positions))
        retention_kernels().raise_bars(
            self.scores, self.order[positions], positions // self.m, self._last, self._first, bars, own
        )  # fmt: skip
        return bars, own

    def _tabulate(self, positions: np.ndarray, bars: np.ndarray) -> np.ndarray:
        """For every bar, what is retained with the channel at each of some positions."""
        even = _even(positions)
        table = np.empty((len(bars), len(even)))
        retention_kernels().tabulate(self.scores, self.order[even], bars, table)
        return table[:, : len(positions)]

    def match(self, blocks: np.ndarray, slots: np.ndarray, noise: np.ndarray | None = None) -> None:
        """Take the channel in one slot of each block out and put them all back where they retain most together."""
        table = self.tabulate(blocks, slots)
        # All blocks prefer the strong channels. Taking this out leaves the best assignment what it is,
        # and the solver, which has no such guess of the prices, up to five times less to do.
        table -= table.mean(0)
        if noise is not None:
            table += noise
        rows, chosen = linear_sum_assignment(table, maximize=True)
        moved = rows != chosen
        if moved.any():
            positions = blocks * self.m + slots
            self.order[positions] = self.order[positions][chosen]
            self.refresh(blocks[moved])

    def find_swaps(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best swap of each of some blocks of one group: its gain, and the positions of the two channels."""
        own = _positions(blocks, self.m)
        bars, own_retained = self._raise_bars(own)
        gains, pairs = np.full(len(blocks), -np.inf), np.zeros((2, len(blocks)), np.int64)
        group = self.groups[blocks[0] // self.groups.shape[1]]
        for chunk in np.array_split(group, math.ceil(len(group) / _CHUNK * self.m)):
            other = _positions(chunk, self.m)
            other_bars, other_retained = self._raise_bars(other)
            table = self._tabulate(other, bars)[: len(own)] + self._tabulate(own, other_bars)[: len(other)].T
            table -= own_retained[: len(own), None] + other_retained[: len(other)]
            table[own[:, None] // self.m == other // self.m] = -np.inf
            table = table.reshape(len(blocks), -1)
            best = table.argmax(1)
            found = table[np.arange(len(blocks)), best]
            better = found > gains
            gains[better] = found[better]
            slot, partner = np.divmod(best, len(other))
            pairs[:, better] = np.stack((blocks * self.m + slot, other[partner]))[:, better]
        return gains, pairs[0], pairs[1]

    def restore(self, order: np.ndarray) -> None:
        self.order[:] = order
        self.refresh(self.groups.ravel())


def _even(positions: np.ndarray) -> np.ndarray:
    """The kernels want an even number; the last one is repeated."""
    return np.append(positions, positions[-1]) if len(positions) % 2 else positions


def _positions(blocks: np.ndarray, m: int) -> np.ndarray:
    return (blocks[:, None] * m + np.arange(m)).ravel()


class _Clock:
    """Wall-clock budget, counted from when the clock is made; without one it is never over."""

    def __init__(self, budget_s: float | None) -> None:
        self.budget_s = budget_s
        self._start = time.perf_counter()

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    def is_over(self) -> bool:
        return self.budget_s is not None and self.elapsed_s() >= self.budget_s


def _round(blocks: _Blocks, generator: np.random.Generator, clock: _Clock, deviations: np.ndarray | None) -> None:
    """Match a random channel of every block, chunk by chunk; a row of the table gets noise of its group's deviation."""
    for index, group in enumerate(blocks.groups):
        shuffled = generator.permutation(group)
        for chunk in np.array_split(shuffled, math.ceil(len(group) / _CHUNK)):
            if clock.is_over():
                return
            slots = generator.integers(0, blocks.m, len(chunk))
            noise = None
            if deviations is not None and deviations[index] > 0:
                noise = generator.standard_normal((len(chunk), len(chunk)), dtype=np.float32)
                noise *= np.float32(deviations[index])
            blocks.match(chunk, slots, noise)


def _descend(blocks: _Blocks, generator: np.random.Generator, clock: _Clock) -> float:
    """Rounds without noise until the latest, as many as move every channel twice, gained less than 1 % of the whole.

    Returns:
        Seconds for each round.
    """
    totals = [blocks.total]
    recent, begin = 2 * blocks.m, clock.elapsed_s()
    while not clock.is_over():
        _round(blocks, generator, clock, None)
        totals.append(blocks.total)
        if len(totals) > recent and totals[-1] - totals[-1 - recent] <= 0.01 * (totals[-1] - totals[0]):
            break
    return (clock.elapsed_s() - begin) / len(totals)


def _anneal(blocks: _Blocks, generator: np.random.Generator, schedule: Iterator[float], clock: _Clock) -> None:
    """Rounds with noise that fades, from the present order; leaves the best order met.

    Args:
        schedule: for each round, the fraction of its cycle that has passed.
    """
    units = np.array([_unit(blocks, group, generator) for group in blocks.groups])
    best, best_order = blocks.total, blocks.order.copy()
    for progress in schedule:
        noisy = progress / (1 - _COOL_FRACTION)
        _round(blocks, generator, clock, _HEAT * _FALL**-noisy * units if noisy < 1 else None)
        if blocks.total > best:
            best, best_order = blocks.total, blocks.order.copy()
    blocks.restore(best_order)


def _by_count(num_rounds: int) -> Iterator[float]:
    num_cycles = max(1, round(num_rounds / _CYCLE))
    return (count * num_cycles / num_rounds % 1 for count in range(num_rounds))


def _by_clock(clock: _Clock, budget_s: float, pace_s: float) -> Iterator[float]:
    """As many cycles as rounds of this pace make in the time that is left before single swaps are checked."""
    begin = clock.elapsed_s()
    left = (1 - _POLISH_FRACTION) * budget_s - begin
    num_cycles = max(1, round(left / pace_s / _CYCLE)) if left > 0 else 1
    while (passed := clock.elapsed_s() - begin) < left:
        yield passed * num_cycles / left % 1


def _unit(blocks: _Blocks, group: np.ndarray, generator: np.random.Generator) -> float:
    """A scale of the noise: what swaps cost that are among the cheapest to lose by, over the root of the blocks.

    Large scores of few channels would swamp a standard deviation; the swaps worth trying are those that cost little.
    The more blocks there are, the more of them get a large noise by chance.
    """
    found: list[np.ndarray] = []
    # A few blocks give few losses at a time, and some give none: no more than so many attempts.
    for _ in range(64):
        chunk = generator.permutation(group)[:_CHUNK]
        table = blocks.tabulate(chunk, generator.integers(0, blocks.m, len(chunk)))
        own = table.diagonal()
        losses = own[:, None] + own - table - table.T
        found.append(losses[losses > 1e-6 * own.mean()])
        if sum(map(len, found)) >= 256:
            break
    losses = np.concatenate(found)
    # The cheapest twentieth; of few swaps more, since the very cheapest may cost next to nothing.
    share = min(1.0, 0.05 + 0.5 / len(chunk))
    return float(np.quantile(losses, share)) / math.sqrt(len(chunk)) if losses.size else 0.0


def _polish(blocks: _Blocks, clock: _Clock) -> None:
    """Swap single channels while a swap gains; all swaps of a block are looked at anew whenever it changes."""
    num_blocks, size = len(blocks.kept), blocks.groups.shape[1]
    gains, (slots, partners) = np.full(num_blocks, -np.inf), np.zeros((2, num_blocks), np.int64)
    stale = np.arange(num_blocks)
    # Some ten milliseconds between two looks at the clock.
    at_a_time = max(1, 2**29 // (size * blocks.m**2 * blocks.scores.shape[1]))
    while stale.size:
        for group in np.split(stale, np.flatnonzero(np.diff(stale // size)) + 1):
            for batch in np.array_split(group, math.ceil(len(group) / at_a_time)):
                if clock.is_over():
                    return
                gains[batch], slots[batch], partners[batch] = blocks.find_swaps(batch)
        touched = _swap_best(blocks, gains, slots, partners)
        blocks.refresh(np.flatnonzero(touched))
        stale = np.flatnonzero(touched | touched[partners // blocks.m])


def _swap_best(blocks: _Blocks, gains: np.ndarray, slots: np.ndarray, partners: np.ndarray) -> np.ndarray:
    """Make the swaps that gain most, no block twice, and return which blocks were touched."""
    touched = np.zeros(len(gains), bool)
    homes = partners // blocks.m
    # What is less than the rounding of the sums is no gain.
    worthwhile = np.flatnonzero(gains > 1e-6 * (blocks.kept + blocks.kept[homes]))
    for block in worthwhile[np.argsort(-gains[worthwhile], kind="stable")]:
        if touched[block] or touched[homes[block]]:
            continue
        touched[block] = touched[homes[block]] = True
        pair = [slots[block], partners[block]]
        blocks.order[pair] = blocks.order[pair[::-1]]
    return touched


def _deal(scores: Tensor, m: int, num_groups: int) -> np.ndarray:
    """Order in which slot i of the blocks holds the i-th stretch of the channels by rising sum, turned for odd i."""
    sums = scores.detach().sum(0, dtype=torch.float64).cpu().numpy().reshape(num_groups, -1)
    ranked = np.argsort(sums, axis=1, kind="stable") + np.arange(num_groups)[:, None] * sums.shape[1]
    slots = ranked.reshape(num_groups, m, -1)
    slots[:, 1::2] = slots[:, 1::2, ::-1].copy()
    return np.ascontiguousarray(slots.transpose(0, 2, 1)).ravel()


def _columns(scores: Tensor) -> np.ndarray:
    """Scores as float32 `[channel, row]` below 2, divided by a power of two: exact for float32 and narrower."""
    peak = scores.amax().item()
    scale = 2.0 ** -math.frexp(peak)[1] if peak > 0 else 1.0
    columns = torch.empty(scores.shape[1], scores.shape[0])
    wide = torch.promote_types(scores.dtype, torch.float32)
    for start in range(0, len(scores), 256):
        part = scores.detach()[start : start + 256].to("cpu", wide)
        columns[:, start : start + 256] = (part * scale).T
    return columns.numpy()


# The reconstruction error


class _Layers:
    """Rows of all layers, one below the other, pruned under an order."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        hessians: Sequence[Tensor],
        scores: Tensor,
        start: np.ndarray,
        n: int,
        m: int,
    ) -> None:
        self.order, self.m = start.copy(), m
        self._scores = scores.numpy()
        self._weights = torch.cat([weight.detach().to("cpu", torch.float64) for weight in weights]).numpy()
        self._mask = _mask(self._scores, self.order, n, m)
        distinct = list({id(hessian): hessian for hessian in hessians}.values())
        self._hessians = np.stack([_symmetric(hessian) for hessian in distinct])
        index = {id(hessian): part for part, hessian in enumerate(distinct)}
        parts = [index[id(hessian)] for hessian in hessians]
        self._parts = np.repeat(np.array(parts, np.int64), [len(weight) for weight in weights])
        lost = np.where(self._mask, 0, self._weights)
        self._pull = np.empty_like(lost)
        for part, hessian in enumerate(self._hessians):
            self._pull[self._parts == part] = lost[self._parts == part] @ hessian
        # Less than this is rounding: a swap and its reverse must not both look like progress.
        self._least_gain = 1e-12 * float((lost * self._pull).sum())
        self._last, self._first = np.empty((2, len(lost), len(start) // m), np.int16)
        for block in range(len(start) // m):
            reconstruction_kernels()[0](self._scores, self._mask, self.order, block, m, self._last, self._first)

    def descend(self, pairs: np.ndarray, first: int, last: int) -> float:
        """Try swaps first..last-1 of a list and make those that help; how much less is lost."""
        return reconstruction_kernels()[1](
            first, last, pairs, self._least_gain, self._scores, self._weights, self._mask, self.order, self.m,
            self._parts, self._hessians, self._pull, self._last, self._first,
        )  # fmt: skip


def _symmetric(hessian: Tensor) -> np.ndarray:
    """As float64. What is not symmetric does not count in the objective, but would in its increments."""
    wide = hessian.detach().to("cpu", torch.float64)
    return ((wide + wide.T) / 2).numpy()


def _mask(scores: np.ndarray, order: np.ndarray, n: int, m: int) -> np.ndarray:
    """What an order keeps, in the original columns."""
    mask = np.empty(scores.shape, bool)
    mask[:, order] = nm_mask(torch.from_numpy(scores[:, order]), n=n, m=m).numpy()
    return mask


def _draw_pairs(width: int, m: int, num_groups: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Random pairs of positions in different blocks of the same group; none where a group is a single block."""
    size = width // num_groups
    if size == m:
        return np.empty((0, 2), np.int64)
    first = generator.integers(0, width, count)
    home, own = first // size * size, first % size // m * m
    second = generator.integers(0, size - m, count)
    second += np.where(second >= own, m, 0) + home
    return np.stack((first, second), axis=1)


# Arguments


def _check(scores: Tensor, n: int, m: int, num_groups: int) -> None:
    if not scores.is_floating_point() or scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"scores are a floating-point matrix, got {scores.dtype} of shape {tuple(scores.shape)}")
    # A minimum or maximum is NaN where a score is, and takes no memory.
    low, high = scores.amin(), scores.amax()
    if not (low >= 0 and high < math.inf):
        position = (~((scores >= 0) & (scores < math.inf))).nonzero()[0].tolist()
        value = scores[tuple(position)].item()
        raise ValueError(f"the score at {position} is {value}: neither 0 nor a positive number")
    width = scores.shape[1]
    if num_groups < 1 or width % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide {width} channels")
    check_pattern(width // num_groups, n=n, m=m)


def _check_budget(budget_s: float | None) -> None:
    if budget_s is not None and not budget_s > 0:
        raise ValueError(f"budget_s={budget_s} is not positive")


def _checked_start(order: Tensor, width: int, num_groups: int) -> np.ndarray:
    check_order(order)
    if order.shape != (width,):
        raise ValueError(f"an order of shape {tuple(order.shape)} does not fit {width} channels")
    start = order.cpu().numpy()
    size = width // num_groups
    if (start // size != np.arange(width) // size).any():
        slot = int(np.argmax(start // size != np.arange(width) // size))
        raise ValueError(f"the starting order takes channel {start[slot]} to slot {slot}, across {num_groups} groups")
    return start


def _check_layers(weights: Sequence[Tensor], hessians: Sequence[Tensor], scores: Sequence[Tensor]) -> None:
    if not len(weights) == len(hessians) == len(scores) > 0:
        found = f"{len(weights)} weights, {len(hessians)} Hessians and {len(scores)} scores"
        raise ValueError(f"every layer has a weight, a Hessian and scores, and there is at least one; got {found}")
    width = scores[0].shape[-1]
    for index, (weight, hessian, table) in enumerate(zip(weights, hessians, scores, strict=True)):
        for name, tensor in (("weight", weight), ("Hessian", hessian), ("scores", table)):
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise ValueError(f"layer {index}: the {name} are not finite floating-point numbers")
        shapes = [tuple(tensor.shape) for tensor in (weight, hessian, table)]
        if table.ndim != 2 or weight.shape != table.shape or shapes[1] != (width, width) or table.shape[1] != width:
            raise ValueError(
                f"layer {index}: shapes of weight, Hessian and scores do not fit {width} channels: {shapes}"
            )
