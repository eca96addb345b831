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


# Defects of the released code


def temperatures(num_steps, **changes):
    """At every step of a training whose active phase is its middle third."""
    schedule = {"kind": "triangular", "start": 0.0, "peak": 0.2, "end": 0.0}
    method = running(temperature=schedule, warmup_fraction=1 / 3, freeze_fraction=1 / 3, **changes)
    found = []
    for step in range(num_steps):
        method.advance(step, num_steps)
        found.append(method.temperature)
    return method, found[num_steps // 3 : 2 * num_steps // 3]


@pytest.mark.parametrize(("num_epochs", "steps_per_epoch"), [(30, 250), (3, 7), (1, 5), (6, 1)])
def test_a_temperature_that_moves_on_once_an_epoch(num_epochs, steps_per_epoch):
    """Against a table with an entry for every step of the active phase, read at the number of the epoch."""
    total = num_epochs * steps_per_epoch
    ups = torch.arange(total, dtype=torch.float64) / (total - 1)
    table = (0.2 * (1 - (2 * ups - 1).abs())).clamp(min=1e-3)
    _, found = temperatures(3 * total, num_temperature_steps=num_epochs)
    _, intended = temperatures(3 * total)
    assert found == pytest.approx([table[step // steps_per_epoch].item() for step in range(total)])
    assert intended == pytest.approx(table.tolist())
    if steps_per_epoch == 250:
        assert max(found) == pytest.approx(29 / 7499 * 0.4)  # of an intended 0.2
        assert max(found) < 0.0016


def test_a_rare_temperature_changes_neither_phases_nor_logits():
    plain, _ = temperatures(90)
    rare, found = temperatures(90, num_temperature_steps=3)
    assert torch.equal(plain.logits, rare.logits)
    for step in range(90):
        plain.advance(step, 90)
        rare.advance(step, 90)
        assert plain.phase == rare.phase
    assert found[0] != found[-1]  # epochs of ten steps each


@pytest.mark.parametrize("num_groups", [1, 2])
def test_inverse_initial_order_is_that_of_the_released_code(num_groups):
    """`linspace[order]` there, whose sorting gives the rank of every slot in place of the item."""
    order = [2, 0, 1, 3] if num_groups == 1 else [1, 2, 0, 5, 3, 4]
    size = len(order) // num_groups
    spaced = torch.linspace(0, -1, size).repeat(num_groups)
    method = running(order=order, num_groups=num_groups, inverse_initial_order=True)
    torch.testing.assert_close(method.logits.detach(), spaced[torch.tensor(order)])
    inverse = [order.index(item) for item in range(len(order))]
    assert inverse != order
    assert method.best().tolist() == inverse
    assert running(order=order, num_groups=num_groups).best().tolist() == order
    method.phase = "warmup"
    assert method().order.tolist() == method.eval().best().tolist() == order
    method.phase = "frozen"
    assert method().order.tolist() == inverse


def test_an_involution_starts_alike():
    order = [0, 3, 6, 1, 4, 7, 2, 5, 8]  # the columns of a 3x3 grid
    assert torch.equal(running(order=order).logits, running(order=order, inverse_initial_order=True).logits)


def test_a_baseline_from_zero_is_that_from_the_first_reward_but_for_its_start():
    rewards = torch.randn(400, 5) - 3
    method, other = running(baseline_from_zero=True), running()
    baseline = torch.zeros(())
    for number, reward in enumerate(rewards):
        found, plain = method.advantage(reward), other.advantage(reward)
        torch.testing.assert_close(found, reward.mean() - baseline)
        baseline = 0.9 * baseline + 0.1 * reward.mean()
        # What is left of the start fades with the momentum.
        torch.testing.assert_close(plain - found, -rewards[0].mean() * 0.9**number, atol=1e-4, rtol=0)
    restored = running(baseline_from_zero=True)
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
