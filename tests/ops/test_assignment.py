"""Assignment against a search through all permutations."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from permlab.ops.assignment import assign
from permlab.permutation import check_order, order_to_matrix

INF = float("inf")


def total(scores, order):
    return sum(scores[slot][item] for slot, item in enumerate(order))


def best_total(scores):
    return max(total(scores, order) for order in permutations(range(len(scores))))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_as_good_as_the_best_of_all_permutations(n, batch):
    scores = torch.randn(*batch, n, n, dtype=torch.float64)
    orders = assign(scores)
    check_order(orders)
    assert orders.shape == (*batch, n)
    for table, order in zip(scores.reshape(-1, n, n).tolist(), orders.reshape(-1, n).tolist(), strict=True):
        assert total(table, order) == pytest.approx(best_total(table))


def costs(kind, n, generator):
    table = torch.randn(20, n, n, dtype=torch.float64, generator=generator)
    if kind == "ties":
        return table.round()
    if kind == "forbidden":
        return table.masked_fill(torch.rand(table.shape, generator=generator) < 0.5, -INF)
    if kind == "heavy":
        return table.abs() ** 20
    if kind == "rank one":
        return table[:, :1] * table[:, :, :1]
    return table


@pytest.mark.parametrize("kind", ["normal", "ties", "forbidden", "heavy", "rank one"])
@pytest.mark.parametrize("n", [1, 2, 7, 16, 17, 50])
def test_as_good_as_scipy(kind, n):
    for table in costs(kind, n, torch.Generator().manual_seed(n)):
        try:
            rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
        except ValueError:
            with pytest.raises(ValueError, match="leave no permutation"):
                assign(table)
            continue
        order = assign(table)
        check_order(order)
        found = table[torch.arange(n), order].sum().item()
        scale = table[table.isfinite()].abs().max().item()
        np.testing.assert_allclose(found, table.numpy()[rows, columns].sum(), rtol=1e-9, atol=1e-9 * scale)


def test_recovers_the_order_of_a_permutation_matrix():
    order = torch.stack([torch.randperm(17) for _ in range(4)])
    assert torch.equal(assign(order_to_matrix(order)), order)


def test_ties_are_broken_the_same_way_and_stay_optimal():
    scores = torch.randint(0, 2, (20, 5, 5)).float()
    orders = assign(scores)
    assert torch.equal(assign(scores.clone()), orders)
    check_order(orders)
    for table, order in zip(scores.tolist(), orders.tolist(), strict=True):
        assert total(table, order) == best_total(table)


# Every kind has ties: equal scores, few values, blocks of equal ones, sums of a row's and a column's.
TIED = {
    "constant": lambda n: torch.full((n, n), 0.1, dtype=torch.float64),
    "zero or one": lambda n: (torch.rand(n, n) < 0.8).double(),
    "few values": lambda n: torch.randint(-1, 2, (n, n)).double() / 3,
    "blocks": lambda n: torch.block_diag(torch.ones(n // 2, n // 2), torch.ones(n - n // 2, n - n // 2)).double(),
    "sums": lambda n: torch.randn(n, 1, dtype=torch.float64) + torch.randn(1, n, dtype=torch.float64),
    "forbidden": lambda n: torch.zeros(n, n, dtype=torch.float64).masked_fill(torch.rand(n, n) < 0.3, -INF),
    "diagonal": lambda n: torch.eye(n, dtype=torch.float64) + torch.randint(0, 2, (n, n)),
}


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_identity_where_no_permutation_is_better(kind, n):
    found = 0
    tables = [table for table in (TIED[kind](n) for _ in range(30)) if best_total(table.tolist()) > -INF]
    orders = assign(torch.stack(tables)) if tables else []
    for table, order in zip(tables, orders, strict=True):
        best, rows = best_total(table.tolist()), table.tolist()
        assert total(rows, order.tolist()) == pytest.approx(best, abs=1e-12)
        assert torch.equal(assign(table), order)
        if total(rows, range(n)) >= best - 1e-12:
            found += 1
            assert order.tolist() == list(range(n))
    assert found > 0


@pytest.mark.parametrize("n", [17, 196])
def test_equal_scores_move_nothing_at_any_size(n):
    tables = torch.stack([torch.zeros(n, n), torch.full((n, n), 1e20), torch.rand(n, 1).expand(n, n)])
    assert torch.equal(assign(tables), torch.arange(n).expand(3, n))


def test_a_better_permutation_is_taken_however_small_its_gain():
    # The gain of one pair is lost in the sum of all scores, not in that of the pair.
    scores = torch.diag(torch.tensor([1e20, 1.0, 1.0], dtype=torch.float64))
    scores[1, 2] = scores[2, 1] = 1 + 1e-12
    assert assign(scores).tolist() == [0, 2, 1]


def test_forbidden_pairs_are_avoided_at_any_price():
    scores = torch.randn(30, 4, 4, dtype=torch.float64)
    scores[torch.rand(scores.shape) < 0.3] = -INF
    feasible = [table for table in scores if best_total(table.tolist()) > -INF]
    assert 5 < len(feasible) < 30
    for table in feasible:
        assert total(table.tolist(), assign(table).tolist()) == pytest.approx(best_total(table.tolist()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_floating_dtype(dtype):
    scores = torch.randn(6, 5, 5).to(dtype)
    orders = assign(scores)
    assert orders.dtype == torch.int64
    assert torch.equal(orders, assign(scores.double()))


def test_no_gradient_and_no_change_of_the_input():
    scores = torch.randn(3, 3, requires_grad=True)
    before = scores.detach().clone()
    assert not assign(scores).requires_grad
    assert torch.equal(scores, before)


def test_an_empty_batch_has_no_orders():
    assert assign(torch.zeros(0, 3, 3)).shape == (0, 3)


def test_bad_input(unchecked):
    nan, infinite, infeasible = (torch.zeros(2, 3, 3) for _ in range(3))
    nan[1, 0, 2] = float("nan")
    infinite[0, 2, 1] = INF
    infeasible[1, 1:, 1:] = -INF
    cases = [
        (nan, r"score nan at \[1, 0, 2\]"),
        (infinite, r"score inf at \[0, 2, 1\]"),
        (infeasible, r"matrix \[1\] leave no permutation"),
        (torch.zeros(2, 3), r"shape \(2, 3\)"),
        (torch.zeros(2), r"shape \(2,\)"),
        (torch.zeros(1, 0, 0), r"shape \(1, 0, 0\)"),
        (torch.zeros(2, 2, dtype=torch.int64), "int64"),
    ]
    for scores, message in cases:
        with pytest.raises(ValueError, match=message):
            assign(scores)
