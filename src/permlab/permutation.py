r"""The convention: items, slots, orders, ranks, matrices; and how a permutation is applied.

An *order* holds gather indices, `y[i] = x[order[i]]`: slot `i` of the new sequence takes
item `order[i]`. Its *rank* is the inverse, `rank[j]` being the slot of item `j`. A *matrix*
says the same as 0/1 (or soft) entries with row = slot and column = item, `y = matrix @ x`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Estimator = Literal["relaxed", "straight_through", "score_function", "none"]


@dataclass(frozen=True)
class PermutationSample:
    """One draw of a method: a true permutation and what its gradient flows through.

    The batch axes `*b` broadcast against those of the items: a method whose order does not
    depend on the input returns none.

    Shapes:
        n: slots and items.
    Args:
        order: int64 `[*b, n]`, always a true permutation.
        soft: relaxation `[*b, n, n]` (row = slot) that gradients flow through, or None.
        log_prob: `[*b]`, in nats, of the law that was sampled, temperature included, unless an option of the
            method leaves that out; or None.
        estimator: how `permute` and the learner use the three.
    """

    order: Int64[Tensor, "*b n"]
    soft: Float[Tensor, "*b n n"] | None
    log_prob: Float[Tensor, "*b"] | None
    estimator: Estimator


@dataclass(frozen=True)
class Site:
    """A place in a model where items are permuted.

    Args:
        name: what the site is called in metrics and files.
        order: int64 `[n]`, the starting order.
        num_groups: number of equal consecutive blocks that no item may leave.
        num_features: length of an item's feature vector, where scores may depend on it.
    Raises:
        ValueError: if the order is no permutation, or the groups do not divide it or are crossed.
    """

    name: str
    order: Int64[Tensor, " n"]
    num_groups: int = 1
    num_features: int | None = None

    def __post_init__(self) -> None:
        check_order(self.order)
        if self.num_groups < 1 or self.num_items % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide {self.num_items} items")
        size = self.num_items // self.num_groups
        home = torch.arange(self.num_items, device=self.order.device) // size
        if not torch.equal(self.order // size, home):
            raise ValueError(f"the starting order of site {self.name} crosses its {self.num_groups} groups")

    @property
    def num_items(self) -> int:
        return self.order.shape[-1]


def check_order(order: Tensor) -> None:
    """Raise unless the last axis holds a permutation of 0..n-1.

    Raises:
        ValueError: naming a wrong dtype or shape, or the first offending order with an index it lacks.
    Example:
        >>> check_order(torch.tensor([0, 0, 1]))
        Traceback (most recent call last):
        ValueError: not a permutation of 0..2, index 2 is missing: [0, 0, 1]
    """
    if order.dtype != torch.int64:
        raise ValueError(f"an order is int64, got {order.dtype}")
    if order.ndim == 0 or order.shape[-1] == 0:
        raise ValueError(f"an order has at least one item, got shape {tuple(order.shape)}")
    expected = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    wrong = (order.sort(dim=-1).values != expected).any(-1)
    if wrong.any():
        found = order[wrong][0].tolist()
        missing = min(set(range(len(found))) - set(found))
        raise ValueError(f"not a permutation of 0..{len(found) - 1}, index {missing} is missing: {_shorten(found)}")


def _shorten(indices: list[int]) -> str:
    return str(indices) if len(indices) <= 16 else f"[{', '.join(map(str, indices[:16]))}, ...]"


def invert(order: Int64[Tensor, "*b n"]) -> Int64[Tensor, "*b n"]:
    """Rank of an order (or order of a rank): where each item went.

    Shapes:
        b: any number of batch axes, possibly none.  n: slots and items.
    Args:
        order: gather indices; a permutation of 0..n-1 along the last axis.
    Returns:
        int64, `invert(order)[order[i]] == i`, on the device of the input.
    Raises:
        ValueError: if the input is no permutation.
    Cost: O(n log n), for the check.
    Example:
        >>> invert(torch.tensor([2, 0, 1]))
        tensor([1, 2, 0])
    """
    check_order(order)
    return _invert(order)


def _invert(order: Tensor) -> Tensor:
    slots = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, slots)


def order_to_matrix(order: Int64[Tensor, "*b n"], *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*b n n"]:
    """Permutation matrix of an order: row = slot, column = item.

    Shapes:
        b: any number of batch axes, possibly none.  n: slots and items.
    Args:
        order: gather indices.
        dtype: floating type of the result.
    Returns:
        Matrix with `matrix[i, order[i]] = 1` and zeros elsewhere, so `matrix @ x == x[order]`.
    Raises:
        ValueError: if `order` is no permutation.
    Example:
        >>> order_to_matrix(torch.tensor([1, 0]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    check_order(order)
    matrix = torch.zeros(*order.shape, order.shape[-1], dtype=dtype, device=order.device)
    return matrix.scatter_(-1, order.unsqueeze(-1), 1)


def permute(x: Tensor, sample: PermutationSample) -> Tensor:
    """Bring items into the sampled order.

    `relaxed` multiplies by the soft matrix. `straight_through` gathers in the forward pass
    and lets the soft matrix receive, in the backward pass, the gradient that the matrix
    product would have given it; no n x n by n x d product is made in the forward pass.
    `score_function` and `none` gather.

    Shapes:
        x: `[*b, n, d]`. The sample's batch axes broadcast against `*b`; the result has the
        broadcast axes, so a sample of `[k, 1, n]` over items `[b, n, d]` gives `[k, b, n, d]`.
    Args:
        x: items, any floating dtype; the soft matrix is cast to it.
        sample: what a method returned.
    Returns:
        Items by slot, dtype and device of `x`.
    Raises:
        ValueError: if the number of items differs, or a soft matrix is wanted and missing.
    Source: straight-through estimator, Bengio et al. 2013, arXiv:1308.3432.
    Differs from source: the gather replaces the product with the hard matrix; same values
        and same gradients, up to the sign of zeros (0 * inf cannot arise here).
    Cost: O(n d) forward for a gather; O(n^2 d) for relaxed, and for the gradient of the soft matrix.
    Example:
        >>> order = torch.tensor([2, 0, 1])
        >>> sample = PermutationSample(order=order, soft=None, log_prob=None, estimator="none")
        >>> permute(torch.tensor([[10.0], [20.0], [30.0]]), sample).flatten()
        tensor([30., 10., 20.])
    """
    if x.ndim < 2 or x.shape[-2] != sample.order.shape[-1]:
        raise ValueError(f"items of shape {tuple(x.shape)} do not fit an order of {sample.order.shape[-1]} items")
    if sample.estimator in ("relaxed", "straight_through") and sample.soft is None:
        raise ValueError(f"a {sample.estimator} sample needs a soft matrix")
    if sample.estimator == "relaxed":
        assert sample.soft is not None
        return sample.soft.to(x.dtype) @ x
    if sample.estimator == "straight_through":
        return _StraightThrough.apply(x, sample.order, sample.soft)
    return gather_items(x, sample.order)


def gather_items(x: Float[Tensor, "*b n d"], order: Int64[Tensor, "*c n"]) -> Float[Tensor, "*e n d"]:
    """Items by slot, `y[..., i, :] = x[..., order[..., i], :]`.

    The order is not checked: this runs at every step, on orders that methods vouch for. The
    gradient is gathered by the inverse order, so it needs no atomic additions and is the same
    in every run.

    Shapes:
        b, c: any batch axes, broadcast against each other to e.  n: slots and items.  d: features.
    Args:
        x: items, any floating dtype.
        order: gather indices, every row a permutation of 0..n - 1.
    Returns:
        Items by slot, dtype and device of `x`.
    Cost: O(n d), one `index_select` of whole items.
    Example:
        >>> gather_items(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0])).flatten()
        tensor([2., 1.])
    """
    return _Gather.apply(x, order)


def _select(x: Tensor, order: Tensor) -> Tensor:
    """Items as rows of one matrix: selecting along an axis in the middle takes a CPU half as long again."""
    num_items, num_features = x.shape[-2:]
    count = x.shape[:-2].numel()
    starts = torch.arange(count, device=order.device).view(*x.shape[:-2], 1) * num_items
    rows = starts + order
    selected = x.reshape(count * num_items, num_features).index_select(0, rows.flatten())
    return selected.view(*rows.shape, num_features)


class _Gather(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor) -> Tensor:
        return _select(x, order)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, order = inputs
        ctx.save_for_backward(order)
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (order,) = ctx.saved_tensors
        return gather_items(grad, _invert(order)).sum_to_size(ctx.shape), None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, soft: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, order)
        ctx.soft_shape, ctx.soft_dtype = soft.shape, soft.dtype
        return gather_items(x, order)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, order = ctx.saved_tensors
        grad_x = grad_soft = None
        if ctx.needs_input_grad[0]:
            grad_x = gather_items(grad, _invert(order)).sum_to_size(x.shape)
        if ctx.needs_input_grad[2]:
            grad_soft = _outer_over_features(grad, x, ctx.soft_shape).to(ctx.soft_dtype)
        return grad_x, None, grad_soft


def _outer_over_features(grad: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """`grad @ x^T` summed over the batch axes that a soft matrix of this shape does not have.

    The sum is part of the contraction: a matrix per batch entry would cost n / d times the memory of the items.
    """
    num_axes = grad.ndim - 2
    axes = list(range(num_axes))
    lengths = (1,) * (grad.ndim - len(shape)) + shape[:-2]
    kept = [axis for axis in axes if lengths[axis] != 1]
    slot, item, feature = num_axes, num_axes + 1, num_axes + 2
    left, right = [*axes, slot, feature], [*axes[grad.ndim - x.ndim :], item, feature]
    return torch.einsum(grad, left, x, right, [*kept, slot, item]).reshape(shape)
