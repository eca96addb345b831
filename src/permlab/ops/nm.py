"""N:M masks: the n highest scores of every m consecutive entries."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Scores handled at a time: on a CPU they stay in its cache, elsewhere it is memory that is bounded.
_CPU_CHUNK, _CHUNK = 2**18, 2**24
# Beyond this m a sort is faster than comparing every pair. Ranks are bytes, so it cannot exceed 256.
_LARGEST_COMPARED = 64


@torch.no_grad()
def nm_mask(scores: Float[Tensor, "*b i"], *, n: int, m: int) -> Bool[Tensor, "*b i"]:
    """Mark the n highest of every m consecutive scores along the last axis.

    Among equal scores the lowest index is kept, so the mask of given scores is always the same.
    Infinite scores are ordered like any other. The mask carries no gradient.

    Shapes:
        b: any number of batch axes, possibly none.  i: entries, a multiple of m.
    Args:
        scores: any floating dtype; what is highest is kept.
        n: entries kept of every m, at least 1 and below m.
        m: length of a group, divides the last axis.
    Returns:
        bool mask on the device of the scores, True where an entry is kept: n in every group.
    Raises:
        ValueError: if the scores are not floating point or one is NaN, if n is not in 1..m-1, or
            if m does not divide the last axis; the nearest lengths that do are named.
    Source: Mishra et al. 2021, arXiv:2104.08378 (2:4), for any n and m.
    Differs from source: Nothing.
    Cost: O(m) time for each score up to m = 64, a sort beyond. Besides the mask, and the scores
        where the groups are not contiguous, a few MB on a CPU.
    Example:
        >>> nm_mask(torch.tensor([0.1, 0.9, 0.5, 0.5, 4.0, 3.0, 2.0, 1.0]), n=2, m=4).int()
        tensor([0, 1, 1, 0, 1, 1, 0, 0], dtype=torch.int32)
    """
    _check_scores(scores)
    check_pattern(scores.shape[-1], n=n, m=m)
    groups = scores.reshape(-1, m)
    mask = torch.empty(groups.shape, dtype=torch.bool, device=scores.device)
    step = max(1, (_CPU_CHUNK if scores.device.type == "cpu" else _CHUNK) // m)
    keep = _keep_by_rank if m <= _LARGEST_COMPARED else _keep_by_sort
    for start in range(0, len(groups), step):
        mask[start : start + step] = keep(groups[start : start + step], n)
    return mask.view(scores.shape)


def check_pattern(width: int, *, n: int, m: int) -> None:
    """Raise unless a row of `width` entries can keep n of every m.

    Raises:
        ValueError: naming n and m, or the width and the nearest m that divide it.
    Example:
        >>> check_pattern(18, n=2, m=4)
        Traceback (most recent call last):
        ValueError: m=4 does not divide the width 18; nearest that do: 3, 6
    """
    if not 1 <= n < m:
        raise ValueError(f"n={n} of every m={m} is not a pattern: n is at least 1 and below m")
    if width < 1 or width % m:
        lengths = [length for length in range(n + 1, width + 1) if width % length == 0]
        near = [max((length for length in lengths if length < m), default=None)]
        near += [min((length for length in lengths if length > m), default=None)]
        named = ", ".join(str(length) for length in near if length is not None)
        hint = f"nearest that do: {named}" if named else f"none above n={n} does"
        raise ValueError(f"m={m} does not divide the width {width}; {hint}")


def _check_scores(scores: Tensor) -> None:
    if not scores.is_floating_point():
        raise ValueError(f"scores are floating point, got {scores.dtype}")
    if scores.ndim == 0:
        raise ValueError("scores have at least one axis, got a single number")
    # A maximum is NaN where a score is, and takes no memory; float8 has none.
    has_maximum = scores.numel() > 0 and scores.dtype.itemsize > 1
    suspicious = bool(scores.amax().isnan()) if has_maximum else True
    if suspicious and bool((wrong := scores.isnan()).any()):
        raise ValueError(f"the score at {wrong.nonzero()[0].tolist()} is NaN")


def _keep_by_rank(groups: Tensor, n: int) -> Tensor:
    """Mask from each score's rank in its group: how many others come before it.

    A group per column, so that every comparison runs over contiguous memory; all pairs at one
    distance are compared at once. A score beats the later ones that are not higher than it.
    """
    m = groups.shape[-1]
    scores = (groups.float() if groups.dtype.itemsize == 1 else groups).mT.contiguous()
    last_first = torch.arange(m - 1, -1, -1, dtype=torch.uint8, device=groups.device)
    rank = last_first.unsqueeze(-1).repeat(1, len(groups))  # as if every score were below all later ones
    for distance in range(1, m):
        beats = (scores[:-distance] >= scores[distance:]).view(torch.uint8)
        rank[:-distance] -= beats
        rank[distance:] += beats
    return (rank < n).mT


def _keep_by_sort(groups: Tensor, n: int) -> Tensor:
    scores = groups.float() if groups.dtype.itemsize == 1 else groups
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :n]
    return torch.zeros(groups.shape, dtype=torch.bool, device=groups.device).scatter_(-1, best, True)
