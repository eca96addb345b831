import dataclasses

import pytest
import torch
from tiny_models import llama

from permlab.sparsity.read_sites import read_sites
from permlab.sparsity.weight_site import WeightSite


def test_items_of_grouped_heads():
    heads, repeats, width = 3, 2, 4
    site = WeightSite("o", "o", (), heads * width, (), num_heads=heads, repeats=repeats)
    weight = torch.randn(5, heads * repeats * width)
    items = site.to_items(weight)
    for g in range(heads):
        for r in range(repeats):
            for p in range(width):
                column = weight[:, (g * repeats + r) * width + p]
                assert torch.equal(items[r * 5 : (r + 1) * 5, g * width + p], column)
    assert torch.equal(site.from_items(items), weight)
    # Any order, also one that leaves its head, acts on columns as on items.
    for order in (torch.randperm(heads * width), torch.arange(heads * width).roll(1)):
        columns = site.column_order(order)
        assert columns.sort().values.tolist() == list(range(heads * repeats * width))
        assert torch.equal(site.to_items(weight[:, columns]), items[:, order])


def test_a_plain_site_has_its_columns_for_items():
    site = WeightSite("fc", "fc", (), 6, ())
    weight, order = torch.randn(3, 6), torch.randperm(6)
    assert torch.equal(site.to_items(weight), weight)
    assert torch.equal(site.column_order(order), order)


def test_sites_are_values():
    first, second = (read_sites(llama())[0] for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.name = "other"


def test_wrong_widths_and_orders_are_refused(unchecked):
    site = WeightSite("o", "o", (), 4, (), num_heads=2, repeats=2)
    with pytest.raises(ValueError, match="site o has 8 columns, got 4"):
        site.to_items(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="site o has 4 columns, got 8"):
        site.from_items(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"site o has 4 items, got an order of shape \(3,\)"):
        site.column_order(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="not a permutation"):
        site.column_order(torch.tensor([0, 1, 1, 2]))
