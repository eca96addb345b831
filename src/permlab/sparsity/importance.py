"""Importance of every weight of a linear layer, its score, and pruning that updates what it keeps."""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from permlab.ops.nm import check_pattern, nm_mask
from permlab.permutation import check_order

# Columns that SparseGPT updates one by one before the rest of the matrix follows in one product.
_BLOCK = 128


def magnitude(W: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """Absolute value of every weight.

    Shapes:
        o: outputs.  i: input channels.
    Args:
        W: weight of a linear layer, any floating dtype.
    Returns:
        Non-negative scores, dtype and device of the weight.
    Raises:
        ValueError: if the weight is not a floating-point matrix or not finite.
    Source: Han et al. 2015, arXiv:1506.02626.
    Differs from source: Nothing.
    Cost: O(o i).
    Example:
        >>> magnitude(torch.tensor([[1.0, -2.0]]))
        tensor([[1., 2.]])
    """
    _check_weight(W)
    return W.abs()


def wanda(W: Float[Tensor, "o i"], x_norm: Float[Tensor, " i"]) -> Float[Tensor, "o i"]:
    """Absolute value of every weight times the size of its input.

    Shapes:
        o: outputs.  i: input channels.
    Args:
        W: weight of a linear layer, any floating dtype.
        x_norm: L2 norm of each input channel over the calibration tokens, not negative.
    Returns:
        Non-negative scores, dtype and device of the weight; computed in float32 at least.
    Raises:
        ValueError: if the weight or the norms are not floating point, not finite or do not fit
            each other, if a norm is negative, or if a score leaves the range of the dtype.
    Source: Sun et al. 2023, arXiv:2306.11695, eq. 1.
    Differs from source: Nothing.
    Cost: O(o i).
    Example:
        >>> wanda(torch.tensor([[1.0, -2.0]]), torch.tensor([4.0, 0.5]))
        tensor([[4., 1.]])
    """
    _check_weight(W)
    _check_norm(W, x_norm)
    wide = _widest(W, x_norm)
    return _narrow(W.to(wide).abs() * x_norm.to(wide), W.dtype)


def ria(W: Float[Tensor, "o i"], x_norm: Float[Tensor, " i"], *, power: float = 0.5) -> Float[Tensor, "o i"]:
    """Share of every weight in its row and in its column, times a power of the size of its input.

    A channel whose weights are all small does not lose them only for that. A row or a column of
    zeros has shares 0.

    Shapes:
        o: outputs.  i: input channels.
    Args:
        W: weight of a linear layer, any floating dtype.
        x_norm: L2 norm of each input channel over the calibration tokens, not negative.
        power: exponent of the norm, at least 0; at 0 the input does not count.
    Returns:
        Non-negative scores, dtype and device of the weight; computed in float32 at least.
    Raises:
        ValueError: as for `wanda`, and if the power is negative or not finite.
    Source: Zhang et al. 2024, Plug-and-Play (ICLR), relative importance and activations.
    Differs from source: 0 instead of 0/0 in rows and columns of zeros.
    Cost: O(o i).
    Example:
        >>> ria(torch.tensor([[1.0, -1.0], [3.0, 1.0]]), torch.tensor([4.0, 1.0]))
        tensor([[1.5000, 1.0000],
                [3.0000, 0.7500]])
    """
    _check_weight(W)
    _check_norm(W, x_norm)
    if not 0 <= power < float("inf"):
        raise ValueError(f"power={power} is not a finite number of at least 0")
    wide = _widest(W, x_norm)
    size = W.to(wide).abs()
    shares = sum(size / _one_where_zero(size.sum(axis, keepdim=True)) for axis in (0, 1))
    return _narrow(shares * x_norm.to(wide) ** power, W.dtype)


def saliency(W: Float[Tensor, "o i"], hessian: Float[Tensor, "i i"], *, damping: float = 0.01) -> Float[Tensor, "o i"]:
    """Reconstruction error that removing each weight alone costs once its row's others are adjusted to it.

    `W^2 / diag(H^-1)` with H the damped Hessian. A channel that calibration never saw has score 0.

    Shapes:
        o: outputs.  i: input channels.
    Args:
        W: weight of a linear layer, any floating dtype.
        hessian: `X^T X` summed over the calibration tokens X, not damped.
        damping: added to the diagonal, in units of its mean; at least 0.
    Returns:
        Non-negative scores, dtype and device of the weight; computed in float32 at least.
    Raises:
        ValueError: if the weight or the Hessian is not floating point, not finite or does not
            fit the other, if the damped Hessian is not positive definite, or if a score leaves
            the range of the dtype.
    Source: Hassibi et al. 1993, optimal brain surgeon; Frantar & Alistarh 2023,
        arXiv:2301.00774 (SparseGPT), whose first choice of a mask ranks by it.
    Differs from source: without the factor 1/2, which orders nothing.
    Cost: O(i^3 + o i).
    Example:
        >>> saliency(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 16.0]]), damping=0.0)
        tensor([[ 4., 16.]])
    """
    _check_weight(W)
    _check_hessian(W, hessian)
    wide = _widest(W, hessian)
    return saliency_of(W, inverse_diagonal(hessian.to(wide), damping=damping))


def inverse_diagonal(hessian: Float[Tensor, "i i"], *, damping: float = 0.01) -> Float[Tensor, " i"]:
    """Diagonal of the inverse of the damped Hessian: all that `saliency` needs of it.

    Args:
        hessian, damping: as in `saliency`.
    Returns:
        Infinity for a channel that calibration never saw.
    Raises:
        ValueError: if the damped Hessian is not positive definite.
    Cost: O(i^3).
    Example:
        >>> inverse_diagonal(torch.tensor([[1.0, 0.0], [0.0, 16.0]]), damping=0.0)
        tensor([1.0000, 0.0625])
    """
    dead = hessian.diagonal() == 0
    return _inverse_factor(hessian, damping).square().sum(0).masked_fill(dead, math.inf)


def saliency_of(W: Float[Tensor, "o i"], inverse_diagonal: Float[Tensor, " i"]) -> Float[Tensor, "o i"]:
    """The `saliency` of every weight, from the diagonal of the inverse Hessian.

    Raises:
        ValueError: as `saliency`.
    """
    _check_weight(W)
    wide = _widest(W, inverse_diagonal)
    return _narrow(W.to(wide).square() / inverse_diagonal.to(wide), W.dtype)


@torch.no_grad()
def sparsegpt(
    W: Float[Tensor, "o i"],
    hessian: Float[Tensor, "i i"],
    *,
    n: int,
    m: int,
    order: Int64[Tensor, " i"] | None = None,
    damping: float = 0.01,
    mask: Bool[Tensor, "o i"] | None = None,
) -> tuple[Float[Tensor, "o i"], Bool[Tensor, "o i"]]:
    """Prune a layer to n of every m channels and adjust what is kept to what is removed.

    Channels are visited from left to right in the given order. When the first of m is reached,
    each row drops those of the m that are cheapest to remove now; every weight that is dropped
    hands its share of the output to the channels of its row that are still to come.

    Channels that calibration never saw are dropped before all others; those kept keep their weight.
    With a mask nothing is chosen: what it drops is dropped, and handed on in the same way.

    Shapes:
        o: outputs.  i: input channels, a multiple of m.
    Args:
        W: weight of a linear layer, any floating dtype.
        hessian: `X^T X` summed over the calibration tokens X, not damped.
        n: channels kept of every m, at least 1 and below m.
        m: consecutive channels, in the given order, that are pruned together.
        order: gather indices of the channels: the groups are `W[:, order]`'s; None for as they are.
        damping: added to the Hessian's diagonal, in units of its mean; at least 0.
        mask: what to keep, columns in their original order; n of every m in the given order, or fewer.
    Returns:
        The new weight and the bool mask of what it keeps, both with columns in their original
        order, on the device of the weight; the weight has its dtype. Computed in float32 at least.
    Raises:
        ValueError: as for `saliency`, and if n and m are no pattern for the weight's width,
            the order is no permutation of it, or the mask keeps more than n of some m.
    Source: Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1 with a mask of n of every m.
    Differs from source: the factor of the inverse comes from one Cholesky decomposition of the
        reversed Hessian, not from one of the inverse; a channel that calibration never saw
        keeps its weight where its group leaves it no choice; an order; a given mask.
    Cost: O(i^3 + o i^2) time, O(i^2 + o i) memory.
    Example:
        >>> pruned, mask = sparsegpt(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), n=1, m=2)
        >>> pruned.round(decimals=1), mask
        (tensor([[0.0000, 2.5000]]), tensor([[False,  True]]))
    """
    _check_weight(W)
    _check_hessian(W, hessian)
    check_pattern(W.shape[1], n=n, m=m)
    order = _order_of_columns(W, order)
    wide = _widest(W, hessian)
    ordered = hessian.to(wide)[order][:, order]
    dead = ordered.diagonal() == 0
    # Channels before rows: what is done to a channel runs over contiguous memory.
    channels = W.to(wide).mT[order]
    given = None if mask is None else _given_mask(mask, W, order, n, m)
    keep = _prune_channels(channels, _inverse_factor(ordered, damping), dead, n, m, given)
    mask = torch.empty_like(keep).index_copy_(0, order, keep).mT.contiguous()
    pruned = torch.empty_like(channels).index_copy_(0, order, channels * keep).mT
    return _narrow(pruned, W.dtype).contiguous(), mask


def check_scores(scores: Float[Tensor, "o i"]) -> None:
    """Refuse what is no importance of the weights of a layer.

    Raises:
        ValueError: if it is no floating-point matrix, has no entries, or one is negative or not finite; the
            first such entry is named.
    Cost: no memory, unless an entry is to be named.
    """
    if not scores.is_floating_point() or scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"scores are a floating-point matrix, got {scores.dtype} of shape {tuple(scores.shape)}")
    # A minimum or maximum is NaN where a score is.
    low, high = scores.amin(), scores.amax()
    if not (low >= 0 and high < math.inf):
        position = (~((scores >= 0) & (scores < math.inf))).nonzero()[0].tolist()
        value = scores[tuple(position)].item()
        raise ValueError(f"the score at {position} is {value}: neither 0 nor a positive number")


def _given_mask(mask: Tensor, W: Tensor, order: Tensor, n: int, m: int) -> Tensor:
    """By channel in order, and row."""
    if mask.dtype != torch.bool or mask.shape != W.shape:
        raise ValueError(f"a mask is bool of the shape {tuple(W.shape)}, got {mask.dtype} of {tuple(mask.shape)}")
    keep = mask.to(W.device).mT[order]
    if (keep.unflatten(0, (-1, m)).sum(1) > n).any():
        raise ValueError(f"the mask keeps more than {n} of {m} consecutive channels in the given order")
    return keep


def _prune_channels(
    channels: Tensor, factor: Tensor, dead: Tensor, n: int, m: int, given: Tensor | None = None
) -> Tensor:
    """Update the kept weights of `channels` [i, o] in place; returns what is kept, which is chosen if not given.

    Row j of the upper `factor` is what removing channel j does to the channels after it.
    """
    keep = torch.empty_like(channels, dtype=torch.bool) if given is None else given
    width, block = len(channels), max(m, _BLOCK // m * m)
    for start in range(0, width, block):
        stop = min(start + block, width)
        removed = torch.zeros_like(channels[start:stop])
        for first in range(start, stop, m):
            group = slice(first, first + m)
            if given is None:
                cost = (channels[group] / factor.diagonal()[group, None]).square().masked_fill(dead[group, None], 0)
                keep[group] = nm_mask(cost.mT, n=n, m=m).mT
            for j in range(first, first + m):
                removed[j - start] = (channels[j] / factor[j, j]).masked_fill(keep[j], 0)
                channels[j + 1 : stop].addr_(factor[j, j + 1 : stop], removed[j - start], alpha=-1)
        channels[stop:].addmm_(factor[start:stop, stop:].mT, removed, alpha=-1)
    return keep


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with `U^T U` the inverse of the damped Hessian.

    The decomposition of the reversed Hessian gives an upper V with `V V^T` the Hessian itself, and
    U is V's inverse: the inverse Hessian, which may lose positive definiteness to rounding, is never formed.
    """
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping={damping} is not a finite number of at least 0")
    diagonal = hessian.diagonal()
    damped = hessian + torch.diag(_one_where_zero(diagonal + damping * diagonal.mean()) - diagonal)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        raise ValueError(f"the Hessian is not positive definite with damping={damping}; raise the damping")
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)


def _order_of_columns(W: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return torch.arange(W.shape[1], device=W.device)
    check_order(order)
    if order.shape != W.shape[1:]:
        raise ValueError(f"an order of shape {tuple(order.shape)} does not fit the {W.shape[1]} columns of the weight")
    return order.to(W.device)


def _one_where_zero(values: Tensor) -> Tensor:
    return torch.where(values == 0, 1, values)


def _widest(*tensors: Tensor) -> torch.dtype:
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


def _narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in a dtype that may hold less; an infinity there would pass for the best score of all."""
    narrow = values.to(dtype)
    if not torch.isfinite(narrow).all():
        largest = values.detach().abs().max().item()
        raise ValueError(f"{largest:.3g} is beyond the range of {dtype}: give the weight in a wider dtype")
    return narrow


def _check_weight(W: Tensor) -> None:
    if not W.is_floating_point():
        raise ValueError(f"a weight is floating point, got {W.dtype}")
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(f"a weight is a matrix [out, in], got shape {tuple(W.shape)}")
    _check_finite("weight", W)


def _check_norm(W: Tensor, x_norm: Tensor) -> None:
    if not x_norm.is_floating_point():
        raise ValueError(f"norms are floating point, got {x_norm.dtype}")
    if x_norm.shape != W.shape[1:]:
        raise ValueError(f"norms of shape {tuple(x_norm.shape)} do not fit a weight of shape {tuple(W.shape)}")
    _check_finite("norm", x_norm)
    if (x_norm < 0).any():
        raise ValueError(f"a norm is not negative, got {x_norm.min().item()}")


def _check_hessian(W: Tensor, hessian: Tensor) -> None:
    if not hessian.is_floating_point():
        raise ValueError(f"a Hessian is floating point, got {hessian.dtype}")
    if hessian.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"a Hessian of shape {tuple(hessian.shape)} does not fit a weight of shape {tuple(W.shape)}")
    _check_finite("entry of the Hessian", hessian)


def _check_finite(name: str, values: Tensor) -> None:
    finite = torch.isfinite(values)
    if not finite.all():
        position = (~finite).nonzero()[0].tolist()
        raise ValueError(f"the {name} at {position} is {values[tuple(position)].item()}")
