"""Search for the order of items that a fading linear memory classifies best, each order being judged in closed form.

A diagonal linear state-space model reads items one after the other into states that decay, and its read-out
is linear. With the decays fixed, the states are linear in the items and the best read-out is a ridge regression, so
that an order has a loss without any training; and exchanging two items changes every state by a product of two
vectors, so that the loss after a swap costs no look at the images.
"""

import time
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from permlab.permutation import check_order

Readout = Literal["last", "mean"]
# A swap has to lower the loss by more than sums of float64 are off by.
_MARGIN = 1e-12


def memory_weights(num_slots: int, *, num_memories: int, longest_memory: float, readout: Readout) -> np.ndarray:
    """How much each slot adds to the read-out of states that fade at different rates.

    State k follows `h[t] = exp(-1 / length_k) h[t - 1] + x[t]`; lengths go from one slot to the longest in a
    geometric sequence. `last` is the state after the last slot, `mean` the mean of the states after each slot.

    Returns:
        float64 `[num_memories, num_slots]`.
    Raises:
        ValueError: if a number is not positive.
    Example:
        >>> memory_weights(3, num_memories=1, longest_memory=9.0, readout="last").round(3).tolist()
        [[0.135, 0.368, 1.0]]
    """
    for name, value in (("num_slots", num_slots), ("num_memories", num_memories), ("longest_memory", longest_memory)):
        if value <= 0:
            raise ValueError(f"{name}={value} is not positive")
    decay = np.exp(-1 / np.geomspace(1.0, longest_memory, num_memories))[:, None]
    lags = np.arange(num_slots)[::-1]
    if readout == "last":
        return decay**lags
    return (1 - decay ** (lags + 1)) / (1 - decay) / num_slots


def ridge_loss(
    items: Float[Tensor, "b n d"],
    labels: Int64[Tensor, " b"],
    order: Int64[Tensor, " n"],
    *,
    num_memories: int = 16,
    longest_memory: float = 150.0,
    readout: Readout = "last",
    ridge: float = 0.3,
    num_folds: int = 2,
    num_components: int = 4,
    seed: int = 0,
) -> float:
    """Part of the labels' variance that a ridge regression on fading states leaves unexplained, by cross-validation.

    Targets are one-hot. Items and targets are centred over all images, item by item; items are reduced to their
    leading principal components and divided by one number, so that their mean variance is one. Each fold of
    the images is predicted by the regression on the others, which minimises the mean squared error plus
    `ridge` times the squared norm of its weights.

    Shapes:
        b: images.  n: items.  d: features of an item.
    Args:
        items: of every image, not yet ordered.
        labels: class of every image.
        order: in which the items are read.
        num_memories: decays, the features of each component of the items.
        longest_memory: slots after which the slowest state has faded to 1/e; the fastest takes one slot.
        readout: of the states, after the last slot or the mean over all.
        ridge: strength of the penalty.
        num_folds: parts of the images, at least 2, that are predicted in turn.
        num_components: of the items' features that are kept, at most.
        seed: of the folds.
    Returns:
        0 where all is explained, about 1 where nothing is.
    Raises:
        ValueError: if shapes do not fit, an item is not finite, there are fewer images than folds, or a
            number is out of its range.
    Source: this repository.
    Cost: O(b n^2 d^2) time, d being `num_components` at most.
    Example:
        >>> items = torch.eye(2).repeat(4, 1).unsqueeze(-1)  # one of two pixels is set, which tells the class
        >>> round(ridge_loss(items, torch.tensor([0, 1] * 4), torch.tensor([0, 1]), num_memories=1, ridge=1e-6), 3)
        0.0
    """
    weights = memory_weights(items.shape[-2], num_memories=num_memories, longest_memory=longest_memory, readout=readout)
    return _Regression(
        items, labels, order, weights, ridge=ridge, num_folds=num_folds, num_components=num_components, seed=seed
    ).loss


def ridge_search(
    items: Float[Tensor, "b n d"],
    labels: Int64[Tensor, " b"],
    order: Int64[Tensor, " n"],
    *,
    num_groups: int = 1,
    num_swaps: int = 6000,
    num_memories: int = 16,
    longest_memory: float = 150.0,
    readout: Readout = "last",
    ridge: float = 0.3,
    num_folds: int = 2,
    num_components: int = 4,
    seed: int = 0,
    budget_s: float | None = None,
) -> Int64[Tensor, " n"]:
    """Swap items wherever `ridge_loss` thereby falls.

    Random pairs are tried one after the other, and swapped if the cross-validated loss falls, so the result
    is never worse than the start. Moving or reversing stretches of the order was tried and did no better.

    Shapes:
        b: images.  n: items.  d: features of an item.
    Args:
        items, labels: of training images.
        order: where to start.
        num_groups: equal consecutive blocks of slots that no item may leave.
        num_swaps: pairs to try.
        num_memories, longest_memory, readout, ridge, num_folds, num_components: as in `ridge_loss`.
        seed: of folds and pairs.
        budget_s: seconds of wall clock after which no further pair is tried, or None.
    Returns:
        int64 gather indices on the device of the start.
    Raises:
        ValueError: as `ridge_loss`; if the groups do not divide the items, or a number is below its range.
    Source: this repository.
    Cost: O(b n^2 d^2) time for the moments of the items, O((k d)^3) for a pair that is tried and O(n k d^2) more
        for one that is swapped, with k memories and d components at most `num_components`. float64.
    Example:
        >>> items = torch.randn(200, 8, 1, generator=torch.Generator().manual_seed(0))
        >>> labels = (items[:, 3, 0] > 0).long()  # item 3 alone tells the class
        >>> start = torch.arange(8)
        >>> found = ridge_search(items, labels, start, num_swaps=500, num_memories=1, longest_memory=1.0)
        >>> ridge_loss(items, labels, found) < ridge_loss(items, labels, start)
        True
        >>> found[-1]
        tensor(3)
    """
    num_slots = items.shape[-2]
    if num_groups < 1 or num_slots % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide {num_slots} items")
    if num_swaps < 0:
        raise ValueError(f"num_swaps={num_swaps} is below 0")
    if budget_s is not None and budget_s <= 0:
        raise ValueError(f"budget_s={budget_s} is not positive")
    end = None if budget_s is None else time.monotonic() + budget_s
    weights = memory_weights(num_slots, num_memories=num_memories, longest_memory=longest_memory, readout=readout)
    regression = _Regression(
        items, labels, order, weights, ridge=ridge, num_folds=num_folds, num_components=num_components, seed=seed
    )
    size = num_slots // num_groups
    if size > 1:
        rng = np.random.default_rng([seed, 1])
        firsts, steps = rng.integers(num_slots, size=num_swaps), rng.integers(1, size, size=num_swaps)
        for first, step in zip(firsts.tolist(), steps.tolist(), strict=True):
            if end is not None and time.monotonic() > end:
                break
            begin = first - first % size
            regression.swap_if_better(first, begin + (first - begin + step) % size)
    return torch.from_numpy(regression.order).to(order.device)


class _Regression:
    """Ridge regressions of one-hot targets on the states of one order, from moments that a swap updates.

    Shapes:
        f: folds.  n: items and slots.  d: components.  k: memories.  c: classes.
        States are counted component by component, `d * k` of them.
    """

    def __init__(
        self,
        items: Tensor,
        labels: Tensor,
        order: Tensor,
        weights: np.ndarray,
        *,
        ridge: float,
        num_folds: int,
        num_components: int,
        seed: int,
    ) -> None:
        _check(items, labels, order, ridge, num_folds, num_components)
        inputs = _standardised(items.detach().to("cpu", torch.float64).numpy(), num_components)
        targets = np.eye(int(labels.max()) + 1)[labels.cpu().numpy()]
        targets -= targets.mean(0)
        self.order = order.cpu().numpy().copy()
        self.weights = weights
        folds = [np.random.default_rng(seed).permutation(len(inputs))[fold::num_folds] for fold in range(num_folds)]
        sizes = np.array([len(fold) for fold in folds])
        self.num_fitted = (len(inputs) - sizes)[:, None, None]
        self.variance = (targets**2).sum() or 1.0
        num_items, num_features = inputs.shape[1:]
        flat = [inputs[fold].reshape(len(fold), -1) for fold in folds]
        products = np.stack([part.T @ part for part in flat])
        shape = (num_folds, num_items, num_features, num_items, num_features)
        # Moments of items with items, `[f, n, n, d, d]`, and with targets, `[f, n, d, c]`.
        self.between = products.reshape(shape).swapaxes(2, 3).copy()
        self.with_targets = np.stack([part.T @ targets[fold] for part, fold in zip(flat, folds, strict=True)])
        self.with_targets = self.with_targets.reshape(num_folds, num_items, num_features, -1)
        # The same of items with states, `[f, n, d, d * k]`, of states with states and with targets.
        by_item = np.empty_like(weights)
        by_item[:, self.order] = weights
        with_states = np.einsum("fijcd,kj->ficdk", self.between, by_item, optimize=True)
        self.with_states = with_states.reshape(num_folds, num_items, num_features, -1)
        states = np.einsum("fics,ki->fcks", self.with_states, by_item, optimize=True)
        self.states = states.reshape(num_folds, states.shape[-1], -1)
        self.penalty = ridge * np.eye(states.shape[-1])
        self.answers = np.einsum("ficy,ki->fcky", self.with_targets, by_item, optimize=True)
        self.answers = self.answers.reshape(num_folds, states.shape[-1], -1)
        self.loss = self._loss(self.states, self.answers)

    def _loss(self, states: np.ndarray, answers: np.ndarray) -> float:
        """Squared error over the folds, each predicted from the others, as a part of the targets' variance."""
        fitted = (states.sum(0) - states) / self.num_fitted + self.penalty
        readout = np.linalg.solve(fitted, (answers.sum(0) - answers) / self.num_fitted)
        error = ((states @ readout - 2 * answers) * readout).sum()
        return float(error / self.variance) + 1.0

    def swap_if_better(self, first: int, second: int) -> bool:
        """Exchange the items of two slots if the loss thereby falls."""
        one, other = int(self.order[first]), int(self.order[second])
        step = self.weights[:, first] - self.weights[:, second]  # times the items' difference, it joins the states
        change = self.with_states[:, other] - self.with_states[:, one]
        own = self._difference(other, other, one) - self._difference(one, other, one)
        change = change + 0.5 * (own[..., None] * step).reshape(change.shape)
        half = (step[:, None] * change[:, :, None]).reshape(self.states.shape)
        states = self.states + half + half.swapaxes(1, 2)
        known = self.with_targets[:, other] - self.with_targets[:, one]
        answers = self.answers + (step[:, None] * known[:, :, None]).reshape(self.answers.shape)
        loss = self._loss(states, answers)
        if loss >= self.loss - _MARGIN:
            return False
        self.states, self.answers, self.loss = states, answers, loss
        every = self._difference(slice(None), other, one)
        self.with_states += (every[..., None] * step).reshape(self.with_states.shape)
        self.order[first], self.order[second] = other, one
        return True

    def _difference(self, items: int | slice, other: int, one: int) -> np.ndarray:
        """Moments of some items with the difference of two."""
        return self.between[:, items, other] - self.between[:, items, one]


def _check(items: Tensor, labels: Tensor, order: Tensor, ridge: float, num_folds: int, num_components: int) -> None:
    check_order(order)
    if items.ndim != 3 or order.shape != items.shape[1:2] or labels.shape != items.shape[:1]:
        raise ValueError(
            f"items {tuple(items.shape)}, labels {tuple(labels.shape)} and order {tuple(order.shape)} do not fit: "
            "expected [b, n, d], [b] and [n]"
        )
    if not torch.isfinite(items).all():
        raise ValueError("items are not finite")
    if not 2 <= num_folds <= len(items):
        raise ValueError(f"num_folds={num_folds}: expected 2 to {len(items)}, the number of images")
    if ridge <= 0:
        raise ValueError(f"ridge={ridge} is not positive")
    if num_components < 1:
        raise ValueError(f"num_components={num_components} is below 1")


def _standardised(items: np.ndarray, num_components: int) -> np.ndarray:
    """Items less their means, in their leading principal components, of mean variance one."""
    items = items - items.mean(0)
    if items.shape[-1] > num_components:
        flat = items.reshape(-1, items.shape[-1])
        _, vectors = np.linalg.eigh(flat.T @ flat)
        items = items @ vectors[:, : -num_components - 1 : -1]
    return items / (np.sqrt((items**2).mean()) or 1.0)
