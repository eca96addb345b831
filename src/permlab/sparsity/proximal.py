"""The 2:4 regulariser and its proximal operator, solved exactly by its cases."""

import torch
from jaxtyping import Float
from torch import Tensor

# Groups that are solved at a time, which fit a cache and bound the memory of the cases.
_PART = 2**16
# Newton's method from where it converges needs five steps or six; near a double root, which never wins, it halves.
_MAX_STEPS = 16
# Below 1, where one unknown of a case ends and the convex domain with it.
_END = 1 - 1e-4


def triple_products(weights: Float[Tensor, "k r"]) -> Float[Tensor, "g r"]:
    """Sum over the four choices of three of a group's four weights of the product of their magnitudes.

    It is 0 exactly where at most two weights of the group are not 0.

    Shapes:
        k: slots, a multiple of 4.  r: rows.  g: groups, k / 4.
    Source: Kübler et al. 2025, arXiv:2501.18015; Liu et al. 2025, arXiv:2502.00258 (ProxSparse).
    Differs from source: Nothing.
    Cost: O(k r).
    Example:
        >>> triple_products(torch.tensor([[1.0], [-2.0], [3.0], [0.0]]))
        tensor([[6.]])
    """
    return _triples(weights.abs().unflatten(0, (-1, 4)).unbind(1))


@torch.no_grad()
def shrink_to_two_of_four(weights: Float[Tensor, "k r"], strength: float) -> Float[Tensor, "k r"]:
    """Minimise half the squared distance to the weights plus `strength` times `triple_products`.

    The minimiser has the signs and the order of the magnitudes of the given weights, so it has two, three
    or four entries that are not 0. For two it keeps the two largest as they are. For three and four the
    stationary point with a positive definite Hessian is unique, as the Hessian is linear in the magnitudes
    and the points where it is positive definite are a convex set; Newton's method finds it. The best of the
    three cases is the minimiser.

    Shapes:
        k: slots, a multiple of 4.  r: rows.
    Args:
        weights: any floating dtype, finite.
        strength: of the regulariser, at least 0, in units of one over a weight.
    Returns:
        Weights of the same shape and dtype; computed in float32 at least.
    Raises:
        ValueError: if the strength is negative, or the slots are no groups of four.
    Source: Kübler et al. 2025, arXiv:2501.18015, proximal operator by enumeration of the cases; Liu et al. 2025,
        arXiv:2502.00258 (ProxSparse).
    Differs from source: three entries are found by the root of one function of one unknown, four by two
        equations in two unknowns, in place of up to 100 rounds of alternating minimisation, which may stop early
        or at a point that is no minimiser.
    Cost: O(k r), about 20 passes over the groups; memory beside the result is bounded.
    Example:
        >>> shrink_to_two_of_four(torch.tensor([[2.0], [0.1], [-1.0], [0.2]]), 1.0).flatten()
        tensor([ 2.,  0., -1.,  0.])
    """
    if strength < 0 or weights.shape[0] % 4:
        raise ValueError(f"strength={strength}, {weights.shape[0]} slots: expected at least 0, and groups of four")
    if strength == 0:
        return weights.clone()
    groups = weights.unflatten(0, (-1, 4)).movedim(1, 0).flatten(1)  # four magnitudes of every group
    parts = [_shrink(part, strength) for part in groups.split(_PART, dim=1)]
    shape = (4, weights.shape[0] // 4, *weights.shape[1:])
    return torch.cat(parts, dim=1).view(shape).movedim(0, 1).flatten(0, 1)


def _shrink(groups: Float[Tensor, "4 g"], strength: float) -> Float[Tensor, "4 g"]:
    """Groups side by side; magnitudes times the strength are the unknowns, which makes the strength 1."""
    wide = groups.to(torch.promote_types(groups.dtype, torch.float32))
    given, places = (wide.abs() * strength).sort(0, descending=True)
    a, b, c, d = given
    zero = torch.zeros_like(a)
    cases = torch.stack([torch.stack(case) for case in ((a, b, zero, zero), _three(a, b, c), _four(a, b, c, d))])
    cost = (cases - given).square().sum(1) / 2 + _triples(cases.unbind(1))
    cost = cost.masked_fill((cases < 0).any(1) | ~torch.isfinite(cost), torch.inf)
    best = cases.gather(0, cost.argmin(0).expand(1, 4, -1)).squeeze(0)
    shrunk = torch.empty_like(best).scatter_(0, places, best)
    # What is kept whole is given back to the bit.
    kept = shrunk == wide.abs() * strength
    return torch.where(kept, wide, shrunk / strength * wide.sign()).to(groups.dtype)


def _triples(magnitudes: tuple[Tensor, ...]) -> Tensor:
    a, b, c, d = magnitudes
    return a * b * (c + d) + c * d * (a + b)


def _three(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """The case of three: two unknowns follow from the smallest, s, by a linear system in their sum and difference.

    What is left is a function of s that is first convex and then concave, steepest at a known place; from
    there Newton's method runs towards the root monotonically. Its slope is that of a minimum where positive.
    """
    total, apart = a + b, a - b
    ratio = (total / apart.clamp_min(torch.finfo(a.dtype).tiny)).clamp_max(1e12).sqrt()
    s = ((ratio - 1) / (ratio + 1)).clamp_max(_END)
    for _ in range(_MAX_STEPS):
        plus, minus = total / (1 + s), apart / (1 - s)
        value = s - c + (plus.square() - minus.square()) / 4
        slope = 1 - (plus.square() / (1 + s) + minus.square() / (1 - s)) / 2
        new = (s - value / slope.clamp_min(1e-6)).clamp(0, _END)
        moved, s = (new - s).abs().max(), new
        if moved < 1e-6:
            break
    plus, minus = total / (1 + s), apart / (1 - s)
    return (plus + minus) / 2, (plus - minus) / 2, s, torch.zeros_like(s)


def _four(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """The case of four: the differences within the two pairs follow from the sums u and s of the two.

    Newton's method starts at 0 for half of the given weights, whose solution is on the way to that of all.
    """
    u = s = torch.zeros_like(a)
    for step in range(_MAX_STEPS):
        part = 0.5 if step == 0 else 1.0
        upper, lower = part * (a - b) / (1 - s), part * (c - d) / (1 - u)  # differences within the pairs
        one = u * (1 + s) + (s * s - lower.square()) / 2 - part * (a + b)
        two = s * (1 + u) + (u * u - upper.square()) / 2 - part * (c + d)
        du, ds, cross = 1 + s - lower.square() / (1 - u), 1 + u - upper.square() / (1 - s), u + s
        det = du * ds - cross * cross
        det = torch.where(det.abs() < 1e-6, 1e-6, det)
        new_u = (u - (ds * one - cross * two) / det).clamp(0, _END)
        new_s = (s - (du * two - cross * one) / det).clamp(0, _END)
        moved = torch.maximum((new_u - u).abs().max(), (new_s - s).abs().max())
        u, s = new_u, new_s
        if moved < 1e-6:
            break
    upper, lower = (a - b) / (1 - s), (c - d) / (1 - u)
    return (u + upper) / 2, (u - upper) / 2, (s + lower) / 2, (s - lower) / 2
