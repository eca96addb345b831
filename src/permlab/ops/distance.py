"""How far apart two orders are, and how far an order is from a path."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from permlab.permutation import check_order, invert


def kendall(order: Int64[Tensor, "*b n"], other: Int64[Tensor, "*c _n"]) -> Float[Tensor, "*e"]:
    """Kendall rank correlation: how many pairs of items keep their relative order.

    1 for equal orders, -1 for an order and its reverse, 0 on average for random ones. A single
    item gives 1.

    Shapes:
        b, c: any batch axes, broadcast against each other to e.  n: slots and items.
    Args:
        order: gather indices.
        other: gather indices of as many items.
    Returns:
        Correlation in [-1, 1], of the default floating dtype, on the device of the input.
    Raises:
        ValueError: if one is no order, or their numbers of items differ.
    Source: Kendall 1938, A new measure of rank correlation; orders have no ties, so tau-a = tau-b.
    Differs from source: Nothing.
    Cost: O(n^2) time; n^2 bytes per pair of orders.
    Example:
        >>> kendall(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 1]))
        tensor(0.3333)
    """
    slots = _slots_in_other(order, other)
    num_pairs = slots.shape[-1] * (slots.shape[-1] - 1) // 2
    if num_pairs == 0:
        return torch.ones(slots.shape[:-1], device=slots.device)
    kept = (slots.unsqueeze(-1) < slots.unsqueeze(-2)).triu_(1).sum((-2, -1))
    return (2 * kept - num_pairs) / num_pairs


def displacement(order: Int64[Tensor, "*b n"], other: Int64[Tensor, "*c _n"]) -> Float[Tensor, "*e"]:
    """Mean distance, in slots, between where two orders put an item.

    0 for equal orders; (n^2 - 1) / (3 n) on average for random ones.

    Shapes:
        b, c: any batch axes, broadcast against each other to e.  n: slots and items.
    Args:
        order: gather indices.
        other: gather indices of as many items.
    Returns:
        Mean absolute difference of ranks, in slots, of the default floating dtype.
    Raises:
        ValueError: if one is no order, or their numbers of items differ.
    Source: Spearman's footrule divided by n (Diaconis and Graham 1977).
    Differs from source: the mean instead of the sum.
    Cost: O(n) after an O(n log n) check.
    Example:
        >>> displacement(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 2, 3]))
        tensor(0.5000)
    """
    slots = _slots_in_other(order, other)
    here = torch.arange(slots.shape[-1], device=slots.device)
    return (slots - here).abs().to(torch.get_default_dtype()).mean(-1)


def adjacency(order: Int64[Tensor, "*b n"], height: int, width: int) -> Float[Tensor, "*b"]:
    """Share of neighbouring slots whose items are neighbours in a grid, side by side or one above the other.

    1 for a path that never jumps, such as a snake, a spiral or a Hilbert curve, and for their reverses; rows one
    after the other jump at the end of each, (width - 1) / width in a large grid. A single item gives 1. Random
    orders have 2 (2 - 1/height - 1/width) / (n - 1) on average.

    Shapes:
        b: any batch axes.  n: slots and items, n = height * width.
    Args:
        order: gather indices of the grid's cells in raster order.
        height, width: rows and columns of the grid.
    Returns:
        Share in [0, 1], of the default floating dtype, on the device of the input.
    Raises:
        ValueError: if it is no order of so many cells.
    Cost: O(n) after an O(n log n) check.
    Example:
        >>> adjacency(torch.tensor([[0, 1, 3, 2], [0, 1, 2, 3]]), 2, 2)
        tensor([1.0000, 0.6667])
    """
    check_order(order)
    if order.shape[-1] != height * width:
        raise ValueError(f"an order of {order.shape[-1]} items does not fit a {height}x{width} grid")
    if order.shape[-1] == 1:
        return torch.ones(order.shape[:-1], device=order.device)
    rows, columns = order // width, order % width
    steps = rows.diff(dim=-1).abs() + columns.diff(dim=-1).abs()
    return (steps == 1).to(torch.get_default_dtype()).mean(-1)


def _slots_in_other(order: Tensor, other: Tensor) -> Tensor:
    """Slot in `other` of the item that `order` puts into each slot, `[*e, n]`."""
    check_order(order)
    check_order(other)
    if order.shape[-1] != other.shape[-1]:
        raise ValueError(f"orders of {order.shape[-1]} and {other.shape[-1]} items cannot be compared")
    order, rank = torch.broadcast_tensors(order, invert(other))
    return rank.gather(-1, order)
