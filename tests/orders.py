"""Channel orders and single changes of them, for the tests of searches."""

from itertools import combinations

import torch

from permlab.permutation import check_order


def swaps(width, m, num_groups):
    """Pairs of positions in different blocks of the same group."""
    size = width // num_groups
    pairs = combinations(range(width), 2)
    return [(i, j) for i, j in pairs if i // size == j // size and i // m != j // m]


def swapped(order, i, j):
    order = order.clone()
    order[[i, j]] = order[[j, i]]
    return order


def assert_within_groups(order, num_groups):
    check_order(order)
    home = torch.arange(len(order)) // (len(order) // num_groups)
    assert torch.equal(order // (len(order) // num_groups), home)
