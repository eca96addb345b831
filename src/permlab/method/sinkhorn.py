"""A score per slot and item, made doubly stochastic by Sinkhorn's iteration, with or without noise."""

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from permlab.method.base import MAX_SCORE, Method
from permlab.ops.assignment import assign
from permlab.ops.sinkhorn import sinkhorn
from permlab.option import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Rate, SharesOne, Temperature
from permlab.permutation import PermutationSample, Site, order_to_matrix


class Sinkhorn(Method):
    """Learns a score for every slot and item; the order is the best assignment of these.

    In the active phase Sinkhorn's iteration turns the table, with `noise` times a Gumbel table
    drawn afresh, into a soft matrix (columns sum to one exactly, rows nearly). `relaxed` mixes
    items by it; `straight_through` gathers by the best assignment of the same noisy table. When
    frozen and in evaluation the order is the best assignment of the table without noise.

    With `start=order` the table starts as `start_scale` times the matrix of the starting order
    plus a uniform `jitter`, drawn from torch's global generator, which is too small to change the
    assignment. `random` starts uniform within `start_scale`, and `zero` at the jitter alone: neither
    starts at the starting order.

    With `cost=network` the table stays at its start, and a small network of each item's features
    adds to it: the product of a learned vector per slot with the network's output for the item.
    The order then depends on the items, and the number of parameters no longer on n squared.

    Args:
        site: where the permutation acts.
        temperature: in units of score; a number or a schedule over the active phase.
        lr: peak learning rate of the table or the network.
        warmup_fraction: first part of the training steps, with the starting order kept.
        freeze_fraction: last part of the training steps, with the learned order fixed.
        estimator: `relaxed` or `straight_through`.
        num_iters: row-plus-column sweeps.
        noise: scale of the Gumbel noise, in units of score; 0 for none.
        start: `order`, `zero` or `random`.
        start_scale: score of the starting order's pairs, all others being 0; half-width of `random`.
            Without effect on `zero`.
        jitter: half-width of the uniform noise on the starting table; without effect on `random`.
        cost: `table` (a score per slot and item) or `network` (scores from the items' features).
        width: hidden units and output features of `cost=network`.
    Raises:
        ValueError: if the jitter could change the starting order (half of `start_scale` or more),
            the network needs features that the site has not, or the fractions exceed 1.
    Source: Mena et al. 2018, arXiv:1802.08665.
    Differs from source: noise is scaled apart from the temperature, as in later code; start and
        straight-through variant are not the paper's.
    Cost: O(num_iters n^2) for the soft matrix, and one assignment, O(n^3) at worst, for each
        forward pass, in the active phase and outside of it.
    Example:
        >>> site = Site(name="patches", order=torch.tensor([2, 0, 1]))
        >>> options = dict(lr=0.01, warmup_fraction=0.0, freeze_fraction=0.3, num_iters=20)
        >>> start = dict(noise=0.0, start="order", start_scale=1.0, jitter=0.01, cost="table", width=1)
        >>> Sinkhorn(site, temperature=0.3, estimator="straight_through", **options, **start)().order
        tensor([2, 0, 1])
    """

    tuned_as: ClassVar[str] = "sinkhorn"
    reads_items: ClassVar[tuple[str, tuple[str, ...]] | None] = ("cost", ("network",))

    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "width": ("cost", ["table"]),
        "jitter": ("start", ["random"]),
        "start_scale": ("start", ["zero"]),
    }

    def __init__(
        self,
        site: Site,
        *,
        temperature: Temperature,
        lr: Rate,
        warmup_fraction: Fraction,
        freeze_fraction: Annotated[Fraction, SharesOne("warmup_fraction")],
        estimator: Literal["relaxed", "straight_through"],
        num_iters: PositiveInt,
        noise: NonNegativeFloat,
        start: Literal["order", "zero", "random"],
        start_scale: PositiveFloat,
        jitter: NonNegativeFloat,
        cost: Literal["table", "network"],
        width: PositiveInt,
    ) -> None:
        super().__init__(
            site, temperature=temperature, lr=lr, warmup_fraction=warmup_fraction, freeze_fraction=freeze_fraction
        )
        if start == "order" and jitter >= start_scale / 2:
            raise ValueError(f"jitter {jitter} could change the starting order: keep it below start_scale / 2")
        self.estimator: Literal["relaxed", "straight_through"] = estimator
        self.num_iters = num_iters
        self.noise = noise
        self.needs_items = cost == "network"
        table = self._start(start, start_scale, jitter)
        self.network: CostNetwork | None = None
        if cost == "table":
            self.table: Tensor = nn.Parameter(table)
        else:
            self.register_buffer("table", table)
            self.network = CostNetwork(site, width=width)

    def _start(self, start: str, scale: float, jitter: float) -> Float[Tensor, "g m m"]:
        matrix = order_to_matrix(self.split_order(self.site.order))
        uniform = (2 * torch.rand(matrix.shape) - 1).to(matrix.device)
        # Noise belongs to the places of the starting order, not to item numbers: relabelling
        # the items of a site relabels its table and nothing else.
        noise = uniform @ matrix
        return {"order": scale * matrix + jitter * noise, "zero": jitter * noise, "random": scale * noise}[start]

    def sample(self, items: Tensor | None, generator: torch.Generator | None) -> PermutationSample:
        table = self._scores(items)
        if self.noise > 0:
            table = table + self.noise * _gumbel_like(table, generator)
        return PermutationSample(
            order=self._assign(table), soft=self._relax(table), log_prob=None, estimator=self.estimator
        )

    def best(self, items: Float[Tensor, "*b n d"] | None = None) -> Int64[Tensor, "*c n"]:
        return self._assign(self._scores(items))

    def scores(self, items: Float[Tensor, "*b n d"] | None = None) -> Tensor | None:
        scores = self._scores(items)
        return scores if scores.ndim == 3 else scores.flatten(0, -4).mean(0)

    def soft_matrix(self, items: Float[Tensor, "*b n d"] | None = None) -> Float[Tensor, "*c n n"] | None:
        return self._relax(self._scores(items))

    def _scores(self, items: Tensor | None) -> Float[Tensor, "*b g m m"]:
        scores = self.table if self.network is None else self.table + self.network(items)
        return scores.clamp(-MAX_SCORE, MAX_SCORE)

    def _assign(self, table: Float[Tensor, "*b g m m"]) -> Int64[Tensor, "*b n"]:
        # NaN is for the task to see and name, in the soft matrix or the loss, not for the assignment to raise at.
        return self.merge_orders(assign(table.detach().nan_to_num(nan=-MAX_SCORE)))

    def _relax(self, table: Float[Tensor, "*b g m m"]) -> Float[Tensor, "*b n n"]:
        return self.merge_matrices(sinkhorn(table, temperature=self.temperature, num_iters=self.num_iters))


class CostNetwork(nn.Module):
    """Scores of slots and items from the items' features: a vector per slot times a network's output per item.

    The network's last layer starts at zero, and so do all scores. Slots of different groups have
    vectors of their own.

    Shapes:
        n: items.  d: features of an item.  g, m: groups, and items of a group.
    Args:
        site: where the permutation acts.
        width: hidden units, and length of a slot's vector.
    Raises:
        ValueError: if the site's items have no features.
    Cost: O(n (d + m) width) time for each input.
    """

    def __init__(self, site: Site, *, width: int) -> None:
        super().__init__()
        if site.num_features is None:
            raise ValueError(f"cost=network reads item features, but site {site.name} has num_features=None")
        self.num_groups, self.num_features = site.num_groups, site.num_features
        size = site.num_items // site.num_groups
        self.slots = nn.Parameter(torch.randn(site.num_groups, size, width, device=site.order.device) / width**0.5)
        last = nn.Linear(width, width, bias=False)
        nn.init.zeros_(last.weight)
        self.items = nn.Sequential(nn.Linear(site.num_features, width), nn.GELU(), last)

    def forward(self, items: Float[Tensor, "*b n d"] | None) -> Float[Tensor, "*b g m m"]:
        if items is None or items.shape[-1] != self.num_features:
            given = None if items is None else items.shape[-1]
            raise ValueError(f"cost=network needs items of {self.num_features} features, got {given}")
        vectors = self.items(items.to(self.slots.dtype)).unflatten(-2, (self.num_groups, -1))
        return self.slots @ vectors.mT


def _gumbel_like(table: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise: minus the logarithm of an exponential variable, kept off zero."""
    waiting = torch.empty_like(table, requires_grad=False).exponential_(generator=generator)
    return -waiting.clamp_min(torch.finfo(table.dtype).tiny).log()
