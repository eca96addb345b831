"""A law over the N:M patterns of every group of m channels: its logits, its soft draws and its likeliest mask."""

import itertools
import math
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Spread of the logits that the strength of a prior multiplies, as in the published code's 7B model.
LOGIT_SPREAD = 0.014


def num_patterns(n: int, m: int) -> int:
    """Choices of n out of m.

    Example:
        >>> num_patterns(2, 4)
        6
    """
    return math.comb(m, n)


@cache
def _pattern_rows(n: int, m: int) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(channel in kept) for channel in range(m)) for kept in itertools.combinations(range(m), n))


def patterns(n: int, m: int) -> Float[Tensor, "p m"]:
    """Every choice of n out of m channels as a row of zeros and ones.

    Shapes:
        p: `num_patterns(n, m)`.
    Example:
        >>> patterns(1, 2)
        tensor([[1., 0.],
                [0., 1.]])
    """
    return torch.tensor(_pattern_rows(n, m))


def prior_logits(keep: Bool[Tensor, "k r"], *, n: int, m: int, strength: float) -> Float[Tensor, "g p r"]:
    """Logits under which the given mask is the likeliest, and others the less the more they differ from it.

    The logit of a pattern is its overlap with the mask, over that of the mean pattern (n^2 / m), times
    `strength` and the spread of the logits.

    Shapes:
        k: slots, in the channel order in force.  r: rows.  g: groups of m slots.  p: patterns.
    Args:
        keep: an n:m mask, n of every m slots.
        n, m: n kept of every m.
        strength: alpha of the source, at least 0; at 0 all patterns are equally likely.
    Returns:
        Logits in float32.
    Source: Fang et al. 2024, arXiv:2409.17481 (MaskLLM), prior of a mask.
    Differs from source: no random logits are added, so that the likeliest mask at the start is the prior's.
    Cost: O(g p m r).
    Example:
        >>> keep = torch.tensor([[True], [False]])
        >>> prior_logits(keep, n=1, m=2, strength=3.0).flatten()
        tensor([ 0.0210, -0.0210])
    """
    groups = keep.unflatten(0, (-1, m)).float()
    overlap = patterns(n, m).to(keep.device) @ groups
    return (overlap - n * n / m) * (strength * LOGIT_SPREAD)


def soft_mask(
    logits: Float[Tensor, "g p r"],
    *,
    n: int,
    m: int,
    scale: float,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[Float[Tensor, "k r"], Float[Tensor, "g p r"]]:
    """A relaxed draw: patterns mixed by the Gumbel softmax of their scaled logits.

    At low temperature it is one pattern, drawn by the law `softmax(scale * logits)`. The scale weighs the
    logits against the noise: the greater, the less is explored.

    Shapes:
        k: slots, g * m.  r: rows.  g: groups.  p: patterns.
    Args:
        logits: receive the gradient.
        n, m: n kept of every m.
        scale: kappa of the source, positive.
        temperature: tau of the source, positive.
        generator: of the noise; None for none.
    Returns:
        Masks with entries between 0 and 1, n in every group, by slot; and the weights of the patterns.
    Source: Fang et al. 2024, arXiv:2409.17481 (MaskLLM), differentiable sampling of masks.
    Differs from source: Nothing.
    Cost: O(g p m r); for the gradient, the weights of the patterns are kept.
    Example:
        >>> logits = torch.tensor([[[0.1], [-0.1]]])
        >>> soft_mask(logits, n=1, m=2, scale=10.0, temperature=0.01, generator=None)[0].flatten()
        tensor([1., 0.])
    """
    scaled = logits * scale
    if generator is not None:
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        scaled = scaled - noise
    weights = (scaled / temperature).softmax(1)
    mask = patterns(n, m).to(weights).mT @ weights
    return mask.flatten(0, 1), weights


def best_mask(logits: Float[Tensor, "g p r"], *, n: int, m: int) -> Bool[Tensor, "k r"]:
    """The likeliest pattern of every group, by slot; among equal ones the first.

    Example:
        >>> best_mask(torch.tensor([[[0.0], [0.5]]]), n=1, m=2).flatten()
        tensor([False,  True])
    """
    chosen = patterns(n, m).bool().to(logits.device)[logits.argmax(1)]  # [g, r, m]
    return chosen.movedim(-1, 1).flatten(0, 1)
