"""What every method has in common: phases, temperature, groups, and the statistics that are logged."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from permlab.method.training_items import TrainingItems
from permlab.ops.distance import displacement, kendall
from permlab.ops.schedule import parse
from permlab.permutation import PermutationSample, Site
from permlab.sparsity.search_inputs import SearchInputs

Phase = Literal["warmup", "active", "frozen"]

# Far beyond any score in use; over the lowest temperature of a schedule it is far from overflow.
MAX_SCORE = 1e4


def falling_scores(site: Site, first: float, last: float) -> Float[Tensor, " n"]:
    """Score per item, equally spaced from `first` down to `last` along the starting order of each group.

    Sorting them in descending order gives the starting order back (not its inverse).

    Example:
        >>> falling_scores(Site(name="patches", order=torch.tensor([2, 0, 1])), 1.0, -1.0)
        tensor([ 0., -1.,  1.])
    """
    size = site.num_items // site.num_groups
    falling = torch.linspace(first, last, size, device=site.order.device).repeat(site.num_groups)
    return torch.empty_like(falling).scatter_(0, site.order, falling)


class Method(nn.Module):
    """Produces a permutation for one site.

    Training runs through three phases: `warmup` (the starting order), `active` (the method
    samples and learns while its temperature follows the schedule) and `frozen` (the learned
    order, hard and deterministic, while the rest of the model adapts to it). In evaluation
    mode and when frozen, the forward pass gives the order of `best`.

    Phase and temperature are functions of the optimiser step, set by `advance`; they are no
    state, so a resumed run needs none of it.

    Subclasses implement `sample` and `best`, `scores`, `soft_matrix`, `search` and `prepare` where they
    have them, and `advantage` where their samples have a `log_prob`. Their constructor's keyword-only
    arguments are their options.

    Args:
        site: where the permutation acts.
        temperature: a number, or a schedule over the active phase; see `permlab.ops.schedule`.
        lr: peak learning rate of the method's parameters.
        warmup_fraction: part of the training steps during which the starting order is kept.
        freeze_fraction: last part of the training steps, with the learned order fixed.
    Raises:
        ValueError: if the two fractions exceed 1 together, or the temperature is no schedule.
    """

    start_order: Tensor
    # A method may permute `items` of the input and channels of `weights`, and be one for tasks that permute
    # `nothing`. A literal, read without importing the file.
    permutes: ClassVar[tuple[str, ...]] = ("items", "weights")
    # A preset without a file of its own in `conf/tuned/` takes `<task>_<tuned_as>.yaml` where there is one. A literal.
    tuned_as: ClassVar[str | None] = None
    # A task may try this many sets of swaps after training; it keeps each that lowers its calibration loss.
    num_polish_steps: int = 0
    # A task may make this many steps of a descent by swaps before that, the first of them in this part of the blocks.
    num_descent_steps: int = 0
    swap_share: float = 0.0
    # The option, and its values, under which `needs_items` is true. A literal.
    reads_items: ClassVar[tuple[str, tuple[str, ...]] | None] = None
    # True where order and scores depend on the items of the input; such a run has no single learned order.
    needs_items: bool = False

    def __init__(
        self,
        site: Site,
        *,
        temperature: float | Mapping[str, Any] = 1.0,
        lr: float = 0.0,
        warmup_fraction: float = 0.0,
        freeze_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        if warmup_fraction + freeze_fraction > 1:
            raise ValueError(f"warmup_fraction {warmup_fraction} + freeze_fraction {freeze_fraction} exceeds 1")
        self.site = site
        self.lr = lr
        self.warmup_fraction, self.freeze_fraction = warmup_fraction, freeze_fraction
        self.schedule = parse(temperature)
        self.phase: Phase = "active"
        self.temperature = self.schedule.at(0.0)
        self.register_buffer("start_order", site.order.clone(), persistent=False)

    @property
    def num_items(self) -> int:
        return self.site.num_items

    @property
    def group_size(self) -> int:
        return self.site.num_items // self.site.num_groups

    @property
    def base_order(self) -> Int64[Tensor, " n"]:
        """What training begins with and warm-up keeps: the starting order, unless `prepare` has found another."""
        return self.start_order

    def advance(self, step: int, num_steps: int) -> None:
        """Set phase and temperature for an optimiser step (counted from 0) of `num_steps`.

        The schedule runs over the active phase: its start falls on the first active step, its
        end on the last.

        Raises:
            ValueError: if there are no steps, or the step is negative.
        """
        if num_steps < 1 or step < 0:
            raise ValueError(f"step {step} of {num_steps}: expected step >= 0 and at least one step")
        begin = round(self.warmup_fraction * num_steps)
        end = num_steps - round(self.freeze_fraction * num_steps)
        self.phase = "warmup" if step < begin else "frozen" if step >= end else "active"
        self.temperature = self.schedule.at(min(max(self._progress(step - begin, end - begin), 0.0), 1.0))

    def _progress(self, step: int, num_steps: int) -> float:
        """Of the temperature's schedule at a step of the active phase, which has so many; beyond 0 to 1 outside it."""
        return step / max(1, num_steps - 1)

    def forward(
        self, items: Float[Tensor, "*b n d"] | None = None, *, generator: torch.Generator | None = None
    ) -> PermutationSample:
        """Sample a permutation; items are needed only where the order depends on them."""
        if self.training and self.phase == "active":
            return self.sample(items, generator)
        warm = self.training and self.phase == "warmup"
        with torch.no_grad():
            order = self.base_order if warm else self.best(items)
        return PermutationSample(order=order, soft=None, log_prob=None, estimator="none")

    def sample(self, items: Tensor | None, generator: torch.Generator | None) -> PermutationSample:
        """One draw in the active phase."""
        raise NotImplementedError(f"{type(self).__name__} defines no sample")

    def best(self, items: Float[Tensor, "*b n d"] | None = None) -> Int64[Tensor, "*c n"]:
        """The deterministic order used for evaluation."""
        raise NotImplementedError(f"{type(self).__name__} defines no best")

    @torch.no_grad()
    def orders(self) -> dict[str, Int64[Tensor, " n"]]:
        """The deterministic order by name of its site; none where every input has an order of its own."""
        return {} if self.needs_items else {self.site.name: self.best()}

    def search(self, inputs: SearchInputs) -> Int64[Tensor, " n"] | None:
        """An order found without training, to start from or to keep; None where the method does not search.

        Args:
            inputs: what is known of the layers at the site.
        """
        return None

    def prepare(self, training: TrainingItems) -> None:
        """What a method of items does before training, such as a search that changes what `best` gives; nothing here.

        It is done again when a run is resumed, before the state is restored.

        Args:
            training: items of the training images, which are read if they are asked for.
        """

    def scores(self, items: Float[Tensor, "*b n d"] | None = None) -> Tensor | None:
        """Scores that orders come from: `[*c, n]`, or `[g, m, m]` for g groups of m; None where there are none."""
        return None

    def soft_matrix(self, items: Float[Tensor, "*b n d"] | None = None) -> Float[Tensor, "*c n n"] | None:
        """A relaxation at the present temperature, free of chance; None where there is none.

        Entropy and pictures are made of it, and a task reads from it what its relaxed loss is without noise.
        """
        return None

    def entropy(self, items: Tensor | None = None) -> Tensor:
        """How undecided the method is: 0 for one order, 1 for a uniform law; mean over rows and batch.

        For a relaxation, the mean row entropy of the soft matrix over log m, m the group size; 0 where there
        is none.
        """
        soft = self.soft_matrix(items)
        if soft is None or self.group_size == 1:
            return torch.zeros((), device=self.start_order.device)
        return torch.special.entr(soft.float()).sum(-1).mean() / math.log(self.group_size)

    def advantage(self, reward: Float[Tensor, "*b"]) -> Float[Tensor, "*c"]:
        """Reward minus baseline, in the shape of `log_prob`; only methods whose samples have one define it."""
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    @torch.no_grad()
    def statistics(self, items: Tensor | None = None) -> dict[str, Tensor]:
        """Entropy, temperature, and how far the best order is from the start (mean over a batch of orders)."""
        order = self.best(items)
        return {
            "entropy": self.entropy(items),
            "temperature": torch.tensor(self.temperature),
            "kendall": kendall(order, self.start_order).mean(),
            "displacement": displacement(order, self.start_order).mean(),
        }

    # Groups: subclasses work on blocks [*b, g, m], g groups of m items; these take apart and put together.

    def split_scores(self, scores: Float[Tensor, "*b n"]) -> Float[Tensor, "*b g m"]:
        """Scores by group."""
        return scores.unflatten(-1, (self.site.num_groups, self.group_size))

    def sort_by_score(self, scores: Float[Tensor, "*b n"]) -> Int64[Tensor, "*b n"]:
        """Order of falling score within each group; ties keep the starting order."""
        blocks = self.split_scores(scores[..., self.start_order])
        places = self.merge_orders(blocks.argsort(dim=-1, descending=True, stable=True))
        return self.start_order[places]

    def split_order(self, order: Int64[Tensor, "*b n"]) -> Int64[Tensor, "*b g m"]:
        """One order per group, each counted within its group; inverse of `merge_orders`."""
        blocks = order.unflatten(-1, (self.site.num_groups, self.group_size))
        return blocks % self.group_size

    def merge_orders(self, blocks: Int64[Tensor, "*b g m"]) -> Int64[Tensor, "*b n"]:
        """Order over all items from one order per group, each counted within its group."""
        offset = torch.arange(blocks.shape[-2], device=blocks.device).unsqueeze(-1) * blocks.shape[-1]
        return (blocks + offset).flatten(-2)

    def merge_matrices(self, blocks: Float[Tensor, "*b g m m"]) -> Float[Tensor, "*b n n"]:
        """Block-diagonal matrix over all items from one matrix per group."""
        num_groups, size = blocks.shape[-3], blocks.shape[-1]
        if num_groups == 1:
            return blocks.squeeze(-3)
        eye = torch.eye(num_groups, dtype=blocks.dtype, device=blocks.device)
        spread = blocks.unsqueeze(-2) * eye[:, None, :, None]
        return spread.reshape(*blocks.shape[:-3], num_groups * size, num_groups * size)
