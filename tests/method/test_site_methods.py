"""A method for every site: coordinates of the starting order, features, and what they share."""

import pytest
import torch
from tiny_models import tiny

from permlab.method.fixed import Fixed
from permlab.method.reorder import Reorder
from permlab.method.sinkhorn import Sinkhorn
from permlab.method.site_methods import SiteMethods
from permlab.permutation import Site, check_order
from permlab.sparsity.layer import NUM_FEATURES
from permlab.sparsity.site import WeightSite, read_sites

SINKHORN = {"lr": 0.1, "warmup_fraction": 0.2, "freeze_fraction": 0.3, "estimator": "straight_through"}
SINKHORN |= {"num_iters": 5, "noise": 0.0, "start": "order", "start_scale": 1.0, "jitter": 0.01, "width": 4}
REORDER = {"lr": 0.1, "warmup_fraction": 0.0, "freeze_fraction": 0.0, "spread": 1.0, "num_samples": 3}
REORDER |= {"granularity": "batch", "baseline": "leave_one_out", "baseline_momentum": 0.9}


def make(method: str = "sinkhorn", **changes: object) -> SiteMethods:
    sites = read_sites(tiny("timm"))

    def build(site: WeightSite, count: int):
        where = Site(site.name, torch.arange(site.num_items), num_groups=count, num_features=NUM_FEATURES)
        if method == "fixed":
            return Fixed(where)
        if method == "reorder":
            return Reorder(where, temperature=0.5, temperature_in_log_prob=True, **(REORDER | changes))
        temperature = {"kind": "linear", "start": 1.0, "end": 0.1}
        return Sinkhorn(where, temperature=temperature, **(SINKHORN | {"cost": "table"} | changes))

    bases = [torch.cat([torch.randperm(8), 8 + torch.randperm(site.num_items - 8)]) for site in sites]
    groups = [2 if site.num_items == 16 else 1 for site in sites]
    return SiteMethods(sites, bases, groups, build)


def test_at_the_start_the_order_is_the_starting_one() -> None:
    for method in ("fixed", "sinkhorn", "reorder"):
        methods = make(method)
        for name, order in methods.orders().items():
            assert torch.equal(order, methods.base(name))
            assert (order != torch.arange(len(order))).any()
            assert torch.equal(order, methods.bases()[name])


def test_orders_are_read_through_the_base() -> None:
    methods = make()
    first = methods.sites[0].name
    method = methods[first]
    own = torch.cat([torch.randperm(8), 8 + torch.randperm(8)])
    with torch.no_grad():
        for group in range(2):
            block = torch.zeros(8, 8)
            block[torch.arange(8), own[8 * group : 8 * group + 8] - 8 * group] = 5.0
            method.table[group] = block
    base = torch.cat([8 + torch.randperm(8), torch.randperm(8)])
    methods.rebase(first, base)
    expected = [base[index].item() for index in own.tolist()]
    assert methods.orders()[first].tolist() == expected
    copied = methods.bases()
    methods.rebase(first, torch.arange(16))
    assert torch.equal(copied[first], base), "bases are copies"
    methods.rebase(first, copied[first])
    assert methods.orders()[first].tolist() == expected


def test_features_follow_the_base() -> None:
    methods = make("sinkhorn", cost="network")
    for site in methods.sites:
        assert methods.features(site.name) is None
        features = torch.rand(site.num_items, NUM_FEATURES).double()
        methods.set_features(site.name, features)
        found = methods.features(site.name)
        assert found.dtype == torch.float32
        for slot, item in enumerate(methods.base(site.name).tolist()):
            torch.testing.assert_close(found[slot], features[item].float())
    assert not any("features" in key for key in methods.state_dict()), "they are computed anew"
    for order in methods.orders().values():
        check_order(order)
    samples = methods.sample(torch.Generator().manual_seed(0))
    assert {name: sample.order.shape for name, sample in samples.items()} == {
        site.name: (site.num_items,) for site in methods.sites
    }


def test_every_site_draws_noise_of_its_own_from_one_generator() -> None:
    methods = make("sinkhorn", noise=1.0).train()
    methods.advance(50, 100)
    names = [site.name for site in methods.sites]
    first, again, other = (methods.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name].soft, again[name].soft) for name in names)
    assert not any(torch.equal(first[name].soft, other[name].soft) for name in names)
    alike = [name for name in names if name.endswith("mlp.fc2")]
    assert not torch.equal(first[alike[0]].soft, first[alike[1]].soft)


def test_phase_and_temperature_step_together() -> None:
    methods = make()
    assert methods.lr == 0.1
    assert methods.num_polish_steps == 0
    for step, phase in ((0, "warmup"), (20, "active"), (69, "active"), (70, "frozen")):
        methods.advance(step, 100)
        assert {methods[site.name].phase for site in methods.sites} == {methods.phase} == {phase}
        assert {methods[site.name].temperature for site in methods.sites} == {methods.temperature}
    assert methods.temperature == pytest.approx(0.1)


def test_statistics_are_means_over_sites() -> None:
    methods = make("reorder")
    with torch.no_grad():
        for site in methods.sites:
            methods[site.name].logits.copy_(torch.randn(site.num_items))
    found = methods.statistics()
    tables = [methods[site.name].statistics() for site in methods.sites]
    for key in ("entropy", "temperature", "kendall", "displacement"):
        assert found[key].item() == pytest.approx(sum(float(table[key]) for table in tables) / len(tables))
    assert found["kendall"] > 0


def test_the_state_brings_orders_back() -> None:
    methods, other = make("reorder"), make("reorder")
    with torch.no_grad():
        for site in methods.sites:
            methods[site.name].logits.copy_(torch.randn(site.num_items))
    state = methods.state_dict()
    other.load_state_dict(state)
    for name, order in methods.orders().items():
        assert torch.equal(other.orders()[name], order)
    # One parameter a site, under a name that holds no further dot.
    assert sorted(key for key, _ in other.named_parameters()) == sorted(
        f"methods.{site.name.replace('.', '/')}.logits" for site in other.sites
    )
