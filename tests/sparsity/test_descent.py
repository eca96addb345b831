"""Descent by swaps that nobody has tried: where it goes, what it never does, and going on from its state."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from quadratic import Quadratic, quadratic_sites

from permlab.sparsity.descent import Descent

OPTIONS = {"n": 2, "m": 4, "num_steps": 60, "share": 0.5, "seed": 5}


def descended(descent: Descent, loss: Quadratic, until: int | None = None) -> list[float]:
    """Losses before every step of the rest."""
    losses = []
    while descent.step < (descent.num_steps if until is None else until):
        value, gradient = loss(descent.orders)
        losses.append(value)
        descent.advance(value, gradient)
    return [*losses, loss(descent.orders)[0]]


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_falls_far_below_that_of_random_orders(seed: int) -> None:
    sites, start, loss = quadratic_sites(seed)
    descent = Descent(sites, start, **OPTIONS)
    losses = descended(descent, loss)
    random = [loss({name: torch.randperm(len(order)) for name, order in start.items()})[0] for _ in range(100)]
    assert losses[-1] < 0.6 * losses[0]
    assert losses[-1] < min(random)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_orders_stay_permutations_within_their_groups(num_groups: int) -> None:
    sites, start, loss = quadratic_sites(num_groups=num_groups)
    descent = Descent(sites, start, **OPTIONS)
    descended(descent, loss)
    for name, order in descent.orders.items():
        size = len(order) // num_groups
        assert torch.equal(order.sort().values, torch.arange(len(order)))
        assert torch.equal(order // size, torch.arange(len(order)) // size)
        assert torch.equal(start[name], torch.arange(len(order))), "the start is left as it was"


def test_many_swaps_at_first_and_one_in_the_end() -> None:
    sites, start, loss = quadratic_sites()
    descent = Descent(sites, start, n=2, m=4, num_steps=20, share=1.0)
    counts = [descent.advance(*loss(descent.orders)) for _ in range(20)]
    assert 2 < counts[0] <= sum(len(order) // 4 // 2 for order in start.values()), "no block is touched twice"
    assert counts[-1] <= 1


def test_a_step_makes_the_swap_of_the_largest_predicted_fall() -> None:
    """Of all pairs of slots at all sites, as every pair is drawn; the fall by the masks of the public functions."""
    sites, start, loss = quadratic_sites()
    gradient = loss(start)[1]
    falls = {}
    for name, site in sites.items():
        for i, j in itertools.combinations(range(len(start[name])), 2):
            order = start[name].clone()
            order[[i, j]] = order[[j, i]]
            change = loss.mask(name, order) - loss.mask(name, start[name])
            falls[name, i, j] = float((gradient[name] * site.weights * change).sum())
    descent = Descent(sites, start, n=2, m=4, num_steps=1, share=1e-9, num_proposals=4000)
    assert descent.advance(0.0, gradient) == 1
    ((name, slots),) = [
        (name, (descent.orders[name] != order).nonzero().flatten().tolist())
        for name, order in start.items()
        if not torch.equal(descent.orders[name], order)
    ]
    assert falls[name, *slots] == pytest.approx(min(falls.values()))


def test_without_a_gradient_nothing_is_exchanged() -> None:
    sites, start, _ = quadratic_sites()
    descent = Descent(sites, start, **OPTIONS)
    assert descent.advance(1.0, {name: torch.zeros_like(site.weights) for name, site in sites.items()}) == 0
    assert all(torch.equal(descent.orders[name], start[name]) for name in start)


def test_a_gradient_is_remembered() -> None:
    """The mean of a gradient and of its opposite points the way of the first, with the memory as its weight."""
    sites, start, loss = quadratic_sites()
    gradient = loss(start)[1]
    descent = Descent(sites, start, **OPTIONS, momentum=0.8)
    descent.advance(1.0, gradient)
    descent.advance(0.5, {name: -value for name, value in gradient.items()})
    for name, mean in descent.gradients.items():
        torch.testing.assert_close(mean, 0.6 * gradient[name])


def test_the_best_orders_are_those_in_which_the_round_of_the_lowest_loss_began() -> None:
    sites, start, loss = quadratic_sites()
    gradient = loss(start)[1]
    descent, seen = Descent(sites, start, n=2, m=4, num_steps=20, share=0.4, round_length=2), []
    for value in (4.0, 4.0, 3.0, 1.0, 2.0, 3.0, 9.0):
        seen.append({name: order.clone() for name, order in descent.orders.items()})
        descent.advance(value, gradient)
    assert all(torch.equal(descent.best[name], seen[2][name]) for name in start)
    assert any(not torch.equal(descent.best[name], seen[4][name]) for name in start)
    assert descent.losses == [8.0, 4.0, 5.0]


def test_a_descent_goes_on_from_its_state(tmp_path: Path) -> None:
    sites, start, loss = quadratic_sites()
    whole, half = Descent(sites, start, **OPTIONS), Descent(sites, start, **OPTIONS)
    descended(whole, loss)
    descended(half, loss, until=23)
    torch.save(half.state_dict(), tmp_path / "state")
    rest = Descent(sites, start, **OPTIONS)
    rest.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert rest.step == 23
    torch.rand(3)
    descended(rest, loss)
    assert all(torch.equal(rest.orders[name], whole.orders[name]) for name in start)


@pytest.mark.parametrize("broken", ["start", "length", "missing", "type"])
def test_the_state_of_another_descent_is_refused_and_changes_nothing(broken: str) -> None:
    sites, start, loss = quadratic_sites()
    descent = Descent(sites, start, **OPTIONS)
    descended(descent, loss, until=30)
    state = copy.deepcopy(descent.state_dict())
    if broken == "start":
        state["start"]["a"] = state["start"]["a"].flip(0)
    elif broken == "length":
        state["step"] = 61
    elif broken == "missing":
        del state["gradients"]["b"]
    else:
        state["orders"] = None
    other = Descent(sites, start, **OPTIONS)
    with pytest.raises(ValueError, match="descent"):
        other.load_state_dict(state)
    assert other.step == 0
    assert not other.gradients
    assert all(torch.equal(other.orders[name], start[name]) for name in start)
