"""Search for the channel order under which the output of the pruned layers loses least."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from permlab.ops.nm import nm_mask
from permlab.sparsity.retained_search import deal_and_match
from permlab.sparsity.search_argument import Clock, check_budget, check_pruning, checked_start
from permlab.sparsity.search_kernel import reconstruction_kernels

# Swaps that `reconstruction_search` draws at a time.
_DRAW = 64


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
    for part in scores:
        check_pruning(part, n, m, num_groups)
    check_budget(budget_s)
    if num_swaps < 0:
        raise ValueError(f"num_swaps={num_swaps} is below 0")
    reconstruction_kernels()
    clock = Clock(budget_s)
    joint = torch.cat([part.detach().to("cpu", torch.float64) for part in scores])
    if order is None:
        order = deal_and_match(joint, n=n, m=m, num_groups=num_groups)
    position = checked_start(order, joint.shape[1], num_groups)
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


def _check_layers(weights: Sequence[Tensor], hessians: Sequence[Tensor], scores: Sequence[Tensor]) -> None:
    if not len(weights) == len(hessians) == len(scores) > 0:
        found = f"{len(weights)} weights, {len(hessians)} Hessians and {len(scores)} scores"
        raise ValueError(f"every layer has a weight, a Hessian and scores, and there is at least one; got {found}")
    width = scores[0].shape[-1]
    for index, (weight, hessian, score) in enumerate(zip(weights, hessians, scores, strict=True)):
        for name, tensor in (("weight", weight), ("Hessian", hessian), ("scores", score)):
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise ValueError(f"layer {index}: the {name} are not finite floating-point numbers")
        shapes = [tuple(tensor.shape) for tensor in (weight, hessian, score)]
        if score.ndim != 2 or weight.shape != score.shape or shapes[1] != (width, width) or score.shape[1] != width:
            raise ValueError(
                f"layer {index}: shapes of weight, Hessian and scores do not fit {width} channels: {shapes}"
            )
