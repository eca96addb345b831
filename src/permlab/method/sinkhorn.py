"""A score per slot and item, made doubly stochastic by Sinkhorn's iteration, with or without noise."""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from permlab.method.base import MAX_SCORE, Method
from permlab.ops.assignment import assign
from permlab.ops.sinkhorn import sinkhorn
from permlab.option import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Temperature
from permlab.permutation import PermutationSample, Site, order_to_matrix


class Sinkhorn(Method):
    """Learns a table of scores, slot by item; the order is its best assignment.

    In the active phase Sinkhorn's iteration turns the table, with `noise` times a Gumbel table
    drawn afresh, into a soft matrix (columns sum to one exactly, rows nearly). `relaxed` mixes
    items by it; `straight_through` gathers by the best assignment of the same noisy table. When
    frozen and in evaluation the order is the best assignment of the table without noise.

    The table starts as `start_scale` times the matrix of the starting order plus a uniform
    `jitter`, drawn from torch's global generator, which is too small to change the assignment.

    Args:
        site: where the permutation acts.
        temperature: in units of score; a number or a schedule over the active phase.
        lr: peak learning rate of the table.
        warmup_fraction: first part of the training steps, with the starting order kept.
        freeze_fraction: last part of the training steps, with the learned order fixed.
        estimator: `relaxed` or `straight_through`.
        num_iters: row-plus-column sweeps.
        noise: scale of the Gumbel noise, in units of score; 0 for none.
        start_scale: score of the starting order's pairs; all others start at 0.
        jitter: half-width of the uniform noise on the starting table.
    Raises:
        ValueError: if the jitter could change the starting order (half of `start_scale` or more),
            or the fractions exceed 1.
    Source: Mena et al. 2018, arXiv:1802.08665.
    Differs from source: noise is scaled apart from the temperature, as in later code; start and
        straight-through variant are not the paper's.
    Cost: O(num_iters n^2) for the soft matrix, and one assignment, O(n^3) at worst, for each
        forward pass, in the active phase and outside of it.
    Example:
        >>> site = Site(name="patches", order=torch.tensor([2, 0, 1]))
        >>> options = dict(lr=0.01, warmup_fraction=0.0, freeze_fraction=0.3, num_iters=20)
        >>> start = dict(noise=0.0, start_scale=1.0, jitter=0.01)
        >>> Sinkhorn(site, temperature=0.3, estimator="straight_through", **options, **start)().order
        tensor([2, 0, 1])
    """

    def __init__(
        self,
        site: Site,
        *,
        temperature: Temperature,
        lr: PositiveFloat,
        warmup_fraction: Fraction,
        freeze_fraction: Fraction,
        estimator: Literal["relaxed", "straight_through"],
        num_iters: PositiveInt,
        noise: NonNegativeFloat,
        start_scale: PositiveFloat,
        jitter: NonNegativeFloat,
    ) -> None:
        super().__init__(
            site, temperature=temperature, lr=lr, warmup_fraction=warmup_fraction, freeze_fraction=freeze_fraction
        )
        if jitter >= start_scale / 2:
            raise ValueError(f"jitter {jitter} could change the starting order: keep it below start_scale / 2")
        self.estimator: Literal["relaxed", "straight_through"] = estimator
        self.num_iters = num_iters
        self.noise = noise
        start = order_to_matrix(self.split_order(site.order))
        uniform = 2 * torch.rand(start.shape) - 1
        # Jitter belongs to the places of the starting order, not to item numbers: relabelling
        # the items of a site relabels its table and nothing else.
        self.table = nn.Parameter(start_scale * start + (jitter * uniform.to(start.device)) @ start)

    def sample(self, items: Tensor | None, generator: torch.Generator | None) -> PermutationSample:
        table = self._bounded_table()
        if self.noise > 0:
            table = table + self.noise * _gumbel_like(table, generator)
        return PermutationSample(
            order=self._assign(table), soft=self._relax(table), log_prob=None, estimator=self.estimator
        )

    def best(self, items: Float[Tensor, "*b n d"] | None = None) -> Int64[Tensor, "*c n"]:
        return self._assign(self._bounded_table())

    def scores(self, items: Float[Tensor, "*b n d"] | None = None) -> Tensor | None:
        return self.table

    def soft_matrix(self, items: Float[Tensor, "*b n d"] | None = None) -> Float[Tensor, "*c n n"] | None:
        return self._relax(self._bounded_table())

    def _bounded_table(self) -> Float[Tensor, "g m m"]:
        return self.table.clamp(-MAX_SCORE, MAX_SCORE)

    def _assign(self, table: Float[Tensor, "g m m"]) -> Int64[Tensor, " n"]:
        return self.merge_orders(assign(table.detach()))

    def _relax(self, table: Float[Tensor, "g m m"]) -> Float[Tensor, "n n"]:
        return self.merge_matrices(sinkhorn(table, temperature=self.temperature, num_iters=self.num_iters))


def _gumbel_like(table: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise: minus the logarithm of an exponential variable, kept off zero."""
    waiting = torch.empty_like(table, requires_grad=False).exponential_(generator=generator)
    return -waiting.clamp_min(torch.finfo(table.dtype).tiny).log()
