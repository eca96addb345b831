import numpy as np
import pytest
import torch

from permlab.method.neural_sort import NeuralSort
from permlab.permutation import Site, permute

OPTIONS = {"lr": 0.01, "warmup_fraction": 0.0, "freeze_fraction": 0.0, "scorer": "vector", "width": 4}


def neural_sort_of(order, estimator="straight_through", temperature=3.0, num_groups=1):
    site = Site(name="site", order=torch.tensor(order), num_groups=num_groups)
    return NeuralSort(site, temperature=temperature, estimator=estimator, **OPTIONS)


def published(scores, temperature):
    """Equation 5 of the paper, slot by slot and counted from one."""
    n = len(scores)
    total = np.array([sum(abs(a - b) for b in scores) for a in scores])
    rows = []
    for slot in range(1, n + 1):
        weight = np.exp(((n + 1 - 2 * slot) * scores - total) / temperature)
        rows.append(weight / weight.sum())
    return np.stack(rows)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_soft_matrix_by_the_published_formula(temperature):
    method = neural_sort_of([2, 0, 3, 1], temperature=temperature)
    scores = np.array([0.3, -0.2, 0.9, 0.1])
    with torch.no_grad():
        method.scorer.vector.copy_(torch.as_tensor(scores))
    sample = method()
    np.testing.assert_allclose(sample.soft.detach(), published(scores, temperature), rtol=1e-5)
    assert sample.order.tolist() == [2, 0, 3, 1]
    assert sample.soft.argmax(-1).tolist() == [2, 0, 3, 1]


def test_groups_are_relaxed_apart():
    method = neural_sort_of([1, 0, 3, 2], num_groups=2)
    block = published(np.array([-1.0, 1.0]), 3.0)
    expected = torch.block_diag(torch.as_tensor(block), torch.as_tensor(block)).float()
    torch.testing.assert_close(method().soft.detach(), expected)


def test_the_estimator_decides_what_goes_forward():
    x = torch.randn(5, 4, 3)
    hard, mixed = neural_sort_of([2, 0, 3, 1]), neural_sort_of([2, 0, 3, 1], estimator="relaxed")
    assert torch.equal(permute(x, hard()), x[:, [2, 0, 3, 1]])
    torch.testing.assert_close(permute(x, mixed()), mixed().soft @ x)
