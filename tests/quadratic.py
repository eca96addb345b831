"""A loss of orders that is cheap and has a known best: the pruned weights' distance from targets of theirs."""

import torch
from torch import Tensor

from permlab.ops.nm import nm_mask
from permlab.sparsity.polish import Swappable

Orders = dict[str, Tensor]


def mask_of(order: Tensor, scores: Tensor, n: int, m: int) -> Tensor:
    """Channels before rows, in original order; by the mask of the public functions."""
    keep = nm_mask(scores[order].mT.contiguous(), n=n, m=m).mT
    mask = torch.zeros_like(scores)
    mask[order] = keep.to(scores.dtype)
    return mask


class Quadratic:
    """Squared distance of the pruned weights from targets of theirs, with all orders that it was asked about."""

    def __init__(self, sites: dict[str, Swappable], targets: dict[str, Tensor], n: int = 2, m: int = 4) -> None:
        self.sites, self.targets, self.n, self.m = sites, targets, n, m
        self.asked: list[Orders] = []

    def mask(self, name: str, order: Tensor) -> Tensor:
        return mask_of(order, self.sites[name].scores, self.n, self.m)

    def __call__(self, orders: Orders) -> tuple[float, dict[str, Tensor]]:
        self.asked.append({name: order.clone() for name, order in orders.items()})
        difference = {
            name: self.sites[name].weights * self.mask(name, orders[name]) - target
            for name, target in self.targets.items()
        }
        return sum(float(d.square().sum()) for d in difference.values()), {n: 2 * d for n, d in difference.items()}


def quadratic_sites(seed: int = 0, *, num_groups: int = 1) -> tuple[dict[str, Swappable], Orders, Quadratic]:
    """Two sites whose targets are what they are pruned to under hidden orders that respect the groups."""
    generator = torch.Generator().manual_seed(seed)
    sites, targets, start = {}, {}, {}
    for name, size in (("a", 16), ("b", 24)):
        weights, scores = torch.rand(2, size, 5, generator=generator).double()
        width = size // num_groups
        hidden = torch.cat([g * width + torch.randperm(width, generator=generator) for g in range(num_groups)])
        sites[name] = Swappable(weights, scores, num_groups)
        targets[name] = weights * mask_of(hidden, scores, 2, 4)
        start[name] = torch.arange(size)
    return sites, start, Quadratic(sites, targets)
