"""N:M masks in a permuted channel order, mapped back to the original one, with a gradient for the permutation."""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from permlab.permutation import PermutationSample


def keep_best(slots: Float[Tensor, "*b k r"], *, n: int, m: int) -> Bool[Tensor, "*b k r"]:
    """The n highest of every m consecutive slots (axis -2), for every row (axis -1); ties keep the first.

    The layout has channels before rows, in which a permutation of channels moves whole rows of memory.

    Cost: m (m - 1) / 2 comparisons for each group of m scores, no sort.
    """
    *batch, num_slots, num_rows = slots.shape
    groups = slots.reshape(*batch, num_slots // m, m, num_rows)
    count = torch.int8 if m <= 128 else torch.int64
    beaten = torch.zeros(groups.shape, dtype=count, device=slots.device)  # by how many others of its group
    for first in range(m - 1):
        wins = groups[..., first : first + 1, :] >= groups[..., first + 1 :, :]
        beaten[..., first + 1 :, :] += wins
        beaten[..., first, :] += (~wins).sum(-2, dtype=count)
    return (beaten < n).view(slots.shape)


def straight_through_prune(
    weights: Float[Tensor, "k r"],
    scores: Float[Tensor, "k r"],
    soft: Float[Tensor, "g s s"],
    order: Int64[Tensor, "g s"],
    base: Int64[Tensor, " k"],
    *,
    n: int,
    m: int,
    mask_temperature: float,
    mask_backward: Literal["hard", "softmax"] = "hard",
) -> Float[Tensor, "k r"]:
    """Weights under the hard N:M mask of a hard order, with gradients for the soft matrix.

    Forward: channels are brought into the order, the best n of every m are kept, and the mask is
    mapped back. Backward: the permutation on both ways is taken for the soft matrix, and the
    choice of the best for a softmax over each m, of the scores over `mask_temperature` times
    their mean. On the way back the soft matrix multiplies a mask, which its gradient is
    proportional to: the hard one, or the softmax.

    Shapes:
        k: channels.  r: rows of the weights.  g: groups.  s: channels of a group, k / g.
    Args:
        weights: what is pruned, channels in original order; receives no gradient.
        scores: importance, not negative, likewise.
        soft: relaxation of the permutation of each group; receives the gradient.
        order: the hard permutation of each group, counted within it.
        base: the order that groups and their permutations start from.
        n, m: n kept of every m.
        mask_temperature: of the softmax, in units of the mean score.
        mask_backward: the mask that the gradient of the way back is taken with: the `hard` one, which
            the forward pass maps back, or the `softmax` that stands for it.
    Returns:
        The weights with zeros, channels in original order.
    Source: Zou et al. 2025, arXiv:2510.10136 (PermLLM), straight-through on permutation and mask.
    Differs from source: the softmax is taken of scores over their mean, not of raw scores, whose
        scale depends on the layer; no dense matrix over all groups is made. The published code
        maps hard mask and softmax back before it puts the one in the other's place, so its
        gradient is that of `softmax`.
    Cost: O(k r) forward, O(k s r) backward. Beside the result one byte per weight is kept, and rows
        are worked off in parts, so a wide layer takes little more than itself.
    """
    return _StraightThroughPrune.apply(soft, order, base, weights, scores, n, m, mask_temperature, mask_backward)


# Entries of the weights that are worked on at a time.
_PART = 2**22


class _StraightThroughPrune(torch.autograd.Function):
    @staticmethod
    def forward(ctx, soft, order, base, weights, scores, n, m, mask_temperature, mask_backward):  # type: ignore[override]
        channels = base.view(order.shape).gather(-1, order).flatten()  # the channel of every slot
        pruned, keep = torch.empty_like(weights), torch.empty(weights.shape, dtype=torch.bool, device=weights.device)
        for rows in _parts(weights):
            keep[:, rows] = keep_best(scores[:, rows][channels], n=n, m=m)
            pruned[:, rows] = weights[:, rows] * torch.empty_like(keep[:, rows]).index_copy_(0, channels, keep[:, rows])
        ctx.save_for_backward(channels, base, weights, scores, keep)
        ctx.m, ctx.scale, ctx.soft_shape, ctx.soft_dtype = m, float(mask_temperature), soft.shape, soft.dtype
        ctx.mask_backward = mask_backward
        return pruned

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        channels, base, weights, scores, keep = ctx.saved_tensors
        num_groups, size = ctx.soft_shape[:2]
        unit = ctx.scale * scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)
        grad_soft = scores.new_zeros(ctx.soft_shape)
        for rows in _parts(weights):
            grad_mask, part = grad[:, rows] * weights[:, rows], scores[:, rows]
            share = _shares(part[channels], ctx.m, unit)
            grad_slots = _through_softmax(share, grad_mask[channels], ctx.m, unit)
            mask = share if ctx.mask_backward == "softmax" else keep[:, rows].to(scores.dtype)
            ways = ((mask, grad_mask[base]), (grad_slots, part[base]))
            for left, right in ways:
                left, right = (x.view(num_groups, size, -1) for x in (left, right))
                grad_soft.baddbmm_(left, right.mT)
        return grad_soft.to(ctx.soft_dtype), *8 * (None,)


def _parts(weights: Tensor) -> Iterator[slice]:
    """Slices of rows with about `_PART` entries."""
    step = max(1, _PART // weights.shape[0])
    return (slice(start, start + step) for start in range(0, weights.shape[1], step))


def _shares(slots: Tensor, m: int, unit: Tensor) -> Tensor:
    """Softmax over every m slots, of scores by slot over `unit`."""
    *batch, num_slots, num_rows = slots.shape
    return (slots / unit).reshape(*batch, num_slots // m, m, num_rows).softmax(-2).reshape(slots.shape)


def _through_softmax(share: Tensor, grad: Tensor, m: int, unit: Tensor) -> Tensor:
    """Gradient for the scores that `_shares` was given, from that for the shares."""
    *batch, num_slots, num_rows = share.shape
    flow = (share * grad).reshape(*batch, num_slots // m, m, num_rows)
    share = share.reshape(flow.shape)
    return ((flow - share * flow.sum(-2, keepdim=True)) / unit).reshape(grad.shape)


def hard_mask(order: Int64[Tensor, " k"], scores: Float[Tensor, "k r"], *, n: int, m: int) -> Float[Tensor, "k r"]:
    """0/1 mask of an order, in original channel order; channels before rows."""
    keep = keep_best(scores[order], n=n, m=m).to(scores.dtype)
    return torch.empty_like(keep).index_copy_(0, order, keep)


def relaxed_mask(
    soft: Float[Tensor, "g k k"], scores: Float[Tensor, "g k r"], *, n: int, m: int, mask_temperature: float
) -> tuple[Float[Tensor, "g k r"], Float[Tensor, "g k r"]]:
    """Masks of softly permuted scores: by slot, and mapped back to original channel order.

    The scores are mixed by the soft matrix and the best n of every m mixtures are kept (with the
    softmax gradient of `straight_through_prune`); the mask is mapped back by the transposed matrix,
    where it has entries between 0 and 1.
    """
    keep = _HardKeep.apply(soft @ scores, n, m, mask_temperature)
    return keep, soft.mT @ keep


class _HardKeep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots, n, m, mask_temperature):  # type: ignore[override]
        ctx.save_for_backward(slots)
        ctx.m, ctx.scale = m, float(mask_temperature)
        return keep_best(slots, n=n, m=m).to(slots.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        (slots,) = ctx.saved_tensors
        unit = ctx.scale * slots.mean().clamp_min(torch.finfo(slots.dtype).tiny)
        return _through_softmax(_shares(slots, ctx.m, unit), grad, ctx.m, unit), None, None, None


def split_sample(
    sample: PermutationSample, num_groups: int
) -> tuple[Int64[Tensor, "*b g k"], Float[Tensor, "*b g k k"] | None]:
    """Order and soft matrix of each group, counted within it: the diagonal blocks of the whole."""
    size = sample.order.shape[-1] // num_groups
    order = sample.order.unflatten(-1, (num_groups, size)) % size
    if sample.soft is None:
        return order, None
    blocks = sample.soft.unflatten(-1, (num_groups, size)).unflatten(-3, (num_groups, size))
    return order, blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
