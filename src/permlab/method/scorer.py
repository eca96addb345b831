"""A score per item, and what methods that order items by score have in common."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from permlab.method.base import MAX_SCORE, Method, falling_scores
from permlab.permutation import PermutationSample, Site


class Scorer(nn.Module):
    """One score per item; the highest score of a group goes to its first slot.

    It starts exactly at the site's starting order: item `order[i]` has the `i`-th of equally
    spaced scores from 1 down to -1 (counted within its group). `vector` learns these numbers
    themselves, one order for all inputs. `linear` and `mlp` keep them and add a network of the
    item's features whose last layer starts at zero, so the order may depend on the image.

    With `start=zero` a network alone gives the scores, from its own random start: they do not depend on where
    an item comes, as those of something that sorts must not.

    Shapes:
        n: items.  d: features of an item.  m: items of a group.
    Args:
        site: where the permutation acts.
        kind: `vector`, `linear` or `mlp` (one hidden layer, GELU).
        width: hidden units of `mlp`; without effect on the other two.
        start: `order` or `zero`.
    Raises:
        ValueError: if the scores are to depend on features and the site has none, or a vector is to start at zero,
            where all its gradients are the same.
    Cost: O(n) for `vector`, O(n d) for `linear`, O(n d width) for `mlp`, per input.
    Example:
        >>> Scorer(Site(name="patches", order=torch.tensor([2, 0, 1])), kind="vector", width=1)().tolist()
        [0.0, -1.0, 1.0]
    """

    start: Tensor

    def __init__(
        self,
        site: Site,
        *,
        kind: Literal["vector", "linear", "mlp"],
        width: int,
        start: Literal["order", "zero"] = "order",
    ) -> None:
        super().__init__()
        if start == "zero" and kind == "vector":
            raise ValueError("start=zero: scorer=vector would tie all items; expected scorer=linear or mlp")
        falling = falling_scores(site, 1.0, -1.0)
        self.kind = kind
        self.num_features = site.num_features
        if kind == "vector":
            self.vector = nn.Parameter(falling)
            return
        if site.num_features is None:
            raise ValueError(f"scorer={kind} reads item features, but site {site.name} has num_features=None")
        self.register_buffer("start", falling if start == "order" else torch.zeros_like(falling), persistent=False)
        # No bias: adding one number to all scores changes no order.
        last = nn.Linear(site.num_features if kind == "linear" else width, 1, bias=False)
        if start == "order":
            nn.init.zeros_(last.weight)
        hidden = [] if kind == "linear" else [nn.Linear(site.num_features, width), nn.GELU()]
        self.network = nn.Sequential(*hidden, last)

    def forward(self, items: Float[Tensor, "*b n d"] | None = None) -> Float[Tensor, "*c n"]:
        """Scores `[n]`, or `[*b, n]` where they depend on the items; bounded by `MAX_SCORE`."""
        if self.kind == "vector":
            return self.vector.clamp(-MAX_SCORE, MAX_SCORE)
        if items is None or items.shape[-1] != self.num_features:
            given = None if items is None else items.shape[-1]
            raise ValueError(f"scorer={self.kind} needs items of {self.num_features} features, got {given}")
        offset = self.network(items.to(self.start.dtype)).squeeze(-1)
        return (self.start + offset).clamp(-MAX_SCORE, MAX_SCORE)


class ScoreMethod(Method):
    """A method that sorts items by falling score, with a differentiable relaxation of the sort.

    The order always comes from sorting, never from the largest entry of each row of the
    relaxation, which is no permutation where scores tie; ties keep the starting order.
    Subclasses define `relax`.

    Args:
        site, temperature, lr, warmup_fraction, freeze_fraction: as in `Method`.
        estimator: `relaxed` or `straight_through`.
        scorer, width, start: where the scores come from; see `Scorer`.
    """

    def __init__(
        self,
        site: Site,
        *,
        temperature: float | Mapping[str, Any],
        lr: float,
        warmup_fraction: float,
        freeze_fraction: float,
        estimator: Literal["relaxed", "straight_through"],
        scorer: Literal["vector", "linear", "mlp"],
        width: int,
        start: Literal["order", "zero"] = "order",
    ) -> None:
        super().__init__(
            site, temperature=temperature, lr=lr, warmup_fraction=warmup_fraction, freeze_fraction=freeze_fraction
        )
        self.estimator: Literal["relaxed", "straight_through"] = estimator
        self.scorer = Scorer(site, kind=scorer, width=width, start=start)
        self.needs_items = scorer != "vector"

    def relax(self, scores: Float[Tensor, "*b g m"]) -> Float[Tensor, "*b g m m"]:
        """Relaxed sorting matrix of each group, at the present temperature."""
        raise NotImplementedError(f"{type(self).__name__} defines no relax")

    def sample(self, items: Tensor | None, generator: torch.Generator | None) -> PermutationSample:
        scores = self.scorer(items)
        order = self.sort_by_score(scores.detach())
        soft = self.merge_matrices(self.relax(self.split_scores(scores)))
        return PermutationSample(order=order, soft=soft, log_prob=None, estimator=self.estimator)

    def best(self, items: Float[Tensor, "*b n d"] | None = None) -> Int64[Tensor, "*c n"]:
        return self.sort_by_score(self.scorer(items).detach())

    def scores(self, items: Float[Tensor, "*b n d"] | None = None) -> Tensor | None:
        return self.scorer(items)

    def soft_matrix(self, items: Float[Tensor, "*b n d"] | None = None) -> Float[Tensor, "*c n n"] | None:
        return self.merge_matrices(self.relax(self.split_scores(self.scorer(items))))
