import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import gumbel_r, kstest

from permlab.method.sinkhorn import Sinkhorn, _gumbel_like
from permlab.permutation import Site, order_to_matrix, permute


def sinkhorn_of(order, num_groups=1, num_features=None, **changes):
    options = {
        "temperature": 0.3,
        "lr": 0.01,
        "warmup_fraction": 0.0,
        "freeze_fraction": 0.0,
        "estimator": "straight_through",
        "num_iters": 20,
        "noise": 0.0,
        "start": "order",
        "start_scale": 1.0,
        "jitter": 0.01,
        "cost": "table",
        "width": 8,
    }
    site = Site(name="site", order=torch.tensor(order), num_groups=num_groups, num_features=num_features)
    return Sinkhorn(site, **options | changes)


def set_table(method, table):
    with torch.no_grad():
        method.table.copy_(table)
    return method


def test_the_table_starts_near_the_matrix_of_the_start():
    order = [3, 0, 4, 1, 2]
    method = sinkhorn_of(order, start_scale=2.0, jitter=0.05)
    distance = (method.table.detach()[0] - 2 * order_to_matrix(torch.tensor(order))).abs()
    assert distance.min() > 0
    assert distance.max() <= 0.05


def test_the_largest_jitter_keeps_the_start():
    order = torch.randperm(40).tolist()
    for _ in range(20):
        assert sinkhorn_of(order, jitter=0.4999).best().tolist() == order
    with pytest.raises(ValueError, match=r"jitter 0\.5 could change the starting order"):
        sinkhorn_of(order, jitter=0.5)


def test_jitter_is_reproducible():
    tables = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        tables.append(sinkhorn_of([1, 2, 0]).table)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("num_groups", [1, 3])
def test_the_best_order_is_the_best_assignment(num_groups):
    method = sinkhorn_of(list(range(12)), num_groups)
    set_table(method, torch.randn(method.table.shape))
    size = 12 // num_groups
    blocks = [linear_sum_assignment(-block)[1] + k * size for k, block in enumerate(method.table.detach().numpy())]
    assert method.best().tolist() == np.concatenate(blocks).tolist()


def test_order_and_soft_matrix_come_from_the_same_noisy_table():
    """Diagonal scalings cancel from a soft matrix's logarithm, and no scaling changes the best assignment."""
    method = sinkhorn_of([1, 2, 3, 0], noise=1.0, temperature=1.0)
    seen = set()
    for _ in range(50):
        sample = method()
        assert sample.order.tolist() == linear_sum_assignment(-sample.soft.detach().log().numpy())[1].tolist()
        seen.add(tuple(sample.order.tolist()))
    assert len(seen) > 3
    assert method.best().tolist() == [1, 2, 3, 0]


def test_noise_is_gumbel():
    noise = _gumbel_like(torch.zeros(20000), torch.Generator().manual_seed(0))
    assert kstest(noise.numpy(), gumbel_r.cdf).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_scale_of_the_noise(seed):
    """A 2 x 2 soft matrix knows its table through one number, the cross difference, which noise shifts."""

    def cross(table):
        return table[0, 0] + table[1, 1] - table[0, 1] - table[1, 0]

    method = sinkhorn_of([1, 0], noise=0.5)
    soft = method(generator=torch.Generator().manual_seed(seed)).soft
    noise = _gumbel_like(torch.zeros(2, 2), torch.Generator().manual_seed(seed))
    torch.testing.assert_close(0.3 * cross(soft.log()), cross(method.table[0] + 0.5 * noise))


def test_straight_through_gradient_is_that_of_the_dense_relaxation():
    method = set_table(sinkhorn_of([0, 1, 2, 3]), torch.randn(1, 4, 4))
    x, weight = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    sample = method()
    (weight * permute(x, sample)).sum().backward()
    table = method.table.detach().clone().requires_grad_()
    log = table[0] / 0.3
    for _ in range(20):
        log = log - log.logsumexp(-1, keepdim=True)
        log = log - log.logsumexp(-2, keepdim=True)
    (weight * (log.exp() @ x)).sum().backward()
    torch.testing.assert_close(method.table.grad, table.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(permute(x, sample), x[:, sample.order])


def test_relaxed_in_training_hard_in_evaluation():
    method = sinkhorn_of([2, 0, 1], estimator="relaxed")
    x = torch.randn(5, 3, 2)
    sample = method()
    torch.testing.assert_close(permute(x, sample), sample.soft @ x)
    assert torch.equal(permute(x, method.eval()()), x[:, [2, 0, 1]])


@pytest.mark.parametrize("start", ["zero", "random"])
def test_a_start_without_the_order(start: str) -> None:
    table = sinkhorn_of(list(range(64)), start=start, start_scale=2.0, jitter=0.0).table
    assert bool((table == 0).all()) == (start == "zero")
    assert table.abs().max() <= 2.0


def test_the_network_starts_at_the_table_and_then_reads_the_features() -> None:
    items = torch.randn(6, 3)
    order = [2, 0, 1, 4, 5, 3]
    method = sinkhorn_of(order, num_groups=2, num_features=3, cost="network")
    assert method.best(items).tolist() == order
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.randn_like(parameter))
    hidden = method.network.items(items).unflatten(0, (2, 3))
    expected = method.table + torch.einsum("gsw,giw->gsi", method.network.slots, hidden)
    assert torch.allclose(method.scores(items), expected)
    with pytest.raises(ValueError, match="features"):
        method.best(None)


def test_entropy_falls_at_every_step_of_a_schedule_from_one_to_a_hundredth():
    schedule = {"kind": "linear", "start": 1.0, "end": 0.01}
    method = set_table(
        sinkhorn_of(torch.randperm(24).tolist(), temperature=schedule, num_iters=50), torch.randn(1, 24, 24)
    )
    entropies = []
    for step in range(41):
        method.advance(step, 41)
        entropies.append(method.entropy().item())
    assert method.temperature == pytest.approx(0.01, abs=0.03)
    assert all(later < earlier for earlier, later in itertools.pairwise(entropies))
    assert entropies[0] > 0.7
    assert entropies[-1] < 0.1
