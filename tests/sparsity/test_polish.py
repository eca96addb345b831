"""Local search on the loss: what a swap is predicted to do, and what is accepted."""

import itertools

import pytest
import torch
from quadratic import Orders, Quadratic, mask_of, quadratic_sites
from torch import Tensor

from permlab.sparsity.polish import Swappable, polish, predicted_change


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4)])
def test_predicted_change_is_the_first_order_change_of_the_loss(n: int, m: int) -> None:
    num_slots = 3 * m
    scores, gradient, weights = torch.rand(3, num_slots, 6).double()
    gradient, order = gradient - 0.5, torch.randperm(num_slots)
    pairs = [(i, j) for i, j in itertools.product(range(num_slots), repeat=2) if i // m != j // m]
    first, second = torch.tensor(pairs).T
    found = predicted_change(scores[order], (gradient * weights)[order], first, second, n=n, m=m)
    expected = []
    for i, j in pairs:
        swapped = order.clone()
        swapped[i], swapped[j] = order[j], order[i]
        change = weights * (mask_of(swapped, scores, n, m) - mask_of(order, scores, n, m))
        expected.append((gradient * change).sum())
    torch.testing.assert_close(found, torch.stack(expected))
    assert found.std() > 0


def test_the_loss_never_rises_and_is_that_of_the_result() -> None:
    sites, start, loss = quadratic_sites()
    orders, losses = polish(sites, start, loss, n=2, m=4, num_steps=40, num_proposals=64)
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    assert len(losses) <= 41
    assert len(loss.asked) == len(losses)
    assert loss(orders)[0] == losses[-1]
    assert {name: order.sort().values.tolist() for name, order in orders.items()} == {
        name: list(range(len(order))) for name, order in start.items()
    }


def test_a_loss_that_only_rises_leaves_the_start() -> None:
    sites, start, quadratic = quadratic_sites()
    calls = itertools.count()

    def rising(orders: Orders) -> tuple[float, dict[str, Tensor]]:
        return float(next(calls)), quadratic(orders)[1]

    orders, losses = polish(sites, start, rising, n=2, m=4, num_steps=6)
    assert losses == [0.0] * 7
    assert all(torch.equal(orders[name], start[name]) for name in start)


def test_a_loss_that_is_not_a_number_is_not_accepted() -> None:
    sites, start, quadratic = quadratic_sites()
    calls = itertools.count()

    def broken(orders: Orders) -> tuple[float, dict[str, Tensor]]:
        return (1.0 if next(calls) == 0 else float("nan")), quadratic(orders)[1]

    orders, losses = polish(sites, start, broken, n=2, m=4, num_steps=3)
    assert losses == [1.0] * 4
    assert all(torch.equal(orders[name], start[name]) for name in start)


def test_a_planted_swap_is_found() -> None:
    """Two strong channels share a block of 2; one swap keeps both, and only then is the loss zero."""
    weights = torch.tensor([3.0, 2.0, 0.1, 0.2]).double().unsqueeze(1)
    sites = {"only": Swappable(weights, weights, 1)}
    target = torch.tensor([3.0, 2.0, 0.0, 0.0]).double().unsqueeze(1)
    loss = Quadratic(sites, {"only": target}, n=1, m=2)
    orders, losses = polish(sites, {"only": torch.arange(4)}, loss, n=1, m=2, num_steps=10)
    assert losses[0] == pytest.approx(4.0 + 0.04)
    assert losses[-1] == 0
    assert sorted(tuple(sorted(pair)) for pair in orders["only"].view(2, 2).tolist()) in (
        [(0, 2), (1, 3)],
        [(0, 3), (1, 2)],
    )


@pytest.mark.parametrize("num_groups", [2, 4])
def test_no_channel_leaves_its_group(num_groups: int) -> None:
    sites, start, loss = quadratic_sites(num_groups=2)
    sites = {name: Swappable(site.weights, site.scores, num_groups) for name, site in sites.items()}
    sites["b"] = Swappable(sites["b"].weights, sites["b"].scores, 2)
    orders, losses = polish(sites, start, loss, n=2, m=4, num_steps=20)
    for name, order in orders.items():
        size = len(order) // sites[name].num_groups
        assert torch.equal(order // size, torch.arange(len(order)) // size)
    # Groups of one block have nothing to exchange.
    assert torch.equal(orders["a"], start["a"]) == (num_groups == 4)
    assert losses[-1] < losses[0]


def test_the_result_depends_on_the_seed_and_on_nothing_else() -> None:
    sites, start, loss = quadratic_sites()
    options = {"n": 2, "m": 4, "num_steps": 5, "num_proposals": 16}
    first, again, other = (polish(sites, start, loss, **options, seed=seed) for seed in (3, 3, 4))
    torch.rand(7)
    assert first[1] == again[1]
    assert all(torch.equal(first[0][name], again[0][name]) for name in start)
    assert first[1] != other[1]


def test_no_steps_give_the_start_and_the_given_orders_are_left_alone() -> None:
    sites, start, loss = quadratic_sites()
    orders, losses = polish(sites, start, loss, n=2, m=4, num_steps=0)
    assert len(losses) == 1
    assert all(torch.equal(orders[name], start[name]) for name in start)
    polish(sites, start, loss, n=2, m=4, num_steps=10)
    assert all(torch.equal(order, torch.arange(len(order))) for order in start.values())


def test_every_set_of_swaps_touches_a_block_once() -> None:
    sites, start, loss = quadratic_sites()
    polish(sites, start, loss, n=2, m=4, num_steps=1)
    before, after = loss.asked
    moved = {name: (before[name] != after[name]).view(-1, 4).sum(1) for name in before}
    assert sum(int(count.sum()) for count in moved.values()) >= 4, "several swaps at once"
    assert all(count.max() <= 1 for count in moved.values())


def test_a_refused_swap_is_not_tried_again() -> None:
    sites, start, quadratic = quadratic_sites()
    calls = itertools.count()

    def rising(orders: Orders) -> tuple[float, dict[str, Tensor]]:
        return float(next(calls)), quadratic(orders)[1]

    polish(sites, start, rising, n=2, m=4, num_steps=30)
    tried = [torch.cat(list(orders.values())) for orders in quadratic.asked[1:]]
    singles = [tuple(order.tolist()) for order in tried if (order != torch.cat(list(start.values()))).sum() == 2]
    assert len(singles) > 10
    assert len(set(singles)) == len(singles)
