"""The Plackett-Luce law against its definition, draw by draw, and against empirical frequencies."""

import math
from collections import Counter
from itertools import permutations

import pytest
import torch
from scipy.stats import chisquare

from permlab.ops import plackett_luce as module
from permlab.ops.plackett_luce import log_prob, sample
from permlab.permutation import check_order

INF = float("inf")


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def implementation(request, monkeypatch):
    """Every test runs with both."""
    if request.param == "torch":
        monkeypatch.setattr(module, "is_readable", lambda tensor: False)
    return request.param


def all_orders(n):
    return torch.tensor(list(permutations(range(n))))


def probability_by_draws(logits, order, temperature):
    """Definition: each slot takes one of the remaining items in proportion to its weight."""
    weights = [math.exp(logit / temperature) for logit in logits]
    rest, probability = set(range(len(logits))), 1.0
    for item in order:
        probability *= weights[item] / sum(weights[other] for other in rest)
        rest.remove(item)
    return probability


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_probabilities_of_all_orders(n, temperature):
    logits, orders = torch.randn(n, dtype=torch.float64), all_orders(n)
    probabilities = log_prob(logits, orders, temperature=temperature).exp()
    expected = [probability_by_draws(logits.tolist(), order, temperature) for order in orders.tolist()]
    assert probabilities.tolist() == pytest.approx(expected, rel=1e-9)
    assert float(probabilities.sum()) == pytest.approx(1)


def p_value(logits, sampled_at, scored_at, num_samples=20_000):
    orders = all_orders(logits.shape[-1])
    drawn = sample(logits.expand(num_samples, -1), temperature=sampled_at)
    counts = Counter(map(tuple, drawn.tolist()))
    observed = [counts[tuple(order)] for order in orders.tolist()]
    expected = log_prob(logits.double(), orders, temperature=scored_at).exp() * num_samples
    assert expected.min() > 5, "too rare an order for a chi-square test"
    return chisquare(observed, expected.numpy()).pvalue


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_frequencies_agree_with_log_prob(temperature):
    logits = torch.tensor([0.2, -0.3, 0.5, 0.1])
    assert p_value(logits, temperature, temperature) > 1e-3


def test_the_law_without_its_temperature_is_rejected():
    assert p_value(torch.tensor([0.2, -0.3, 0.5, 0.1]), 0.3, 1.0) < 1e-12


def test_frequencies_of_ties_and_of_minus_infinity():
    logits = torch.tensor([1e4, 1e4, -INF, -INF, 1e4])
    counts = Counter(map(tuple, sample(logits.expand(12_000, -1), temperature=1e-3).tolist()))
    expected = [(*first, *rest) for first in permutations((0, 1, 4)) for rest in permutations((2, 3))]
    assert set(counts) == set(expected)
    assert chisquare([counts[order] for order in expected]).pvalue > 1e-3
    assert log_prob(logits, torch.tensor(expected), temperature=1e-3).exp().tolist() == pytest.approx([1 / 12] * 12)


def test_minus_infinity_is_the_limit_of_a_low_logit():
    logits = torch.tensor([0.3, -INF, 0.5, -INF], dtype=torch.float64, requires_grad=True)
    orders = all_orders(4)
    result = log_prob(logits, orders, temperature=0.5)
    expected = log_prob(logits.detach().clamp(min=-1e5), orders, temperature=0.5)
    impossible = expected < -1e4
    assert impossible.sum() == 20
    assert (result[impossible] == -INF).all()
    torch.testing.assert_close(result[~impossible], expected[~impossible])
    (gradient,) = torch.autograd.grad(result[~impossible].sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[[1, 3]].tolist() == [0, 0]
    assert gradient[[0, 2]].abs().min() > 0


def test_all_minus_infinity_is_uniform():
    result = log_prob(torch.full((3,), -INF), all_orders(3), temperature=0.7)
    assert result.exp().tolist() == pytest.approx([1 / 6] * 6)


def test_gradient_by_finite_differences():
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    order = torch.stack([torch.randperm(5) for _ in range(6)]).reshape(3, 2, 5)
    assert torch.autograd.gradcheck(lambda z: log_prob(z, order, temperature=0.6), logits)


def test_the_score_has_mean_zero():
    """The expected gradient of log p under p is the gradient of a constant."""
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    log_probs = log_prob(logits, all_orders(4), temperature=0.5)
    (gradient,) = torch.autograd.grad((log_probs.detach().exp() * log_probs).sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("n", [1, 2, 17])
def test_samples_are_orders_and_score_broadcasts(batch, n):
    logits = torch.randn(*batch, n)
    order = sample(logits, temperature=0.5)
    check_order(order)
    assert order.shape == logits.shape
    assert log_prob(logits, order, temperature=0.5).shape == batch
    many = sample(logits.expand(4, *batch, n), temperature=0.5)
    scores = log_prob(logits, many, temperature=0.5)
    assert scores.shape == (4, *batch)
    torch.testing.assert_close(scores[3], log_prob(logits, many[3], temperature=0.5))


def test_one_item_is_certain():
    logits = torch.tensor([3.0], requires_grad=True)
    result = log_prob(logits, sample(logits, temperature=0.1), temperature=0.1)
    assert result == 0
    assert torch.autograd.grad(result, logits)[0] == 0


def test_samples_carry_no_gradient_and_repeat_with_their_generator():
    logits = torch.randn(5, 9, requires_grad=True)
    draws = [sample(logits, temperature=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not draws[0].requires_grad


def test_cold_limit_is_the_argsort():
    logits = torch.randperm(20).float().expand(50, -1)
    assert torch.equal(sample(logits, temperature=1e-3), logits.argsort(-1, descending=True))


@pytest.mark.parametrize("temperature", [1e-3, 1.0])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_extremes_give_no_nan(temperature, spread):
    logits = (spread * torch.randn(6, 32)).requires_grad_()
    for order in (sample(logits, temperature=temperature), torch.arange(32).expand(6, -1)):
        check_order(order)
        result = log_prob(logits, order, temperature=temperature)
        (gradient,) = torch.autograd.grad(result.sum(), logits)
        assert result.isfinite().all()
        assert gradient.isfinite().all()


def test_bfloat16_is_not_computed_in_bfloat16():
    logits = torch.randn(4, 50, dtype=torch.bfloat16)
    order = sample(logits, temperature=1.0)
    check_order(order)
    result = log_prob(logits, order, temperature=1.0)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(
        result.double(), log_prob(logits.double(), order, temperature=1.0), atol=0, rtol=torch.finfo(result.dtype).eps
    )
    ties = sample(torch.zeros(4000, 2, dtype=torch.bfloat16), temperature=1.0)[:, 0].double().mean()
    assert 0.45 < ties < 0.55


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}"):
        sample(torch.zeros(2), temperature=temperature)
    with pytest.raises(ValueError, match=f"temperature={temperature}"):
        log_prob(torch.zeros(2), torch.arange(2), temperature=temperature)


def test_bad_input(implementation, unchecked):
    with pytest.raises(ValueError, match="int64"):
        sample(torch.arange(3), temperature=1.0)
    with pytest.raises(ValueError, match="float32"):
        log_prob(torch.zeros(2), torch.zeros(2), temperature=1.0)
    with pytest.raises(ValueError, match="3 items does not fit 2 logits"):
        log_prob(torch.zeros(2), torch.arange(3), temperature=1.0)
    if implementation == "torch":
        return  # which does not make a device wait for a look at its values
    with pytest.raises(ValueError, match=r"\[1, 1\]"):
        log_prob(torch.zeros(2), torch.tensor([1, 1]), temperature=1.0)


@pytest.mark.parametrize("spread", [1.0, 20.0, 250.0, 900.0])
def test_values_and_gradients_by_logarithms_of_suffix_sums(spread):
    logits = (torch.rand(5, 40, dtype=torch.float64) - 0.5) * spread
    logits[:, 0], logits[:, 1] = spread / 2, -spread / 2
    logits.requires_grad_()
    order = torch.stack([torch.randperm(40) for _ in range(5)])
    placed = logits.gather(-1, order)
    expected = sum(placed[:, i] - placed[:, i:].logsumexp(-1) for i in range(40))
    found = log_prob(logits, order, temperature=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(5, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(value, logits, weight)[0] for value in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
