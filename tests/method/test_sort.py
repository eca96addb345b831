import numpy as np
import pytest
import torch

from permlab.method.sort import Sort
from permlab.permutation import Site, permute

ORDER = [2, 0, 3, 1]


def sort_of(order=ORDER, num_groups=1, **changes):
    options = {
        "temperature": 0.3,
        "lr": 0.01,
        "warmup_fraction": 0.0,
        "freeze_fraction": 0.0,
        "estimator": "straight_through",
        "surrogate": "softmax",
        "power": 2.0,
        "scorer": "vector",
        "width": 4,
    }
    site = Site(name="site", order=torch.tensor(order), num_groups=num_groups)
    return Sort(site, **options | changes)


def set_scores(method, values):
    with torch.no_grad():
        method.scorer.vector.copy_(torch.as_tensor(values))
    return method


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_soft_matrix_by_the_published_formula(power):
    scores = np.array([0.3, -0.2, 0.9, 0.1])
    method = set_scores(sort_of(power=power), scores)
    logits = -(np.abs(np.sort(scores)[::-1][:, None] - scores[None]) ** power) / 0.3
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(method().soft.detach(), expected, rtol=1e-5)


def test_tied_scores_still_give_a_permutation():
    method = set_scores(sort_of(), [0.5, 0.5, 0.5, 1.0])
    sample = method()
    assert sample.order.tolist() == [3, 2, 0, 1]
    assert sorted(sample.soft.argmax(-1).tolist()) != [0, 1, 2, 3]


def test_straight_through_gradient_is_that_of_the_dense_surrogate():
    method = set_scores(sort_of(), [0.3, -0.2, 0.9, 0.1])
    x, weight = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    y = permute(x, method())
    assert torch.equal(y, x[:, [2, 0, 3, 1]])
    (weight * y).sum().backward()
    scores = method.scorer.vector.detach().clone().requires_grad_()
    dense = (-((scores.sort(descending=True).values[:, None] - scores[None]) ** 2) / 0.3).softmax(-1)
    (weight * (dense @ x)).sum().backward()
    torch.testing.assert_close(method.scorer.vector.grad, scores.grad)


def product_of(scores):
    return np.outer(np.sort(scores)[::-1], scores)


def test_product_squares_mark_the_ones():
    scores = np.array([0.3, -0.2, 0.9, 0.1])
    sample = set_scores(sort_of(surrogate="product"), scores)()
    hard = np.zeros((4, 4))
    hard[np.arange(4), sample.order] = 1
    np.testing.assert_array_equal(sample.soft.detach(), hard)
    np.testing.assert_allclose(product_of(scores)[hard == 1], scores[sample.order] ** 2)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_product_gradient_agrees_with_finite_differences_of_the_outer_product(num_groups):
    size = 4 // num_groups
    scores = np.array([0.3, -0.2, 0.9, 0.1])
    method = set_scores(sort_of([0, 1, 2, 3], num_groups, surrogate="product").double(), scores)
    weight = torch.randn(4, 4, dtype=torch.float64)
    (weight * method().soft).sum().backward()

    def value(scores):
        blocks = [product_of(scores[k : k + size]) for k in range(0, 4, size)]
        return sum(
            (weight[k * size : (k + 1) * size, k * size : (k + 1) * size].numpy() * block).sum()
            for k, block in enumerate(blocks)
        )

    step = 1e-6 * np.eye(4)
    expected = [(value(scores + e) - value(scores - e)) / 2e-6 for e in step]
    np.testing.assert_allclose(method.scorer.vector.grad, expected, atol=1e-8)


def test_product_has_no_relaxed_form():
    with pytest.raises(ValueError, match="surrogate=product is no relaxation"):
        sort_of(surrogate="product", estimator="relaxed")
    method = sort_of(surrogate="product")
    assert method.soft_matrix() is None
    assert method.entropy() == 0


def test_relaxed_mixes_items():
    method = sort_of(estimator="relaxed")
    x = torch.randn(5, 4, 3)
    sample = method()
    torch.testing.assert_close(permute(x, sample), sample.soft @ x)
    assert torch.equal(permute(x, method.eval()()), x[:, ORDER])
