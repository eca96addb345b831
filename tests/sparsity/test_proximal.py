"""The proximal operator of the 2:4 regulariser against descent from many starts, and what it does to weights."""

import itertools

import pytest
import torch
from torch import Tensor

from permlab.sparsity.proximal import shrink_to_two_of_four, triple_products


def triples(weights: Tensor) -> Tensor:
    """By definition, for groups in the last axis."""
    return sum(weights[..., list(three)].abs().prod(-1) for three in itertools.combinations(range(4), 3))


def objective(found: Tensor, given: Tensor, strength: float) -> Tensor:
    return (found - given).square().sum(-1) / 2 + strength * triples(found)


def descend(given: Tensor, strength: float) -> Tensor:
    """Least objective over all supports, from many starts by projected gradient descent on the magnitudes."""
    size = given.abs()
    supports = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=given.dtype).view(16, 1, 1, 4)
    z = torch.rand(16, 20, *given.shape, dtype=given.dtype) * size * supports
    for _ in range(200):
        a, b, c, d = z.unbind(-1)
        pull = torch.stack(
            [b * c + b * d + c * d, a * c + a * d + c * d, a * b + a * d + b * d, a * b + a * c + b * c], -1
        )
        step = 0.15 / max(1.0, strength * float(size.max()))
        z = (z - step * (z - size + strength * pull)).clamp_min(0) * supports
    return objective(z, size, strength).flatten(0, 1).amin(0)


@pytest.mark.parametrize("strength", [0.05, 0.6, 1.0, 3.0])
def test_no_descent_from_anywhere_ends_below(strength: float) -> None:
    given = torch.randn(24, 4, dtype=torch.float64)
    given[:8] = 0.2 * given[:8] + torch.sign(given[:8])  # nearly equal: three and four are close calls
    found = shrink_to_two_of_four(given.flatten().unsqueeze(-1), strength).view(-1, 4)
    assert (objective(found, given, strength) <= descend(given, strength) + 1e-9).all()


@pytest.mark.parametrize(("strength", "kept"), [(0.01, 4), (1.0, 3), (100.0, 2)])
def test_the_stronger_it_is_the_fewer_are_left(strength: float, kept: int) -> None:
    given = torch.tensor([1.0, -0.99, 0.98, 0.97]).unsqueeze(-1)
    found = shrink_to_two_of_four(given, strength)
    assert int((found != 0).sum()) == kept
    assert (found * given >= 0).all()
    if kept == 2:
        assert torch.equal(found.flatten(), torch.tensor([1.0, -0.99, 0.0, 0.0])), "kept as they are, to the bit"


def test_order_signs_and_layout() -> None:
    """Groups are four slots below each other; what one group holds does not touch another."""
    given = torch.randn(12, 5, dtype=torch.float64)
    found = shrink_to_two_of_four(given, 0.7)
    for group in range(3):
        for row in range(5):
            rows = slice(4 * group, 4 * group + 4)
            alone = shrink_to_two_of_four(given[rows, row : row + 1], 0.7)
            assert torch.allclose(found[rows, row : row + 1], alone)
            assert (
                torch.equal(alone.abs().argsort(0), given[rows, row : row + 1].abs().argsort(0)) or (alone == 0).any()
            )
    flipped = torch.where(torch.rand(12, 5) < 0.5, -1.0, 1.0).double()
    assert torch.allclose(shrink_to_two_of_four(given * flipped, 0.7), found * flipped)
    assert torch.allclose(triple_products(given)[0], triples(given[:4].mT))


def test_nothing_happens_to_what_is_two_of_four_or_without_strength() -> None:
    sparse = torch.tensor([0.3, 0.0, 0.0, -2.0]).unsqueeze(-1)
    assert torch.equal(shrink_to_two_of_four(sparse, 50.0), sparse)
    given = torch.randn(8, 3)
    assert torch.equal(shrink_to_two_of_four(given, 0.0), given)


def test_repeated_steps_end_at_two_of_four() -> None:
    weights = torch.randn(16, 6)
    for _ in range(60):
        weights = shrink_to_two_of_four(weights, 0.2)
    assert ((weights != 0).unflatten(0, (-1, 4)).sum(1) == 2).all()


@pytest.mark.parametrize(("shape", "strength"), [((6, 1), 1.0), ((4, 1), -1.0)])
def test_what_is_refused(shape: tuple[int, int], strength: float) -> None:
    with pytest.raises(ValueError, match="expected at least 0, and groups of four"):
        shrink_to_two_of_four(torch.ones(shape), strength)
