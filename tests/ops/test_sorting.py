"""Sorting relaxations against the published formulas written as loops over numbers."""

import math

import pytest
import torch

from permlab.ops import sorting as module
from permlab.ops.sorting import neural_sort, soft_sort
from permlab.permutation import order_to_matrix

INF = float("inf")
SORTS = {"soft_sort": soft_sort, "neural_sort": neural_sort}


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def implementation(request, monkeypatch):
    """Every test runs with both."""
    if request.param == "torch":
        monkeypatch.setattr(module, "is_readable", lambda tensor: False)


def softmax(logits):
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def soft_sort_by_loops(scores, temperature, power):
    return [
        softmax([-(abs(large - score) ** power) / temperature for score in scores])
        for large in sorted(scores, reverse=True)
    ]


def neural_sort_by_loops(scores, temperature):
    n = len(scores)
    total = [sum(abs(score - other) for other in scores) for score in scores]
    return [
        softmax([((n + 1 - 2 * i) * scores[j] - total[j]) / temperature for j in range(n)]) for i in range(1, n + 1)
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 17])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 4.0])
def test_soft_sort_by_loops(n, temperature, power):
    scores = torch.randn(n, dtype=torch.float64)
    expected = torch.tensor(soft_sort_by_loops(scores.tolist(), temperature, power), dtype=torch.float64)
    torch.testing.assert_close(soft_sort(scores, temperature=temperature, power=power), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 17])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
def test_neural_sort_by_loops(n, temperature):
    scores = torch.randn(n, dtype=torch.float64)
    expected = torch.tensor(neural_sort_by_loops(scores.tolist(), temperature), dtype=torch.float64)
    torch.testing.assert_close(neural_sort(scores, temperature=temperature), expected)


def test_power_two_is_the_default():
    scores = torch.randn(6)
    assert torch.equal(soft_sort(scores, temperature=0.5), soft_sort(scores, temperature=0.5, power=2.0))


@pytest.mark.parametrize("sort", SORTS.values(), ids=SORTS)
class TestBoth:
    def test_cold_limit_is_the_descending_argsort(self, sort):
        scores = torch.stack([torch.randperm(9) for _ in range(6)]).double().reshape(2, 3, 9)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        expected = order_to_matrix(order, dtype=torch.float64)
        torch.testing.assert_close(sort(scores, temperature=1e-3), expected)
        torch.testing.assert_close(expected @ scores.unsqueeze(-1), scores.sort(-1, descending=True)[0].unsqueeze(-1))

    @pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
    def test_batch_entries_are_independent(self, sort, batch):
        scores = torch.randn(*batch, 5)
        matrix = sort(scores, temperature=0.7)
        assert matrix.shape == (*batch, 5, 5)
        each = [sort(one, temperature=0.7) for one in scores.reshape(-1, 5)]
        torch.testing.assert_close(matrix.reshape(-1, 5, 5), torch.stack(each))
        torch.testing.assert_close(matrix.sum(-1), torch.ones(*batch, 5))

    def test_renaming_items_renames_columns(self, sort):
        scores, name = torch.randn(8), torch.randperm(8)
        matrix = sort(scores, temperature=0.4)
        torch.testing.assert_close(sort(scores[name], temperature=0.4), matrix[:, name])

    def test_gradient_by_finite_differences(self, sort):
        scores = torch.tensor([[0.3, -1.2, 0.9, 2.0], [5.0, 4.0, 4.5, -3.0]], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s: sort(s, temperature=0.8), scores)

    @pytest.mark.parametrize("temperature", [1e-3, 1.0])
    def test_ties_share(self, sort, temperature):
        scores = torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0], requires_grad=True)
        matrix = sort(scores, temperature=temperature)
        torch.testing.assert_close(matrix[:, 0], matrix[:, 2])
        torch.testing.assert_close(matrix[:, 1], matrix[:, 3])
        if temperature < 0.01:
            torch.testing.assert_close(matrix[0], torch.tensor([0, 0.5, 0, 0.5, 0]))
            torch.testing.assert_close(matrix[4], torch.tensor([0.5, 0, 0.5, 0, 0]))
        (gradient,) = torch.autograd.grad(matrix, scores, torch.randn(5, 5))
        assert gradient.isfinite().all()

    def test_all_equal_is_uniform(self, sort):
        torch.testing.assert_close(sort(torch.full((4,), 7.0), temperature=0.1), torch.full((4, 4), 0.25))

    def test_minus_infinity_is_the_limit_of_a_low_score(self, sort):
        scores = torch.tensor([0.3, -INF, 0.5, -INF, 0.1], dtype=torch.float64, requires_grad=True)
        matrix = sort(scores, temperature=0.5)
        low = scores.detach().clamp(min=-1e6)
        torch.testing.assert_close(matrix, sort(low, temperature=0.5))
        (gradient,) = torch.autograd.grad(matrix, scores, torch.randn(5, 5, dtype=torch.float64))
        assert gradient.isfinite().all()
        assert gradient[[1, 3]].tolist() == [0, 0]
        assert gradient[[0, 2, 4]].abs().min() > 0

    def test_all_minus_infinity_is_uniform(self, sort):
        torch.testing.assert_close(sort(torch.full((2, 3), -INF), temperature=0.5), torch.full((2, 3, 3), 1 / 3))

    def test_nan_is_handed_on(self, sort):
        assert sort(torch.tensor([0.0, float("nan"), 1.0]), temperature=0.5).isnan().any()

    def test_large_spreads_stay_finite(self, sort):
        scores = (1e4 * torch.randn(4, 32)).requires_grad_()
        matrix = sort(scores, temperature=1e-3)
        torch.testing.assert_close(matrix.sum(-1), torch.ones(4, 32))
        (gradient,) = torch.autograd.grad(matrix, scores, torch.randn(4, 32, 32))
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, sort, dtype):
        scores = torch.randn(3, 16, dtype=dtype)
        matrix = sort(scores, temperature=0.3)
        assert matrix.dtype == dtype
        exact = sort(scores.double(), temperature=0.3)
        torch.testing.assert_close(matrix.double(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)

    @pytest.mark.parametrize("temperature", [0.0, -2.0, INF])
    def test_bad_temperature(self, sort, temperature):
        with pytest.raises(ValueError, match=f"temperature={temperature}"):
            sort(torch.zeros(2), temperature=temperature)

    def test_scores_that_are_no_numbers_with_a_point(self, sort, unchecked):
        with pytest.raises(ValueError, match="int64"):
            sort(torch.arange(3), temperature=1.0)


@pytest.mark.parametrize("power", [0.5, 0.0, -1.0, float("nan")])
def test_bad_power(power):
    with pytest.raises(ValueError, match=f"power={power}"):
        soft_sort(torch.zeros(2), temperature=1.0, power=power)


def test_neural_sort_ranks_at_every_temperature():
    scores = torch.randn(5, 12, dtype=torch.float64)
    expected = scores.argsort(-1, descending=True)
    for temperature in (0.01, 1.0, 100.0):
        assert torch.equal(neural_sort(scores, temperature=temperature).argmax(-1), expected)


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_both_implementations_agree_on_gradients(monkeypatch, n, power):
    scores, weight = torch.randn(2, 3, n, dtype=torch.float64), torch.randn(2, 3, n, n, dtype=torch.float64)
    scores = scores.movedim(0, 1).movedim(1, 0).requires_grad_()
    sorts = [lambda s: soft_sort(s, temperature=0.3, power=power), lambda s: neural_sort(s, temperature=3.0)]
    ours = [torch.autograd.grad(sort(scores), scores, weight)[0] for sort in sorts]
    monkeypatch.setattr(module, "is_readable", lambda tensor: False)
    theirs = [torch.autograd.grad(sort(scores), scores, weight)[0] for sort in sorts]
    torch.testing.assert_close(ours, theirs)


def test_neural_sort_in_float32_is_right_where_its_logits_are_large():
    scores = torch.randn(2, 512)
    exact = neural_sort(scores.double(), temperature=0.1)
    assert (neural_sort(scores, temperature=0.1) - exact).abs().max() < 1e-5 or not module.is_readable(scores)
