"""What the search finds is where the learning starts."""

import pytest
import torch

from permlab.method.preset import make_method
from permlab.method.training_items import TrainingItems
from permlab.permutation import Site, permute

NUM_ITEMS = 12
START = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(1))


def training() -> TrainingItems:
    """Items of which a few tell the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    items = torch.randn(100, NUM_ITEMS, 1, generator=generator)
    items[:, ::4, 0] += 2.0 * labels[:, None]
    return TrainingItems(lambda count: (items[:count], labels[:count]), seed=3)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_it_starts_from_the_order_of_the_search_alone(num_groups):
    start = START if num_groups == 1 else torch.arange(NUM_ITEMS)
    site = Site("patches", start, num_groups)
    search, hybrid = make_method("ridge_search", site), make_method("ridge_hybrid", site)
    before = hybrid.table.detach().clone()
    for method in (search, hybrid):
        method.prepare(training())
    assert not torch.equal(search.best(), start)
    assert torch.equal(hybrid.best(), search.best())
    # Every slot has the scores that it had, each now of another item.
    assert torch.equal(hybrid.table.sort(-1).values, before.sort(-1).values)
    assert torch.equal(hybrid.start_order, start)


def test_preparing_again_changes_nothing():
    """As a run does that is resumed."""
    method = make_method("ridge_hybrid", Site("patches", START))
    method.prepare(training())
    table = method.table.detach().clone()
    method.prepare(training())
    assert torch.equal(method.table, table)


def test_it_learns_on_from_there():
    method = make_method("ridge_hybrid", Site("patches", START))
    method.prepare(training())
    found = method.best()
    items = torch.linspace(-1, 1, NUM_ITEMS).view(1, NUM_ITEMS, 1)
    weight = torch.linspace(-1, 1, NUM_ITEMS).view(1, NUM_ITEMS, 1)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
    for step in range(100):
        method.advance(step, 100)
        sample = method(items)
        if sample.estimator == "none":
            break
        optimizer.zero_grad()
        (weight * permute(items, sample)).sum().backward()
        optimizer.step()
    learned = method.best()
    assert (weight * items[:, learned]).sum() < (weight * items[:, found]).sum() - 1
    assert torch.equal(method.base_order, found)
