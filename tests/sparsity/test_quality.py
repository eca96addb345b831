"""Measures of an order against a published yardstick, loops over every group, and outputs computed from the inputs."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from permlab.sparsity.quality import efficacy, reconstruction_error, retained

# Sums that the permutation tests of NVIDIA's apex print for a 128 x 64 matrix from numpy's seed 1, at 2:4.
TOTAL, BOUND, DEFAULT = 4083.169, 3042.332, 2852.377


def yardstick():
    return torch.from_numpy(np.random.RandomState(1).rand(128, 64))


def kept_by_loops(scores, order, n, m):
    total = 0.0
    for row in scores.tolist():
        permuted = [row[j] for j in order.tolist()]
        for start in range(0, len(permuted), m):
            total += sum(sorted(permuted[start : start + m])[-n:])
    return total


def test_yardstick():
    scores, identity = yardstick(), torch.arange(64)
    assert float(scores.sum()) == pytest.approx(TOTAL, abs=6e-4)
    assert retained(scores, identity, n=2, m=4) == pytest.approx(DEFAULT / TOTAL, abs=5e-7)
    assert efficacy(scores, identity, n=2, m=4) == 0.0
    for seed in range(5):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        kept = kept_by_loops(scores, order, 2, 4)
        assert retained(scores, order, n=2, m=4) == pytest.approx(kept / float(scores.sum()), rel=1e-12)
        assert efficacy(scores, order, n=2, m=4) == pytest.approx((kept - DEFAULT) / (BOUND - DEFAULT), abs=1e-5)


@pytest.mark.parametrize(("width", "n", "m"), [(8, 2, 4), (12, 1, 4), (12, 5, 6), (64, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_against_loops(width, n, m, dtype):
    scores, order, identity = torch.rand(7, width).to(dtype), torch.randperm(width), torch.arange(width)
    kept, default = (kept_by_loops(scores, o, n, m) for o in (order, identity))
    bound = sum(sum(sorted(row)[-round(width * n / m) :]) for row in scores.tolist())
    total = sum(map(sum, scores.tolist()))
    assert retained(scores, order, n=n, m=m) == pytest.approx(kept / total, rel=1e-12)
    assert efficacy(scores, order, n=n, m=m) == pytest.approx((kept - default) / (bound - default), rel=1e-9, abs=1e-12)


def test_all_orders_stay_below_the_bound_and_the_best_reaches_it():
    """Rows that agree on which half is best: then some order keeps the whole half of every row."""
    scores = torch.rand(5, 6)
    scores[:, :3] += 2
    values = {order: efficacy(scores, torch.tensor(order), n=1, m=2) for order in permutations(range(6))}
    assert max(values.values()) == pytest.approx(1.0, abs=1e-12)
    best = max(values, key=values.__getitem__)
    assert all((first < 3) != (second < 3) for first, second in zip(best[::2], best[1::2], strict=True))
    assert values[(1, 0, 2, 3, 5, 4)] == pytest.approx(0.0, abs=1e-12)  # swaps within groups


def test_an_order_can_be_worse_than_the_default():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [4.0, 3.0, 1.0, 2.0]])
    assert efficacy(scores, torch.tensor([0, 2, 1, 3]), n=1, m=2) == pytest.approx(0.0)
    assert efficacy(scores, torch.tensor([0, 3, 1, 2]), n=1, m=2) == pytest.approx(1.0)
    skewed = torch.tensor([[4.0, 1.0, 3.0, 2.0], [4.0, 1.0, 3.0, 2.0], [4.0, 3.0, 1.0, 2.0]])
    assert efficacy(skewed, torch.tensor([0, 2, 1, 3]), n=1, m=2) == pytest.approx(-1.0)


def test_nothing_to_gain():
    scores = torch.tensor([[0.3, 0.0, 0.1, 0.0], [0.7, 0.0, 0.6, 0.0]])
    assert efficacy(scores, torch.tensor([2, 3, 0, 1]), n=1, m=2) == 1.0
    assert efficacy(scores, torch.tensor([0, 2, 1, 3]), n=1, m=2) == -math.inf
    zero = torch.zeros(2, 4)
    assert retained(zero, torch.arange(4), n=2, m=4) == 1.0
    assert efficacy(zero, torch.arange(4), n=2, m=4) == 1.0


def test_rounding_is_no_gain():
    """The better half of every row, one in every pair: the default is the bound, but for the order of the sum."""
    for _ in range(20):
        ordered = torch.rand(200, 32, dtype=torch.float64).sort(dim=1, descending=True).values
        scores = torch.stack([ordered[:, :16], ordered[:, 16:]], -1).flatten(1)
        pairs = torch.randperm(16)
        assert efficacy(scores, torch.stack([2 * pairs, 2 * pairs + 1], -1).flatten(), n=1, m=2) == 1.0


def test_scores_are_left_alone():
    scores = torch.rand(3, 8)
    before = scores.clone()
    retained(scores, torch.arange(8), n=2, m=4)
    efficacy(scores, torch.arange(8), n=2, m=4)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("measure", [retained, efficacy])
def test_bad_arguments(measure, unchecked):
    nan, negative, infinite = (torch.ones(3, 8) for _ in range(3))
    nan[1, 2], negative[2, 0], infinite[0, 7] = float("nan"), -1.0, float("inf")
    identity = torch.arange(8)
    cases = [
        (nan, identity, 2, r"score at \[1, 2\] is nan"),
        (negative, identity, 2, r"score at \[2, 0\] is -1.0"),
        (infinite, identity, 2, r"score at \[0, 7\] is inf"),
        (torch.ones(8), identity, 2, r"shape \(8,\)"),
        (torch.ones(0, 8), identity, 2, r"shape \(0, 8\)"),
        (torch.ones(3, 8, dtype=torch.int64), identity, 2, "int64"),
        (torch.ones(3, 8), torch.arange(4), 2, r"order of shape \(4,\) does not fit scores of shape \(3, 8\)"),
        (torch.ones(3, 8), torch.zeros(8, dtype=torch.int64), 2, "index 1 is missing"),
        (torch.ones(3, 8), identity, 4, "n=4 of every m=4"),
        (torch.ones(3, 10), torch.arange(10), 2, "m=4 does not divide the width 10"),
    ]
    for scores, order, n, message in cases:
        with pytest.raises(ValueError, match=message):
            measure(scores, order, n=n, m=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reconstruction_error_is_that_of_the_outputs(dtype):
    weight, inputs = torch.randn(5, 12).to(dtype), torch.randn(40, 12).double() @ torch.randn(12, 12).double()
    pruned = weight * (torch.rand(5, 12) < 0.5) + 0.1
    outputs, ours = inputs @ weight.double().T, inputs @ pruned.double().T
    expected = float(torch.linalg.norm(outputs - ours) / torch.linalg.norm(outputs))
    for hessian, tolerance in ((inputs.T @ inputs, 1e-10), ((inputs.T @ inputs).float(), 1e-5)):
        assert reconstruction_error(weight, pruned, hessian) == pytest.approx(expected, rel=tolerance)


def test_reconstruction_error_at_its_ends():
    weight, inputs = torch.randn(5, 8), torch.randn(40, 8)
    hessian = inputs.T @ inputs
    assert reconstruction_error(weight, weight, hessian) == 0.0
    assert reconstruction_error(weight, torch.zeros(5, 8), hessian) == pytest.approx(1.0)
    assert reconstruction_error(weight, torch.zeros(5, 8), torch.zeros(8, 8)) == 0.0
    assert reconstruction_error(torch.zeros(5, 8), weight, hessian) == math.inf
    unseen = hessian.clone()
    unseen[3], unseen[:, 3] = 0, 0
    changed = weight.clone()
    changed[:, 3] = 7
    assert reconstruction_error(weight, changed, unseen) == 0.0


def test_reconstruction_error_of_bad_arguments(unchecked):
    weight, hessian = torch.ones(3, 4), torch.eye(4)
    cases = [
        (weight, torch.ones(3, 5), hessian, r"pruned weight of shape \(3, 5\)"),
        (weight, weight, torch.eye(3), r"Hessian of shape \(3, 3\)"),
        (weight.long(), weight, hessian, "the weight is a floating-point matrix"),
        (weight, weight / 0, hessian, "the pruned weight is not finite"),
        (weight, weight, hessian / 0, "the Hessian is not finite"),
        (torch.ones(4), weight, hessian, r"shape \(4,\)"),
    ]
    for dense, pruned, curvature, message in cases:
        with pytest.raises(ValueError, match=message):
            reconstruction_error(dense, pruned, curvature)
