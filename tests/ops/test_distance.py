"""Distances between orders against scipy and plain loops."""

import itertools

import pytest
import torch
from scipy.stats import kendalltau

from permlab.ops.distance import adjacency, displacement, kendall
from permlab.ops.scan_order import scan_order
from permlab.permutation import invert


def random_orders(*shape):
    return torch.rand(*shape).argsort(-1)


@pytest.mark.parametrize("n", [2, 3, 17, 64])
def test_kendall_agrees_with_scipy_on_ranks(n):
    orders, others = random_orders(5, n), random_orders(5, n)
    expected = [kendalltau(invert(a), invert(b)).statistic for a, b in zip(orders, others, strict=True)]
    assert kendall(orders, others).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_displacement_agrees_with_a_loop(n):
    orders, others = random_orders(4, n), random_orders(4, n)
    expected = [
        sum(abs(a.index(item) - b.index(item)) for item in range(n)) / n
        for a, b in zip(orders.tolist(), others.tolist(), strict=True)
    ]
    assert displacement(orders, others).tolist() == pytest.approx(expected)


def test_extremes():
    order = random_orders(9)
    assert kendall(order, order) == 1
    assert kendall(order, order.flip(0)) == -1
    assert displacement(order, order) == 0
    assert displacement(order, order.flip(0)) == pytest.approx(40 / 9)


def test_a_single_item_never_moves():
    one = torch.zeros(3, 1, dtype=torch.int64)
    assert kendall(one, one[0]).tolist() == [1, 1, 1]
    assert displacement(one, one[0]).tolist() == [0, 0, 0]


def test_renaming_the_items_changes_nothing():
    order, other, name = random_orders(3, 11)
    assert kendall(name[order], name[other]) == kendall(order, other)
    assert displacement(name[order], name[other]) == displacement(order, other)


@pytest.mark.parametrize("distance", [kendall, displacement])
def test_batch_axes_broadcast(distance):
    orders, others = random_orders(3, 1, 7), random_orders(2, 7)
    result = distance(orders, others)
    assert result.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            assert result[i, j] == distance(orders[i, 0], others[j])


@pytest.mark.parametrize("distance", [kendall, displacement])
def test_bad_input(distance, unchecked):
    order = torch.arange(3)
    with pytest.raises(ValueError, match="3 and 4 items"):
        distance(order, torch.arange(4))
    with pytest.raises(ValueError, match=r"\[0, 0, 1\]"):
        distance(order, torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="float32"):
        distance(order.float(), order)


@pytest.mark.parametrize(("height", "width"), [(1, 2), (3, 4), (8, 8), (5, 1)])
def test_adjacency_agrees_with_a_loop(height, width):
    orders = random_orders(6, height * width)
    expected = []
    for order in orders.tolist():
        cells = [divmod(item, width) for item in order]
        pairs = list(itertools.pairwise(cells))
        expected.append(sum(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in pairs) / len(pairs))
    assert adjacency(orders, height, width).tolist() == pytest.approx(expected)


def test_adjacency_of_scans_and_of_random_orders():
    for name in ("snake", "spiral", "hilbert", "reverse_spiral"):
        assert adjacency(scan_order(name, 8, 8), 8, 8) == 1, name
    for name in ("row", "column", "reverse_row"):
        assert adjacency(scan_order(name, 8, 8), 8, 8) == pytest.approx(56 / 63), name
    assert adjacency(random_orders(4000, 64), 8, 8).mean() == pytest.approx(3.5 / 63, abs=0.002)
    assert adjacency(torch.tensor([0]), 1, 1) == 1
    with pytest.raises(ValueError, match="an order of 4 items does not fit a 1x3 grid"):
        adjacency(torch.arange(4), 1, 3)
