"""Local search on the loss itself: swaps of channels at all sites, proposed by its gradient, kept if it falls."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from permlab.sparsity.mask import keep_best

Values = dict[str, Float[Tensor, "k r"]]
Orders = dict[str, Int64[Tensor, " k"]]
Swap = tuple[str, int, int]  # site, lower slot, higher slot


@dataclass(frozen=True)
class Swappable:
    """Channels of a site that a swap may exchange.

    Args:
        weights, scores: by item, channels before rows.
        num_groups: equal consecutive blocks of slots between which nothing is exchanged.
    """

    weights: Float[Tensor, "k r"]
    scores: Float[Tensor, "k r"]
    num_groups: int


def polish(
    sites: Mapping[str, Swappable],
    orders: Orders,
    loss_and_gradient: Callable[[Orders], tuple[float, Values]],
    *,
    n: int,
    m: int,
    num_steps: int,
    num_proposals: int = 512,
    seed: int = 0,
) -> tuple[Orders, list[float]]:
    """Improve orders by sets of swaps, each accepted only if the loss falls.

    Every step draws pairs of slots from different blocks of m, predicts from the loss's gradient
    what the change of the two masks would do to the loss, and makes the most promising swaps
    together, no block being touched twice. The set grows by half while it is accepted and
    shrinks to a third when it is not. A single swap that was turned down is not tried again
    before the orders have changed.

    Args:
        sites: by name.
        orders: where to start.
        loss_and_gradient: loss of the model that is pruned under these orders, and its gradient for all
            weights of the sites, pruned ones included.
        n, m: n kept of every m.
        num_steps: evaluations of the loss after the first.
        num_proposals: pairs drawn for each site and step.
        seed: of the pairs.
    Returns:
        Orders whose loss is at most that of the given ones, and the loss after every step.
    Cost: `num_steps + 1` losses with gradients, and O(num_proposals m r) for each site and step.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = {name: order.clone() for name, order in orders.items()}
    loss, gradient = loss_and_gradient(orders)
    losses, size = [loss], 16.0
    refused: set[Swap] = set()
    for _ in range(num_steps):
        proposals = propose_swaps(sites, orders, gradient, n, m, num_proposals, generator)
        chosen = choose_swaps((swap for _, swap in proposals if swap not in refused), m, max(1, round(size)))
        if not chosen:
            break
        trial = {name: order.clone() for name, order in orders.items()}
        for name, first, second in chosen:
            trial[name][[first, second]] = trial[name][[second, first]]
        new_loss, new_gradient = loss_and_gradient(trial)
        if new_loss < loss:
            orders, loss, gradient, size = trial, new_loss, new_gradient, 1.5 * len(chosen)
            refused.clear()
        else:
            size = len(chosen) / 3
            refused.update(chosen if len(chosen) == 1 else ())
        losses.append(loss)
    return orders, losses


def propose_swaps(
    sites: Mapping[str, Swappable],
    orders: Orders,
    gradient: Values,
    n: int,
    m: int,
    num_proposals: int,
    generator: torch.Generator,
) -> list[tuple[float, Swap]]:
    """Predicted change of the loss and the swap, for those that are predicted to lower it, best first.

    Args:
        gradient: of the loss for all weights of the sites, pruned ones included, at these orders.
        num_proposals: pairs drawn for each site.
    """
    proposals: list[tuple[float, Swap]] = []
    for name, site in sites.items():
        first, second = _draw_pairs(len(site.weights), site.num_groups, m, num_proposals, generator)
        if len(first) == 0:
            continue
        order = orders[name]
        gain = predicted_change(
            site.scores[order], (gradient[name] * site.weights)[order], first.to(order), second.to(order), n=n, m=m
        )
        best = gain.cpu().argsort()[:64]
        slots = torch.stack([first, second]).sort(dim=0).values
        kept = [index for index in best.tolist() if gain[index] < 0]
        proposals += [(float(gain[index]), (name, *slots[:, index].tolist())) for index in kept]
    return sorted(proposals)


def _draw_pairs(
    num_slots: int, num_groups: int, m: int, count: int, generator: torch.Generator
) -> tuple[Int64[Tensor, " c"], Int64[Tensor, " c"]]:
    """Slots of the same group but different blocks of m."""
    size = num_slots // num_groups
    first = torch.randint(num_slots, (count,), generator=generator)
    second = first // size * size + torch.randint(size, (count,), generator=generator)
    apart = first // m != second // m
    return first[apart], second[apart]


def predicted_change(
    scores: Float[Tensor, "k r"],
    effect: Float[Tensor, "k r"],
    first: Int64[Tensor, " c"],
    second: Int64[Tensor, " c"],
    *,
    n: int,
    m: int,
) -> Float[Tensor, " c"]:
    """First-order change of the loss when the channels of two slots trade places, for c pairs.

    Args:
        scores: by slot.
        effect: change of the loss, to first order, when a weight is switched on, by slot.
        first, second: slots in different blocks of m.
    """
    slots = torch.arange(m, device=scores.device)
    change = scores.new_zeros(len(first))
    for own, other in ((first, second), (second, first)):
        block = (own // m * m).unsqueeze(-1) + slots
        changed = torch.where(block == own.unsqueeze(-1), other.unsqueeze(-1), block)
        before = effect[block] * keep_best(scores[block], n=n, m=m)
        after = effect[changed] * keep_best(scores[changed], n=n, m=m)
        change += (after.sum((-2, -1)) - before.sum((-2, -1))).to(change.dtype)
    return change


def choose_swaps(proposals: Iterable[Swap], m: int, count: int) -> list[Swap]:
    """The first swaps that touch no block twice."""
    touched: set[tuple[str, int]] = set()
    chosen: list[Swap] = []
    for name, first, second in proposals:
        blocks = {(name, first // m), (name, second // m)}
        if touched & blocks:
            continue
        touched |= blocks
        chosen.append((name, first, second))
        if len(chosen) == count:
            break
    return chosen
