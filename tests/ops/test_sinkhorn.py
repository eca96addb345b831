"""Sinkhorn, compiled and in torch, against its ratio form, logarithms, closed forms and finite differences."""

from itertools import permutations

import numpy as np
import pytest
import torch

from permlab.ops import sinkhorn as module
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


def log_form(log_scores, temperature, num_iters):
    """The same by logarithms, which bear any temperature; differentiable, float64."""
    shifted = log_scores.double() / temperature
    for _ in range(num_iters):
        shifted = shifted - shifted.logsumexp(-1, keepdim=True)
        shifted = shifted - shifted.logsumexp(-2, keepdim=True)
    return shifted.exp()


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def implementation(request, monkeypatch):
    """Every test runs with both."""
    if request.param == "torch":
        monkeypatch.setattr(module, "is_readable", lambda tensor: False)
    return request.param


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
@pytest.mark.parametrize(
    ("temperature", "spread", "num_iters"), [(0.01, 1, 30), (1e-3, 1, 50), (0.1, 30, 5), (1e-3, 1e4, 8)]
)
def test_cold_values_and_gradients_by_logarithms(implementation, dtype, tolerance, temperature, spread, num_iters):
    """Cold enough for the weights of most pairs to vanish in float32, and for scalings to leave its range."""
    if implementation == "torch" and dtype == torch.float32:
        pytest.skip("in torch, the precision is that of logarithms in float32")
    scores = (spread * random_scores(3, 24, 24)).to(dtype).requires_grad_()
    weight = random_scores(3, 24, 24).to(dtype)
    matrix = sinkhorn(scores, temperature=temperature, num_iters=num_iters)
    expected = log_form(scores, temperature, num_iters)
    torch.testing.assert_close(matrix.double(), expected, atol=tolerance + 1e-15 * spread / temperature, rtol=0)
    (gradient,) = torch.autograd.grad(matrix, scores, weight)
    (reference,) = torch.autograd.grad(expected, scores, weight.double())
    # Logarithms are rounded by 1e-16 spread / temperature; gradients are larger than values by 1 / temperature.
    rounding = (1e-15 * spread / temperature + 8 * torch.finfo(dtype).eps) / temperature
    atol = tolerance * float(reference.abs().max()) + rounding
    torch.testing.assert_close(gradient.double(), reference.double(), atol=atol, rtol=0)


def test_a_chain_of_far_scalings():
    """Shifts of whole rows and columns, which a doubly stochastic limit does not see, drive the scalings apart."""
    scores = random_scores(2, 12, 12)
    shifted = scores + 300 * random_scores(2, 12, 1) + 300 * random_scores(2, 1, 12)
    kwargs = {"temperature": 0.5, "num_iters": 400}
    torch.testing.assert_close(sinkhorn(shifted, **kwargs), sinkhorn(scores, **kwargs), atol=1e-8, rtol=0)


def test_the_same_bits_with_any_number_of_threads(implementation):
    if implementation == "torch":
        pytest.skip("torch promises none")
    scores = random_scores(16, 64, 64, dtype=torch.float32).requires_grad_()
    results = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        matrix = sinkhorn(scores, temperature=0.1, num_iters=20)
        results.append([matrix, *torch.autograd.grad(matrix.square().sum(), scores)])
    torch.set_num_threads(1)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_no_batch_and_odd_strides():
    scores = random_scores(6, 6, 4).permute(2, 1, 0).requires_grad_()
    matrix = sinkhorn(scores, temperature=0.5, num_iters=5)
    torch.testing.assert_close(matrix, ratio_form(scores, 0.5, 5))
    assert sinkhorn(torch.zeros(0, 3, 3), temperature=1.0, num_iters=1).shape == (0, 3, 3)


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


def test_what_is_kept_for_the_gradient_does_not_grow_by_a_matrix_per_sweep():
    scores = random_scores(64, 64).requires_grad_()
    kept = []
    for num_iters in (10, 100):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            result = sinkhorn(scores, temperature=0.5, num_iters=num_iters)
        others = getattr(result.grad_fn, "kept", ())
        kept.append(sum(sizes) + sum(array.size for array in others))
    assert kept[1] - kept[0] <= 90 * (4 * 64 + 1) * 1.1


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


def test_bad_scores(implementation, unchecked):
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
    for scores, message in cases[3:] if implementation == "torch" else cases:
        with pytest.raises(ValueError, match=message):
            sinkhorn(scores, temperature=1.0, num_iters=1)
