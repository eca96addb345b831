"""The search for an order by its closed-form loss: against scikit-learn's ridge, and all orders of few items."""

import itertools
import time

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from permlab.ops import ridge_search as module
from permlab.ops.ridge_search import memory_weights, ridge_loss, ridge_search

NUM_IMAGES, NUM_ITEMS = 120, 6


def images(num_items: int = NUM_ITEMS, num_features: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Items of three classes, some of which tell the class more than others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (NUM_IMAGES,), generator=generator)
    means = 1.5 * torch.randn(3, num_items, num_features, generator=generator)
    return means[labels] + torch.randn(NUM_IMAGES, num_items, num_features, generator=generator), labels


def shuffled(num_items: int, seed: int = 1) -> torch.Tensor:
    return torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))


# The memory


@pytest.mark.parametrize("readout", ["last", "mean"])
def test_the_weights_are_those_of_the_recurrence(readout):
    weights = memory_weights(5, num_memories=3, longest_memory=20.0, readout=readout)
    lengths = [1.0, 20.0**0.5, 20.0]
    for slot, (memory, length) in itertools.product(range(5), enumerate(lengths)):
        state, states = 0.0, []
        for other in range(5):
            state = np.exp(-1 / length) * state + (other == slot)
            states.append(state)
        expected = states[-1] if readout == "last" else np.mean(states)
        assert weights[memory, slot] == pytest.approx(expected)


# The loss


@pytest.mark.parametrize("readout", ["last", "mean"])
@pytest.mark.parametrize(("num_features", "num_components"), [(1, 4), (3, 4), (5, 2)])
@pytest.mark.parametrize("num_folds", [2, 3])
def test_the_loss_is_that_of_scikit_learns_ridge(num_folds, num_features, num_components, readout):
    items, labels = images(num_features=num_features)
    order = shuffled(NUM_ITEMS)
    options = {"num_memories": 4, "longest_memory": 12.0, "readout": readout}
    found = ridge_loss(
        items, labels, order, ridge=0.2, num_folds=num_folds, num_components=num_components, seed=5, **options
    )
    x = items.double().numpy()
    x = x - x.mean(0)
    kept = min(num_features, num_components)
    x = PCA(kept).fit_transform(x.reshape(-1, num_features)).reshape(NUM_IMAGES, NUM_ITEMS, kept)
    x = x[:, order.numpy()] / x.std()
    states = np.stack([x.swapaxes(1, 2) @ row for row in memory_weights(NUM_ITEMS, **options)], -1)
    states = states.reshape(NUM_IMAGES, -1)
    targets = np.eye(3)[labels.numpy()]
    targets -= targets.mean(0)
    places = np.random.default_rng(5).permutation(NUM_IMAGES)
    error = 0.0
    for fold in range(num_folds):
        held_out = places[fold::num_folds]
        rest = np.setdiff1d(places, held_out)
        ridge = Ridge(alpha=0.2 * len(rest), fit_intercept=False).fit(states[rest], targets[rest])
        error += ((ridge.predict(states[held_out]) - targets[held_out]) ** 2).sum()
    assert found == pytest.approx(error / (targets**2).sum(), rel=1e-9)


def test_the_loss_has_no_unit():
    items, labels = images()
    order = shuffled(NUM_ITEMS)
    assert ridge_loss(7 * items + 3, labels, order) == pytest.approx(ridge_loss(items, labels, order), rel=1e-5)


def test_constant_items_explain_nothing():
    _, labels = images()
    assert ridge_loss(torch.ones(NUM_IMAGES, 4, 2), labels, torch.arange(4)) == pytest.approx(1.0)


# The search


@pytest.mark.parametrize("seed", range(4))
def test_a_few_items_are_ordered_best_of_all(seed):
    """All 120 orders of 5 items are tried; three starts get to the best of them."""
    items, labels = images(5, seed=seed)
    options = {"num_memories": 2, "longest_memory": 4.0, "seed": seed}
    best = min(ridge_loss(items, labels, torch.tensor(o), **options) for o in itertools.permutations(range(5)))
    starts = [torch.arange(5), torch.arange(5).flip(0), shuffled(5)]
    found = [ridge_search(items, labels, start, num_swaps=200, **options) for start in starts]
    assert min(ridge_loss(items, labels, order, **options) for order in found) == pytest.approx(best, rel=1e-9)


def test_a_planted_order_is_read_as_well_as_it_was_planted():
    """Labels are those of a teacher's fading memory of the planted order."""
    generator = torch.Generator().manual_seed(0)
    planted, items = shuffled(12), torch.randn(600, 12, 1, generator=generator)
    options = {"num_memories": 2, "longest_memory": 6.0}
    weights = torch.from_numpy(memory_weights(12, readout="last", **options)).float()
    states = items[:, planted, 0] @ weights.T
    labels = ((states - states.mean(0)) @ torch.tensor([1.0, -0.3]) > 0).long()
    start = torch.arange(12)
    loss = {
        name: ridge_loss(items, labels, order, **options)
        for name, order in (
            ("planted", planted),
            ("start", start),
            ("found", ridge_search(items, labels, start, num_swaps=2000, **options)),
        )
    }
    assert loss["found"] < loss["planted"] + 0.01 < loss["start"] - 0.1


@pytest.mark.parametrize("num_features", [1, 3])
def test_every_swap_that_is_made_lowers_the_loss_as_it_is_computed_anew(monkeypatch, num_features):
    items, labels = images(10, num_features)
    options = {"num_memories": 3, "num_components": 2, "seed": 2}
    losses, swap = [], module._Regression.swap_if_better

    def watched(self, first, second):
        before, order = self.loss, self.order.copy()
        made = swap(self, first, second)
        assert made == (not np.array_equal(order, self.order))
        assert self.loss < before if made else self.loss == before
        if made:
            losses.append(self.loss)
            anew = ridge_loss(items, labels, torch.from_numpy(self.order), **options)
            assert self.loss == pytest.approx(anew, rel=1e-9)
        return made

    monkeypatch.setattr(module._Regression, "swap_if_better", watched)
    ridge_search(items, labels, torch.arange(10), num_swaps=150, **options)
    assert len(losses) > 5
    assert losses == sorted(losses, reverse=True)


def test_the_seed_decides():
    items, labels = images(16)
    start = torch.arange(16)
    found = [ridge_search(items, labels, start, num_swaps=60, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_groups_are_kept():
    items, labels = images(12)
    found = ridge_search(items, labels, torch.arange(12), num_groups=3, num_swaps=300)
    assert torch.equal(found // 4, torch.arange(12) // 4)
    assert not torch.equal(found, torch.arange(12))


def test_a_budget_ends_the_search():
    items, labels = images(16)
    began = time.process_time()
    ridge_search(items, labels, torch.arange(16), num_swaps=10**6, budget_s=0.05)
    assert time.process_time() - began < 2


def test_no_swap_leaves_the_start():
    items, labels = images()
    start = shuffled(NUM_ITEMS)
    assert torch.equal(ridge_search(items, labels, start, num_swaps=0), start)
    assert torch.equal(ridge_search(items[:, :1], labels, torch.tensor([0])), torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_swaps": -1}, "num_swaps=-1"),
        ({"num_groups": 4}, "num_groups=4 does not divide 6"),
        ({"num_folds": 1}, "num_folds=1"),
        ({"num_folds": 121}, "num_folds=121.*120"),
        ({"ridge": 0.0}, "ridge=0"),
        ({"num_components": 0}, "num_components=0"),
        ({"num_memories": 0}, "num_memories=0"),
        ({"longest_memory": -2.0}, "longest_memory=-2"),
        ({"budget_s": 0.0}, "budget_s=0"),
        ({"order": torch.tensor([0, 0, 1, 2, 3, 4])}, "index 5 is missing"),
        ({"items": torch.full((NUM_IMAGES, NUM_ITEMS, 1), torch.nan)}, "not finite"),
    ],
)
def test_bad_arguments_are_named(change, message):
    items, labels = images()
    arguments = {"items": items, "labels": labels, "order": torch.arange(NUM_ITEMS)} | change
    with pytest.raises(ValueError, match=message):
        ridge_search(**arguments)
