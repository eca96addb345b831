"""Tiny models pruned by hand, with all that an export is given."""

import copy

import torch
from tiny_models import inputs_of, random_order, tiny

from permlab.sparsity.site import read_sites


def prune(model, sites, orders, *, n, m):
    """Copy with the n largest of every m columns of each row kept, in the order of each site; by hand."""
    pruned = copy.deepcopy(model)
    for site in sites:
        columns = site.column_order(orders[site.name]).tolist()
        for reader in site.readers:
            weight = pruned.get_parameter(f"{reader.module}.weight").data
            for row in range(*(reader.rows or (0, len(weight)))):
                for group in range(0, len(columns), m):
                    members = sorted(columns[group : group + m], key=lambda column: -abs(weight[row, column].item()))
                    weight[row, members[n:]] = 0
    return pruned


def case(name, *, n=2, m=4, dtype=torch.float32, **choice):
    """Dense and pruned model, sites, orders, and inputs to compare them on."""
    dense = tiny(name).to(dtype)
    sites = [site for site in read_sites(dense, **choice) if site.num_items % m == 0]
    orders = {site.name: random_order(site) for site in sites}
    return {"dense": dense, "pruned": prune(dense, sites, orders, n=n, m=m), "sites": sites, "orders": orders,
            "n": n, "m": m, "inputs": inputs_of(dense), "config": {"name": name}}  # fmt: skip


def fresh(name, dtype=torch.float32):
    """The same architecture with other weights, built as a user would."""
    torch.manual_seed(7)
    return tiny(name).to(dtype)
