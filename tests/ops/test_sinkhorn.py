"""Sinkhorn in the log domain against the ratio form, closed forms and finite differences."""

from itertools import permutations

import numpy as np
import pytest
import torch

from permlab.ops.sinkhorn import sinkhorn
from permlab.permutation import order_to_matrix

INF = float("inf")


def ratio_form(log_scores, temperature, num_iters):
    """The definition: divide rows by their sums, then columns; differentiable, float64."""
    matrix = (log_scores / temperature).exp()
    for _ in range(num_iters):
        matrix = matrix / matrix.sum(-1, keepdim=True)
        matrix = matrix / matrix.sum(-2, keepdim=True)
    return matrix


def random_scores(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("n", [1, 2, 5, 17])
@pytest.mark.parametrize("num_iters", [1, 2, 20])
def test_values_and_gradients_of_the_ratio_form(batch, n, num_iters):
    scores = random_scores(*batch, n, n).requires_grad_()
    weight = random_scores(*batch, n, n)
    ours = sinkhorn(scores, temperature=0.4, num_iters=num_iters)
    theirs = ratio_form(scores, 0.4, num_iters)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    (gradient,) = torch.autograd.grad(ours, scores, weight)
    (expected,) = torch.autograd.grad(theirs, scores, weight)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("num_iters", [1, 4])
def test_gradient_by_finite_differences(num_iters):
    scores = random_scores(2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sinkhorn(s, temperature=0.7, num_iters=num_iters), scores)


def test_two_by_two_limit():
    """The limit [[p, 1-p], [1-p, p]] keeps the cross ratio: (p / (1-p))^2 = exp((a + d - b - c) / temperature)."""
    scores = torch.rand(50, 2, 2, dtype=torch.float64)
    (a, b), (c, d) = scores.movedim(0, -1)
    odds = ((a + d - b - c) / 0.5 / 2).exp()
    matrix = sinkhorn(scores, temperature=0.5, num_iters=100)
    torch.testing.assert_close(matrix[:, 0, 0], odds / (1 + odds), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix[:, 0, 1], 1 / (1 + odds), atol=1e-6, rtol=0)


def test_columns_are_exact_and_rows_converge():
    scores = random_scores(3, 9, 9, dtype=torch.float32)
    errors = []
    for num_iters in (1, 10, 100):
        matrix = sinkhorn(scores, temperature=1.0, num_iters=num_iters)
        torch.testing.assert_close(matrix.sum(-2), torch.ones(3, 9), atol=1e-6, rtol=0)
        errors.append(float((matrix.sum(-1) - 1).abs().max()))
    assert errors[0] > 1e-2
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_cold_limit_is_the_best_permutation():
    num_checked = 0
    for table in torch.randint(0, 10, (10, 4, 4)).double():
        totals = {order: sum(float(table[i, j]) for i, j in enumerate(order)) for order in permutations(range(4))}
        best, second = sorted(totals, key=totals.__getitem__, reverse=True)[:2]
        if totals[best] > totals[second]:
            num_checked += 1
            expected = order_to_matrix(torch.tensor(best), dtype=torch.float64)
            torch.testing.assert_close(sinkhorn(table, temperature=0.05, num_iters=500), expected, atol=2e-2, rtol=0)
    assert num_checked >= 5


def test_relabelling_rows_and_columns():
    scores, rows, columns = random_scores(6, 6), torch.randperm(6), torch.randperm(6)
    torch.testing.assert_close(
        sinkhorn(scores[rows][:, columns], temperature=0.3, num_iters=7),
        sinkhorn(scores, temperature=0.3, num_iters=7)[rows][:, columns],
    )


def test_forbidden_pairs_get_nothing():
    scores = random_scores(2, 5, 5)
    forbidden = torch.zeros(2, 5, 5, dtype=torch.bool)
    forbidden[0, 0, 1] = forbidden[0, 3, 3] = forbidden[1, 2, :4] = True
    scores[forbidden] = -INF
    scores.requires_grad_()
    weight = random_scores(2, 5, 5)
    matrix = sinkhorn(scores, temperature=0.5, num_iters=30)
    torch.testing.assert_close(matrix, ratio_form(scores, 0.5, 30))
    (gradient,) = torch.autograd.grad(matrix, scores, weight)
    assert (matrix[forbidden] == 0).all()
    assert (gradient[forbidden] == 0).all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-3


def test_no_perfect_matching_stays_finite():
    scores = torch.zeros(3, 3)
    scores[1:, 1:] = -INF
    matrix = sinkhorn(scores, temperature=0.5, num_iters=50)
    torch.testing.assert_close(matrix.sum(-2), torch.ones(3))
    assert (matrix.sum(-1) - 1).abs().max() > 0.5


@pytest.mark.parametrize("spread", [1.0, 100.0, 1e4])
def test_large_spreads_and_low_temperature_stay_finite(spread):
    scores = (spread * random_scores(4, 16, 16, dtype=torch.float32)).requires_grad_()
    matrix = sinkhorn(scores, temperature=1e-3, num_iters=20)
    torch.testing.assert_close(matrix.sum(-2), torch.ones(4, 16), atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(matrix, scores, torch.randn(4, 16, 16))
    assert matrix.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    scores = random_scores(3, 8, 8, dtype=dtype).requires_grad_()
    matrix = sinkhorn(scores, temperature=0.3, num_iters=20)
    exact = sinkhorn(scores.double(), temperature=0.3, num_iters=20)
    assert matrix.dtype == dtype
    torch.testing.assert_close(matrix.double(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)
    (gradient,) = torch.autograd.grad(matrix.square().sum(), scores)
    assert gradient.dtype == dtype


def test_equal_scores_are_uniform():
    torch.testing.assert_close(sinkhorn(torch.full((5, 5), 3.0), temperature=0.1, num_iters=1), torch.full((5, 5), 0.2))


def test_nothing_of_the_size_of_the_matrix_is_kept_per_sweep():
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    scores = random_scores(32, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sinkhorn(scores, temperature=0.5, num_iters=100)
    assert sum(saved) <= 3 * 32 * 32 + 200 * 32


def test_nan_is_handed_on():
    scores = torch.zeros(3, 3)
    scores[1, 1] = float("nan")
    assert sinkhorn(scores, temperature=0.5, num_iters=2).isnan().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": np.nan}, "temperature=nan"),
        ({"num_iters": 0}, "num_iters=0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(torch.zeros(2, 2), **({"temperature": 1.0, "num_iters": 1} | arguments))


def test_bad_scores(unchecked):
    row, column, infinite = (torch.zeros(2, 3, 3) for _ in range(3))
    row[1, 2] = -INF
    column[0, :, 1] = -INF
    infinite[1, 0, 2] = INF
    cases = [
        (row, r"row \[1, 2\]"),
        (column, r"column \[0, 1\]"),
        (infinite, r"row \[1, 0\]"),
        (torch.zeros(2, 3), r"shape \(2, 3\)"),
        (torch.zeros(3), r"shape \(3,\)"),
        (torch.zeros(0, 0), r"shape \(0, 0\)"),
        (torch.zeros(2, 2, dtype=torch.int64), "int64"),
    ]
    for scores, message in cases:
        with pytest.raises(ValueError, match=message):
            sinkhorn(scores, temperature=1.0, num_iters=1)
