import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from permlab.method.reorder import Reorder
from permlab.permutation import Site, permute

START = [2, 0, 1]


def reorder_of(order=START, num_groups=1, **changes):
    options = {
        "temperature": 0.5,
        "lr": 0.02,
        "warmup_fraction": 0.0,
        "freeze_fraction": 0.0,
        "spread": 1.0,
        "num_samples": 4,
        "granularity": "batch",
        "baseline": "leave_one_out",
        "baseline_momentum": 0.9,
        "temperature_in_log_prob": True,
    }
    site = Site(name="site", order=torch.tensor(order), num_groups=num_groups)
    return Reorder(site, **options | changes)


def running(**changes):
    return reorder_of(**{"num_samples": 1, "baseline": "ema"} | changes)


def probability(logits, order, temperature):
    """Plackett-Luce, one draw after the other."""
    weight = (logits / temperature).exp()
    result, left = torch.ones(()), weight.sum()
    for item in order:
        result = result * weight[item] / left
        left = left - weight[item]
    return result


def test_logits_start_equally_spaced_along_the_starting_order():
    assert reorder_of(spread=2.0).scores().tolist() == [-1.0, -2.0, 0.0]
    assert reorder_of([1, 0, 2, 3], num_groups=2, spread=2.0).scores().tolist() == [-2.0, 0.0, 0.0, -2.0]


@pytest.mark.parametrize(
    ("num_samples", "granularity", "batch", "expected"),
    [
        (1, "batch", None, ()),
        (1, "batch", (5,), ()),
        (1, "image", (5,), (5,)),
        (1, "image", (2, 5), (2, 5)),
        (4, "batch", None, (4, 1)),
        (4, "batch", (), (4,)),
        (4, "batch", (5,), (4, 1)),
        (4, "batch", (2, 5), (4, 1, 1)),
        (4, "image", None, (4, 1)),
        (4, "image", (5,), (4, 5)),
        (4, "image", (2, 5), (4, 2, 5)),
    ],
)
def test_shapes_of_draws_and_of_their_advantage(num_samples, granularity, batch, expected):
    method = reorder_of(num_samples=num_samples, granularity=granularity, baseline="ema")
    items = None if batch is None else torch.randn(*batch, 3, 2)
    sample = method(items)
    assert sample.order.shape == (*expected, 3)
    assert sample.log_prob.shape == expected
    if items is not None:
        y = permute(items, sample)
        assert y.shape == (*torch.broadcast_shapes(expected, batch), 3, 2)
        assert method.advantage(y.sum((-2, -1))).shape == expected


def test_log_prob_by_drawing_one_item_after_the_other():
    for in_log_prob, temperature in ((True, 0.5), (False, 1.0)):
        method = reorder_of(num_samples=64, temperature_in_log_prob=in_log_prob)
        sample = method()
        for order, log_prob in zip(sample.order[:, 0].tolist(), sample.log_prob[:, 0], strict=True):
            expected = probability(method.scores().detach(), order, temperature).log()
            torch.testing.assert_close(log_prob.detach(), expected)


def test_groups_are_independent_laws():
    method = reorder_of([1, 2, 0, 3, 5, 4], num_groups=2)
    logits = method.scores().detach()
    sample = method()
    for order, log_prob in zip(sample.order[:, 0], sample.log_prob[:, 0].detach(), strict=True):
        first = probability(logits[:3], order[:3].tolist(), 0.5)
        second = probability(logits[3:], (order[3:] - 3).tolist(), 0.5)
        torch.testing.assert_close(log_prob, (first * second).log())


def test_leave_one_out_by_hand():
    reward = torch.randn(4, 5)
    by_image = reorder_of(granularity="image").advantage(reward)
    by_batch = reorder_of().advantage(reward)
    for k in range(4):
        others = [reward[j] for j in range(4) if j != k]
        torch.testing.assert_close(by_image[k], reward[k] - sum(others) / 3)
        torch.testing.assert_close(by_batch[k, 0], (reward[k] - sum(others) / 3).mean())


@pytest.mark.parametrize("granularity", ["batch", "image"])
def test_running_baseline_starts_at_the_first_reward(granularity):
    method = running(granularity=granularity)
    rewards = torch.randn(6, 5) - 3
    baseline = rewards[0].mean()
    for reward in rewards:
        expected = reward - baseline if granularity == "image" else reward.mean() - baseline
        torch.testing.assert_close(method.advantage(reward), expected)
        baseline = 0.9 * baseline + 0.1 * reward.mean()
    restored = running(granularity=granularity)
    restored.load_state_dict(method.state_dict())
    assert torch.equal(restored.advantage(rewards[0]), method.advantage(rewards[0]))


def test_advantage_carries_no_gradient():
    reward = torch.randn(4, 5, requires_grad=True)
    assert not reorder_of().advantage(reward).requires_grad
    assert not reorder_of(baseline="ema").advantage(reward).requires_grad


def exact_gradient(logits, temperature, reward):
    """Of the expected reward, over all orders of three items."""
    logits = logits.detach().clone().requires_grad_()
    orders = list(itertools.permutations(range(3)))
    expected = sum(probability(logits, order, temperature) * reward[order] for order in orders)
    return torch.autograd.grad(expected, logits)[0]


def estimated_gradient(method, reward):
    sample = method()
    rewards = torch.tensor([[reward[tuple(order)]] for order in sample.order[:, 0].tolist()])
    (method.advantage(rewards) * sample.log_prob).mean().backward()
    return method.logits.grad


@pytest.mark.parametrize("baseline", ["leave_one_out", "ema"])
def test_gradient_is_that_of_the_expected_reward(baseline):
    reward = dict(zip(itertools.permutations(range(3)), [0.0, 1.0, 3.0, -1.0, 0.5, 2.0], strict=True))
    method = reorder_of(num_samples=40000, baseline=baseline)
    expected = exact_gradient(method.logits, 0.5, reward)
    torch.testing.assert_close(estimated_gradient(method, reward), expected, atol=0.04, rtol=0)


def test_gradient_without_the_temperature_is_biased():
    reward = dict(zip(itertools.permutations(range(3)), [0.0, 1.0, 3.0, -1.0, 0.5, 2.0], strict=True))
    method = reorder_of(num_samples=40000, temperature_in_log_prob=False)
    expected = exact_gradient(method.logits, 0.5, reward)
    assert (estimated_gradient(method, reward) - expected).abs().max() > 0.1


def test_entropy_and_soft_matrix_of_the_law():
    method = reorder_of()
    logits = method.logits.detach()
    law = {order: probability(logits, order, 0.5).item() for order in itertools.permutations(range(3))}
    entropy = -sum(p * math.log(p) for p in law.values()) / math.log(6)
    marginal = torch.zeros(3, 3)
    for order, p in law.items():
        marginal[torch.arange(3), torch.tensor(order)] += p
    # The averages of 64 draws: one standard error is 0.06 at most.
    assert method.entropy().item() == pytest.approx(entropy, abs=0.1)
    assert (method.soft_matrix() - marginal).abs().max() < 0.2
    assert torch.equal(method.soft_matrix(), method.soft_matrix())
    with torch.no_grad():
        method.logits.zero_()
    assert method.entropy().item() == pytest.approx(1.0, abs=1e-5)
    assert reorder_of([0]).entropy() == 0


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="num_samples=1: baseline=leave_one_out needs at least 2"):
        reorder_of(num_samples=1)
    with pytest.raises(ValueError, match=r"shape \(5,\) does not fit 4 samples"):
        reorder_of().advantage(torch.randn(5))


def _advantages_of_a_rank(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    method = running()
    advantages = [method.advantage(torch.full((3,), reward + rank)).item() for reward in (1.0, 5.0)]
    results.put((rank, advantages, method.baseline.item()))
    dist.destroy_process_group()


def test_two_ranks_share_one_baseline(tmp_path):
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=_advantages_of_a_rank, args=(rank, tmp_path / "store", results)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = sorted(results.get() for _ in ranks)
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    # Mean rewards over the ranks are 1.5 and 5.5.
    assert found[0] == (0, [pytest.approx(-0.5), pytest.approx(3.5)], pytest.approx(1.9))
    assert found[1] == (1, [pytest.approx(0.5), pytest.approx(4.5)], pytest.approx(1.9))
