"""Searches for the channel order under which an N:M mask retains the highest score.

Both move one channel of every block at a time, to the blocks that together make the most of them,
which is a linear assignment.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permlab.sparsity.search_argument import Clock, check_budget, check_pruning, checked_start
from permlab.sparsity.search_kernel import retention_kernels

# Blocks that exchange channels at a time in `swap_search`; an assignment costs up to the cube of it.
_CHUNK = 512
# Standard deviation of the noise at the start of a cycle, in units of `_unit`, and what it is divided by until its end.
_HEAT, _FALL = 1.0, 5.0
# Rounds of a cycle; where there is time for more, a new cycle finds more than a slower one.
_CYCLE = 30_000
# The last part of a cycle is without noise; with a budget the last part of it checks single swaps.
_COOL_FRACTION, _POLISH_FRACTION = 0.1, 0.03
# Escapes in a row that may find nothing, as many as look at so many scores: none on matrices that are not small.
_ESCAPES, _ESCAPE_SCORES = 300, 2**22
# Of a budget, where escapes are that many.
_ESCAPE_FRACTION = 0.9


def deal_and_match(
    scores: Float[Tensor, "o i"], *, n: int, m: int, num_groups: int = 1, num_sweeps: int = 1
) -> Int64[Tensor, " i"]:
    """Spread strong channels over the blocks, then match channels to blocks slot by slot.

    Channels are dealt like cards, in the order of their summed scores, to and fro over the blocks
    of m. Then, for one slot after the other, the channels in this slot of all blocks are taken out
    and put back where they retain most together. The result never retains less than the dealt order.

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
        memory of (1 + 3 / m) float32 copies of the scores and two matrices of (i / m)^2 float64.
    Example:
        >>> deal_and_match(torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 1.0, 3.0, 2.0]]), n=1, m=2)
        tensor([3, 0, 1, 2])
    """
    check_pruning(scores, n, m, num_groups)
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
    while one gains. Small matrices, whose few blocks a round can hardly rearrange, get further
    escapes: a few swaps at random, then the best ones again, until 300 in a row found nothing (fewer
    the larger the matrix; from about 256 x 256 none). The best order met is returned. It is never
    worse than the start, nor than what the rounds before the first noise reach.

    Without a budget the result depends on the arguments only (and on how the processor rounds sums),
    and no swap of two channels retains more, up to rounding. With a budget noisy rounds, and escapes
    on small matrices, are as many as fit into it; the result then depends on the machine, and swaps
    are checked only while there is time.

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
        num_rounds: noisy rounds where there is no budget; 0 stops at the first local optimum, without escapes.
    Returns:
        int64 gather indices on the device of the scores.
    Raises:
        ValueError: if the scores are no floating-point matrix, negative or not finite, if n is not
            in 1..m-1, if num_groups does not divide the channels or m a group, if the order is no
            permutation or crosses groups, if budget_s is not positive or num_rounds < 0.
    Source: Pool & Yu 2021, Channel permutations for N:M sparsity (NeurIPS) for the objective and
        for escaping from local optima; Zhang et al. 2024 (RIA, ICLR) for the assignment.
    Differs from source: all blocks change in a round where Pool & Yu regroup two; slots are random
        where RIA's are fixed; escapes are annealed noise on the assignment, and several swaps at a
        time on small matrices where theirs is one. Any N:M.
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
    check_pruning(scores, n, m, num_groups)
    check_budget(budget_s)
    if num_rounds < 0:
        raise ValueError(f"num_rounds={num_rounds} is below 0")
    retention_kernels()
    clock = Clock(budget_s)
    start = _deal(scores, m, num_groups) if order is None else checked_start(order, scores.shape[1], num_groups)
    blocks = _Blocks(scores, start, n, m, num_groups)
    generator = np.random.default_rng(seed)
    pace_s = _descend(blocks, generator, clock)
    patience = _patience(blocks) if num_rounds > 0 else 0
    if budget_s is None:
        schedule = _by_count(num_rounds)
    else:
        schedule = _by_clock(clock, budget_s * (1 - _ESCAPE_FRACTION * patience / _ESCAPES), pace_s)
    _anneal(blocks, generator, schedule, clock)
    _polish(blocks, clock)
    _escape(blocks, generator, clock, patience if budget_s is None or patience == 0 else math.inf)
    return torch.from_numpy(blocks.order).to(scores.device)


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

    def exchange(self, blocks: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """What block i retains with block j's channel in its own one's place, but for a number that depends on i."""
        positions = blocks * self.m + slots
        return self._exchange(positions, self._raise_bars(positions)[0])[: len(blocks)]

    def _raise_bars(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bars of channels at some positions, and what these retain there, see the kernel."""
        positions = _even(positions)
        bars, own = np.empty((len(positions), self.scores.shape[1]), np.float32), np.empty(len(positions))
        retention_kernels().raise_bars(
            self.scores, self.order[positions], positions // self.m, self._last, self._first, bars, own
        )  # fmt: skip
        return bars, own

    def _exchange(self, positions: np.ndarray, bars: np.ndarray) -> np.ndarray:
        """For every bar, what is retained with the channel at each of some positions."""
        even = _even(positions)
        retained = np.empty((len(bars), len(even)))
        retention_kernels().exchange(self.scores, self.order[even], bars, retained)
        return retained[:, : len(positions)]

    def match(self, blocks: np.ndarray, slots: np.ndarray, noise: np.ndarray | None = None) -> None:
        """Take the channel in one slot of each block out and put them all back where they retain most together."""
        retained = self.exchange(blocks, slots)
        # All blocks prefer the strong channels. Taking this out leaves the best assignment what it is,
        # and the solver, which has no such guess of the prices, up to five times less to do.
        retained -= retained.mean(0)
        if noise is not None:
            retained += noise
        rows, chosen = linear_sum_assignment(retained, maximize=True)
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
            gain = self._exchange(other, bars)[: len(own)] + self._exchange(own, other_bars)[: len(other)].T
            gain -= own_retained[: len(own), None] + other_retained[: len(other)]
            gain[own[:, None] // self.m == other // self.m] = -np.inf
            gain = gain.reshape(len(blocks), -1)
            best = gain.argmax(1)
            found = gain[np.arange(len(blocks)), best]
            better = found > gains
            gains[better] = found[better]
            slot, partner = np.divmod(best, len(other))
            pairs[:, better] = np.stack((blocks * self.m + slot, other[partner]))[:, better]
        return gains, pairs[0], pairs[1]

    def climb(self) -> None:
        """Make the best swap of one channel after the other until none gains; for few rows."""
        size = self.groups.shape[1] * self.m
        retention_kernels().climb(
            self.scores, self.order, self.n, self.m, size, self._last, self._first, self.kept
        )  # fmt: skip

    def restore(self, order: np.ndarray) -> None:
        self.order[:] = order
        self.refresh(self.groups.ravel())


def _even(positions: np.ndarray) -> np.ndarray:
    """The kernels want an even number; the last one is repeated."""
    return np.append(positions, positions[-1]) if len(positions) % 2 else positions


def _positions(blocks: np.ndarray, m: int) -> np.ndarray:
    return (blocks[:, None] * m + np.arange(m)).ravel()


def _round(blocks: _Blocks, generator: np.random.Generator, clock: Clock, deviations: np.ndarray | None) -> None:
    """Match a random channel of every block, chunk by chunk; what they retain gets noise of their group's deviation."""
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


def _descend(blocks: _Blocks, generator: np.random.Generator, clock: Clock) -> float:
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


def _anneal(blocks: _Blocks, generator: np.random.Generator, schedule: Iterator[float], clock: Clock) -> None:
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


def _by_clock(clock: Clock, budget_s: float, pace_s: float) -> Iterator[float]:
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
        retained = blocks.exchange(chunk, generator.integers(0, blocks.m, len(chunk)))
        own = retained.diagonal()
        losses = own[:, None] + own - retained - retained.T
        found.append(losses[losses > 1e-6 * own.mean()])
        if sum(map(len, found)) >= 256:
            break
    losses = np.concatenate(found)
    # The cheapest twentieth; of few swaps more, since the very cheapest may cost next to nothing.
    share = min(1.0, 0.05 + 0.5 / len(chunk))
    return float(np.quantile(losses, share)) / math.sqrt(len(chunk)) if losses.size else 0.0


def _polish(blocks: _Blocks, clock: Clock) -> None:
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


def _patience(blocks: _Blocks) -> int:
    """Escapes in a row that may find nothing."""
    width, num_rows = blocks.scores.shape
    num_blocks = blocks.groups.shape[1]
    return min(_ESCAPES, _ESCAPE_SCORES // (width * num_blocks * blocks.m * num_rows)) if num_blocks > 1 else 0


def _escape(blocks: _Blocks, generator: np.random.Generator, clock: Clock, patience: float) -> None:
    """Swap channels at random and then as gains most, from the best order met, until that finds nothing more."""
    width, size = len(blocks.order), blocks.groups.shape[1] * blocks.m
    best, best_order, failures = blocks.total, blocks.order.copy(), 0
    while failures < patience and not clock.is_over():
        for place in generator.integers(0, width, generator.integers(2, 7)):
            pair = [place, place // size * size + generator.integers(0, size)]
            blocks.order[pair] = blocks.order[pair[::-1]]
        blocks.restore(blocks.order)
        blocks.climb()
        failures += 1
        if blocks.total > best * (1 + 1e-7):
            best, best_order, failures = blocks.total, blocks.order.copy(), 0
        blocks.order[:] = best_order
    blocks.restore(best_order)


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
