"""How good a channel order or a pruned weight is, without running the model."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from permlab.ops.nm import nm_mask
from permlab.permutation import check_order
from permlab.sparsity.importance import check_scores


def retained(scores: Float[Tensor, "o i"], order: Int64[Tensor, " i"], *, n: int, m: int) -> float:
    """Fraction of the total score that an N:M mask keeps under a channel order.

    A proxy: among good orders, one that retains more may reconstruct the layer's output worse.

    Shapes:
        o: outputs.  i: input channels, a multiple of m.
    Args:
        scores: importance of every weight, not negative.
        order: gather indices of the channels.
        n: entries kept of every m, at least 1 and below m.
        m: length of a group, divides the channels.
    Returns:
        A number between 0 and 1; 1 where all scores are 0, since nothing is lost. Summed in float64.
    Raises:
        ValueError: if the scores are no floating-point matrix, negative or not finite, if n and
            m are no pattern for their width, or if the order is no permutation of it.
    Source: Pool & Yu 2021, Channel permutations for N:M sparsity (NeurIPS).
    Differs from source: a fraction, not a sum.
    Cost: O(o i m).
    Example:
        >>> retained(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([0, 2, 1, 3]), n=1, m=2)
        0.7
    """
    check_scores(scores)
    total = scores.sum(dtype=torch.float64).item()
    kept = _kept(scores, _checked_order(scores, order), n, m)
    return kept / total if total > 0 else 1.0


def efficacy(scores: Float[Tensor, "o i"], order: Int64[Tensor, " i"], *, n: int, m: int) -> float:
    """Share of what the best imaginable channel order would gain over the default that this one does gain.

    0 is the default order, in which the channels come. 1 is every row keeping its n/m highest scores
    wherever they are, which bounds all orders and may be out of reach. An order that keeps less than
    the default is negative.

    Shapes:
        o: outputs.  i: input channels, a multiple of m.
    Args:
        scores: importance of every weight, not negative.
        order: gather indices of the channels.
        n: entries kept of every m, at least 1 and below m.
        m: length of a group, divides the channels.
    Returns:
        A number up to 1, see `efficacy_of_sums`.
    Raises:
        ValueError: as for `retained`.
    Source: Pool & Yu 2021, Channel permutations for N:M sparsity (NeurIPS), efficacy.
    Differs from source: Nothing; theirs is in percent.
    Cost: O(o i m), and a selection in every row.
    Example:
        >>> scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [3.0, 4.0, 2.0, 1.0]])
        >>> efficacy(scores, torch.tensor([0, 2, 1, 3]), n=1, m=2)
        1.0
    """
    check_scores(scores)
    width = scores.shape[1]
    kept = _kept(scores, _checked_order(scores, order), n, m)
    default = _kept(scores, torch.arange(width, device=scores.device), n, m)
    bound = scores.topk(width // m * n, dim=1, sorted=False).values.sum(dtype=torch.float64).item()
    return efficacy_of_sums(kept, default, bound)


def efficacy_of_sums(kept: float, default: float, bound: float) -> float:
    """Efficacy of an order, or of the orders of several layers together, from sums of scores.

    Args:
        kept: under the order.
        default: under the default order.
        bound: of what every row's n/m highest scores add up to.
    Returns:
        `(kept - default) / (bound - default)`. Where the default order reaches the bound, up to the rounding
        of sums in float64: 1 if the order does too, minus infinity if it does not.
    Example:
        >>> efficacy_of_sums(kept=7.0, default=6.0, bound=8.0)
        0.5
    """
    # The same scores summed in another order differ by rounding, which is no room for a gain.
    rounding = 1e-12 * bound
    if bound - default <= rounding:
        return 1.0 if bound - kept <= rounding else -math.inf
    return (kept - default) / (bound - default)


def reconstruction_error(
    weight: Float[Tensor, "o i"], pruned: Float[Tensor, "o i"], hessian: Float[Tensor, "i i"]
) -> float:
    """Relative error of a layer's output over the inputs that the Hessian sums up.

    `||(weight - pruned) X^T|| / ||weight X^T||` in the Frobenius norm, without the inputs X.

    Shapes:
        o: outputs.  i: input channels.
    Args:
        weight: dense weight.
        pruned: the weight that replaces it, columns in the same order.
        hessian: `X^T X` summed over tokens; of held-out ones for an honest error.
    Returns:
        0 where both weights give the same output; infinity where only the dense one gives none.
        Computed in float32 at least, summed in float64.
    Raises:
        ValueError: if shapes do not fit, or something is not floating point or not finite.
    Source: layer-wise error of Frantar & Alistarh 2023, arXiv:2301.00774, eq. 1.
    Differs from source: relative to the dense output, and its square root.
    Cost: O(o i^2).
    Example:
        >>> reconstruction_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]]), torch.eye(2))
        0.6
    """
    _check_layer(weight, pruned, hessian)
    wide = torch.float32
    for tensor in (weight, pruned, hessian):
        wide = torch.promote_types(wide, tensor.dtype)
    lost = _energy(weight.to(wide) - pruned.to(wide), hessian.to(wide))
    whole = _energy(weight.to(wide), hessian.to(wide))
    if lost == 0:
        return 0.0
    return math.sqrt(lost / whole) if whole > 0 else math.inf


def _energy(rows: Tensor, hessian: Tensor) -> float:
    """`tr(R H R^T)`; rounding can take a sum that is zero below it."""
    return max(0.0, ((rows @ hessian) * rows).sum(dtype=torch.float64).item())


def _kept(scores: Tensor, order: Tensor, n: int, m: int) -> float:
    permuted = scores[:, order]
    return permuted.masked_fill_(~nm_mask(permuted, n=n, m=m), 0).sum(dtype=torch.float64).item()


def _checked_order(scores: Tensor, order: Tensor) -> Tensor:
    check_order(order)
    if order.shape != scores.shape[1:]:
        raise ValueError(f"an order of shape {tuple(order.shape)} does not fit scores of shape {tuple(scores.shape)}")
    return order.to(scores.device)


def _check_layer(weight: Tensor, pruned: Tensor, hessian: Tensor) -> None:
    for name, tensor in (("weight", weight), ("pruned weight", pruned), ("Hessian", hessian)):
        if not tensor.is_floating_point() or tensor.ndim != 2 or tensor.numel() == 0:
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"the {name} is a floating-point matrix, got {found}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the {name} is not finite")
    if pruned.shape != weight.shape:
        raise ValueError(
            f"a pruned weight of shape {tuple(pruned.shape)} does not replace one of {tuple(weight.shape)}"
        )
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"a Hessian of shape {tuple(hessian.shape)} does not fit weights of {tuple(weight.shape)}")
