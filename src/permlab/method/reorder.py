"""A Plackett-Luce law over orders, learned by REINFORCE from the model's reward."""

import math
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor, nn

from permlab.method.base import MAX_SCORE, Method, falling_scores
from permlab.ops import plackett_luce
from permlab.option import AddedLater, Fraction, PositiveFloat, PositiveInt, Rate, SharesOne, Temperature, Where
from permlab.permutation import PermutationSample, Site, invert

NUM_DRAWS = 64  # the statistics of a law are those of so many orders, drawn alike every time


class Reorder(Method):
    """Draws orders from a Plackett-Luce law whose logits REINFORCE improves.

    In the active phase an order is filled slot by slot, each time with one of the items left,
    with probabilities softmax(logits / temperature). `advantage` turns the rewards of a draw
    into what multiplies its `log_prob`. When frozen and in evaluation the order is that of
    falling logits, the most likely one.

    The logits start equally spaced from 0 down to `-spread` along the starting order, counted
    within each group.

    Shapes of a sample, over items `[*b, n, d]` (a batch of one where none are given):
        num_samples 1: order `[n]`, log_prob `[]`; by image `[*b, n]`, `[*b]`.
        num_samples k: order `[k, 1, n]`, log_prob `[k, 1]` (a 1 for each axis of `*b`), so that
        `permute` applies every order to the whole batch; by image `[k, *b, n]`, `[k, *b]`.
    Args:
        site: where the permutation acts.
        temperature: in units of logit; a number or a schedule over the active phase.
        lr: peak learning rate of the logits.
        warmup_fraction: first part of the training steps, with the starting order kept.
        freeze_fraction: last part of the training steps, with the learned order fixed.
        spread: distance between the highest and the lowest logit at the start.
        num_samples: orders drawn in a forward pass.
        granularity: `batch` (one order for all images) or `image` (one each).
        baseline: `leave_one_out` (mean reward of the other draws; needs two) or `ema` (running
            mean of past rewards, started at the first one and shared by all ranks).
        baseline_momentum: weight of the past in `ema`, for each call of `advantage`.
        temperature_in_log_prob: score the law that was drawn from. False scores the law at
            temperature 1 instead, the omission of the published formula and code; the gradient
            is then biased unless the temperature is 1.
        num_temperature_steps: a defect of the released code, which moves its schedule on once an epoch though it
            is made for every step: the number of epochs in the active phase, 30 there. The temperature then stays
            for an equal part of the phase, and moves on by no more than one optimiser step's worth, so that it
            hardly leaves its start. None: it moves on at every step.
        inverse_initial_order: a defect of the released code: logits that begin with the inverse of the starting
            order, which the active phase then jumps to. It shows where the two differ: not for row or column.
        baseline_from_zero: a defect of the released code: `ema` begins at 0, not at the first reward, so that
            advantages have the sign of the rewards until it has caught up.
    Raises:
        ValueError: for `leave_one_out` with one sample, or if the fractions exceed 1.
    Source: Kutscher et al. 2025, arXiv:2505.23751; leave-one-out: Kool et al. 2019,
        "Buy 4 REINFORCE samples, get a baseline for free".
    Differs from source: the released code's defects are options, off by default; the rest are options too.
    Cost: O(n log n) for each order.
    Example:
        >>> site = Site(name="patches", order=torch.tensor([2, 0, 1]))
        >>> options = dict(lr=0.02, warmup_fraction=0.0, freeze_fraction=0.3, spread=1.0, num_samples=4)
        >>> law = dict(baseline="leave_one_out", baseline_momentum=0.99, temperature_in_log_prob=True)
        >>> method = Reorder(site, temperature=0.3, granularity="batch", **options, **law)
        >>> method().order.shape, method.best()
        (torch.Size([4, 1, 3]), tensor([2, 0, 1]))
    """

    baseline: Tensor
    baseline_started: Tensor

    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "baseline_momentum": ("baseline", ["leave_one_out"]),
        "baseline_from_zero": ("baseline", ["leave_one_out"]),
    }

    def __init__(
        self,
        site: Site,
        *,
        temperature: Temperature,
        lr: Rate,
        warmup_fraction: Fraction,
        freeze_fraction: Annotated[Fraction, SharesOne("warmup_fraction")],
        spread: PositiveFloat,
        num_samples: Annotated[PositiveInt, Where("baseline", "leave_one_out", at_least=2)],
        granularity: Literal["batch", "image"],
        baseline: Literal["ema", "leave_one_out"],
        baseline_momentum: Fraction,
        temperature_in_log_prob: bool,
        num_temperature_steps: Annotated[PositiveInt | None, AddedLater(None)] = None,
        inverse_initial_order: Annotated[bool, AddedLater(False)] = False,
        baseline_from_zero: Annotated[bool, AddedLater(False)] = False,
    ) -> None:
        super().__init__(
            site, temperature=temperature, lr=lr, warmup_fraction=warmup_fraction, freeze_fraction=freeze_fraction
        )
        if baseline == "leave_one_out" and num_samples < 2:
            raise ValueError(f"num_samples={num_samples}: baseline=leave_one_out needs at least 2")
        self.num_samples = num_samples
        self.granularity = granularity
        self.leave_one_out = baseline == "leave_one_out"
        self.baseline_momentum = baseline_momentum
        self.temperature_in_log_prob = temperature_in_log_prob
        self.num_temperature_steps = num_temperature_steps
        first = replace(site, order=invert(site.order)) if inverse_initial_order else site
        self.logits = nn.Parameter(falling_scores(first, 0.0, -spread))
        self.register_buffer("baseline", torch.zeros((), device=site.order.device))
        self.register_buffer("baseline_started", torch.tensor(baseline_from_zero, device=site.order.device))

    def sample(self, items: Tensor | None, generator: torch.Generator | None) -> PermutationSample:
        logits = self._block_logits(*self._sample_axes(items))
        order = self._draw(logits, generator)
        temperature = self.temperature if self.temperature_in_log_prob else 1.0
        log_prob = plackett_luce.log_prob(logits, order, temperature=temperature).sum(-1)
        return PermutationSample(
            order=self.merge_orders(order), soft=None, log_prob=log_prob, estimator="score_function"
        )

    def best(self, items: Float[Tensor, "*b n d"] | None = None) -> Int64[Tensor, "*c n"]:
        # The logits have not moved in warm-up, but need not give the order that is kept in it.
        return self.start_order if self.phase == "warmup" else self.sort_by_score(self.logits.detach())

    def scores(self, items: Float[Tensor, "*b n d"] | None = None) -> Tensor | None:
        return self.logits

    @torch.no_grad()
    def soft_matrix(self, items: Float[Tensor, "*b n d"] | None = None) -> Float[Tensor, "*c n n"] | None:
        """How often each item is in each slot, over a fixed set of `NUM_DRAWS` draws."""
        order = self.merge_orders(self._fixed_draws())
        share = torch.full_like(order.T, 1 / NUM_DRAWS, dtype=self.logits.dtype)
        return share.new_zeros(self.num_items, self.num_items).scatter_add_(1, order.T, share)

    @torch.no_grad()
    def entropy(self, items: Tensor | None = None) -> Tensor:
        """Entropy of the law over its maximum, log m! for each group: 0 for one order, 1 for uniform.

        The mean of -log_prob over a fixed set of `NUM_DRAWS` draws, always of the law that is
        drawn from, temperature included.
        """
        if self.group_size == 1:
            return torch.zeros_like(self.baseline)
        logits = self._block_logits(NUM_DRAWS)
        log_prob = plackett_luce.log_prob(logits, self._fixed_draws(), temperature=self.temperature)
        return -log_prob.mean() / math.lgamma(self.group_size + 1)

    @torch.no_grad()
    def advantage(self, reward: Float[Tensor, "*b"]) -> Float[Tensor, "*c"]:
        """Reward minus baseline, without gradient; with `ema`, the reward then enters the baseline.

        Args:
            reward: of each image under each order, `[*b]` for one sample and `[k, *b]` for k.
        Returns:
            In the shape of `log_prob`; rewards of a batch that shares an order are averaged.
        Raises:
            ValueError: if the first axis of the reward is not that of the samples.
        """
        if self.num_samples > 1 and (reward.ndim == 0 or reward.shape[0] != self.num_samples):
            raise ValueError(f"a reward of shape {tuple(reward.shape)} does not fit {self.num_samples} samples")
        reward = reward.to(self.baseline.dtype)
        if self.granularity == "batch":
            samples = (self.num_samples, *[1] * (reward.ndim - 1)) if self.num_samples > 1 else ()
            reward = reward.reshape(self.num_samples, -1).mean(-1).reshape(samples)
        if self.leave_one_out:
            return reward - (reward.sum(0) - reward) / (self.num_samples - 1)
        return reward - self._follow(_mean_over_ranks(reward.mean()))

    def _follow(self, reward: Tensor) -> Tensor:
        """The baseline before this reward (the reward itself if it is the first), then move it on.

        A reward that is not finite belongs to a step that is not made, and leaves it where it was.
        """
        before = torch.where(self.baseline_started, self.baseline, reward)
        after = self.baseline_momentum * before + (1 - self.baseline_momentum) * reward
        counts = reward.isfinite()
        self.baseline.copy_(torch.where(counts, after, self.baseline))
        self.baseline_started.logical_or_(counts)
        return before

    def _progress(self, step: int, num_steps: int) -> float:
        if self.num_temperature_steps is not None:
            step = min(step, step * self.num_temperature_steps // max(1, num_steps), self.num_temperature_steps - 1)
        return super()._progress(step, num_steps)

    def _sample_axes(self, items: Tensor | None) -> list[int]:
        batch = [1] if items is None else list(items.shape[:-2])
        if self.granularity == "batch":
            batch = [1] * len(batch) if self.num_samples > 1 else []
        return [self.num_samples, *batch] if self.num_samples > 1 else batch

    def _block_logits(self, *axes: int) -> Float[Tensor, "*b g m"]:
        logits = self.split_scores(self.logits.clamp(-MAX_SCORE, MAX_SCORE))
        return logits.expand(*axes, *logits.shape)

    def _draw(self, logits: Float[Tensor, "*b g m"], generator: torch.Generator | None) -> Int64[Tensor, "*b g m"]:
        return plackett_luce.sample(logits.detach(), temperature=self.temperature, generator=generator)

    def _fixed_draws(self) -> Int64[Tensor, "s g m"]:
        generator = torch.Generator(self.logits.device).manual_seed(0)
        return self._draw(self._block_logits(NUM_DRAWS), generator)


def _mean_over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value
