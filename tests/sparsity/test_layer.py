"""The tensors of a site: layouts, what a search is given, and what pruning under an order makes."""

import math

import pytest
import torch
from tiny_models import BUILDERS, inputs_of, random_order, tiny
from torch import Tensor, nn

from permlab.ops.nm import nm_mask
from permlab.sparsity.calibrate import InputStatistics, collect
from permlab.sparsity.importance import magnitude, ria, saliency, sparsegpt, wanda
from permlab.sparsity.layer import NUM_FEATURES, PRUNERS, SiteLayers, assemble_weights, dense_rows
from permlab.sparsity.quality import efficacy, efficacy_of_sums, reconstruction_error, retained
from permlab.sparsity.search import reconstruction_search
from permlab.sparsity.site import Reader, WeightSite, read_sites

OPTIONS = {"pruner": "wanda", "power": 0.5, "damping": 0.01}
CHOICES = {"all": {}, "within_heads": {"within_heads": True}, "independent": {"coupling": "independent"}}


def layers_of(model: nn.Module, sites: list[WeightSite], **changes: object) -> dict[str, SiteLayers]:
    modules = {reader.module: model.get_submodule(reader.module) for site in sites for reader in site.readers}
    statistics = collect(model, modules, [inputs_of(model) for _ in range(12)])
    return {
        site.name: SiteLayers(
            site,
            [dense_rows(model, reader) for reader in site.readers],
            [statistics[reader.module] for reader in site.readers],
            **(OPTIONS | changes),
        )
        for site in sites
    }


def scores_of(pruner: str, weight: Tensor, statistics: InputStatistics) -> Tensor:
    norm = statistics.hessian.diagonal().sqrt()
    return {
        "magnitude": lambda: magnitude(weight),
        "wanda": lambda: wanda(weight, norm),
        "ria": lambda: ria(weight, norm, power=0.5),
        "sparsegpt": lambda: saliency(weight, statistics.hessian, damping=0.01),
    }[pruner]()


def grouped_query_site() -> WeightSite:
    """Two key-value heads of three query heads each, four channels wide."""
    return WeightSite("o", "o", (Reader("o", None),), num_items=8, moves=(), num_heads=2, repeats=3)


def grouped_query(**changes: object) -> SiteLayers:
    """A layer whose inputs are correlated within a query head and not between them."""
    site, weight = grouped_query_site(), torch.randn(5, 24).double()
    blocks = [torch.randn(4, 9).double() for _ in range(6)]
    hessian = torch.block_diag(*(block @ block.mT for block in blocks))
    return SiteLayers(site, [weight], [InputStatistics(hessian, 9)], **(OPTIONS | changes))


# Layout


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["timm", "transformers_llama", "vim", "qwen_vl"])
def test_rows_survive_the_way_to_items_and_back(name: str, choice: str) -> None:
    model = tiny(name)
    for site in read_sites(model, **CHOICES[choice]):
        weights = [dense_rows(model, reader) for reader in site.readers]
        statistics = [InputStatistics(torch.eye(weight.shape[1]).double(), 1) for weight in weights]
        layers = SiteLayers(site, weights, statistics, **OPTIONS)
        assert layers.items.shape == layers.scores.shape == (site.num_items, sum(map(len, weights)) * site.repeats)
        for found, weight in zip(layers.unstack(layers.items), weights, strict=True):
            assert torch.equal(found, weight)
        for found, weight in zip(layers.unstack(layers.scores), weights, strict=True):
            assert torch.equal(found, weight.abs())


def test_the_rows_of_an_item_are_its_columns_of_all_query_heads() -> None:
    layers = grouped_query()
    (weight,) = layers.weights
    for head in range(2):
        for channel in range(4):
            columns = [(3 * head + repeat) * 4 + channel for repeat in range(3)]
            expected = torch.cat([weight[:, column] for column in columns])
            assert torch.equal(layers.items[4 * head + channel], expected)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_scores_are_those_of_the_layers_one_by_one(pruner: str) -> None:
    model = tiny("transformers_llama")
    (site, _) = read_sites(model, select=["self_attn.qkv"])
    layers = layers_of(model, [site], pruner=pruner)[site.name]
    expected = [scores_of(pruner, *pair) for pair in zip(layers.weights, layers.statistics, strict=True)]
    torch.testing.assert_close(layers.scores, torch.cat(expected).mT)


def test_what_is_not_finite_is_named() -> None:
    site, statistics = grouped_query_site(), InputStatistics(torch.eye(24), 1)
    with pytest.raises(ValueError, match="weights of layer o are not finite"):
        SiteLayers(site, [torch.full((2, 24), torch.nan)], [statistics], **OPTIONS)


# What a search is given


def error_of(removed: Tensor, hessian: Tensor) -> float:
    return torch.trace(removed @ hessian @ removed.mT).item()


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_parts_that_a_search_is_given_add_up_to_the_layer(repeats: int) -> None:
    if repeats == 3:
        layers = grouped_query()
    else:
        site = WeightSite("x", "x", (Reader("a", None), Reader("b", None)), num_items=8, moves=())
        inputs = torch.randn(30, 8).double()
        statistics = InputStatistics(inputs.mT @ inputs, 30)
        weights = [torch.randn(5, 8).double(), torch.randn(3, 8).double()]
        layers = SiteLayers(site, weights, [statistics] * 2, **OPTIONS)
    given = layers.search_inputs(n=2, m=4, num_groups=2, seed=7)
    assert (given.n, given.m, given.num_groups, given.seed) == (2, 4, 2, 7)
    assert len(given.weights) == len(given.hessians) == len(given.scores) == (3 if repeats == 3 else 2)
    assert torch.equal(given.joint_scores(), layers.scores.mT)
    order = torch.cat([torch.randperm(4), 4 + torch.randperm(4)])
    parts = 0.0
    for weight, hessian, scores in zip(given.weights, given.hessians, given.scores, strict=True):
        mask = torch.zeros_like(weight)
        mask[:, order] = nm_mask(scores[:, order], n=2, m=4).double()
        parts += error_of(weight * (1 - mask), hessian)
    pruned = layers.prune(order, n=2, m=4)
    whole = sum(
        error_of(weight - other, statistics.hessian)
        for weight, other, statistics in zip(layers.weights, pruned, layers.statistics, strict=True)
    )
    assert parts == pytest.approx(whole, rel=1e-9)


def test_a_search_lowers_the_real_error() -> None:
    layers = grouped_query()
    given = layers.search_inputs(n=2, m=4, num_groups=2, seed=0)
    order = reconstruction_search(
        given.weights, given.hessians, given.scores, n=2, m=4, num_groups=2, order=torch.arange(8), num_swaps=50
    )
    assert torch.equal(order, torch.arange(8)), "a head of one block has nothing to exchange"
    order = reconstruction_search(
        given.weights, given.hessians, given.scores, n=1, m=2, num_groups=2, order=torch.arange(8), num_swaps=200
    )
    hessian = layers.statistics[0].hessian
    found, default = (
        reconstruction_error(layers.weights[0], layers.prune(o, n=1, m=2)[0], hessian) for o in (order, torch.arange(8))
    )
    assert found < default


# Pruning under an order


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "ria"])
@pytest.mark.parametrize("name", ["timm", "llama_text", "transformers_llama", "vim"])
def test_pruned_rows_are_n_of_m_in_the_order_of_the_columns(name: str, pruner: str) -> None:
    """By hand: bring the columns into their order, keep the n best of every m, bring them back."""
    model = tiny(name)
    sites = [site for site in read_sites(model, within_heads=True) if not site.optional]
    for site_layers in layers_of(model, sites, pruner=pruner).values():
        order = random_order(site_layers.site)
        columns = site_layers.site.column_order(order)
        pruned = site_layers.prune(order, n=2, m=4)
        triples = zip(site_layers.weights, site_layers.statistics, pruned, strict=True)
        for weight, statistics, found in triples:
            scores = scores_of(pruner, weight, statistics)
            expected = torch.zeros_like(weight)
            for first in range(0, len(columns), 4):
                group = columns[first : first + 4]
                for row in range(len(weight)):
                    best = sorted(group.tolist(), key=lambda column: -scores[row, column].item())[:2]
                    expected[row, best] = weight[row, best]
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["timm", "transformers_llama"])
def test_sparsegpt_is_that_of_the_layer_under_the_column_order(name: str) -> None:
    model = tiny(name)
    sites = read_sites(model, within_heads=True)
    for layers in layers_of(model, sites, pruner="sparsegpt").values():
        order = random_order(layers.site)
        triples = zip(layers.weights, layers.statistics, layers.prune(order, n=2, m=4), strict=True)
        for weight, statistics, found in triples:
            columns = layers.site.column_order(order)
            expected, mask = sparsegpt(weight, statistics.hessian, n=2, m=4, order=columns, damping=0.01)
            assert torch.equal(found, expected)
            assert (found[:, columns].view(len(weight), -1, 4) != 0).sum(-1).max() <= 2
            assert not torch.equal(found, weight * mask), "what is kept is updated"


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2)])
def test_kept_are_the_sums_behind_retained_and_efficacy(n: int, m: int) -> None:
    weight, inputs = torch.randn(6, 16).double(), torch.randn(40, 16).double()
    site = WeightSite("x", "x", (Reader("a", None),), num_items=16, moves=())
    layers = SiteLayers(site, [weight], [InputStatistics(inputs.mT @ inputs, 40)], **OPTIONS)
    order = torch.randperm(16)
    kept, default, best, total = layers.kept(order, n=n, m=m)
    scores = wanda(weight, inputs.square().sum(0).sqrt())
    assert kept / total == pytest.approx(retained(scores, order, n=n, m=m), rel=1e-12)
    assert default / total == pytest.approx(retained(scores, torch.arange(16), n=n, m=m), rel=1e-12)
    assert (kept - default) / (best - default) == pytest.approx(efficacy(scores, order, n=n, m=m), rel=1e-9)


# The best half of every row: two of every four columns, and the first four, which the third order below spreads.
AT_THE_BOUND = torch.tensor([[9.0, 8, 0.5, 0.25, 7, 6, 0.75, 0.5], [7.0, 9, 0.1, 0.3, 8, 5, 0.2, 0.1]]).double()
MIXED = torch.tensor([[9.0, 8, 7, 6, 0.5, 0.25, 0.75, 0.5], [7.0, 9, 5, 8, 0.1, 0.2, 0.3, 0.1]]).double()
EQUAL, ACROSS, DEFAULT = [1, 3, 0, 2, 6, 4, 5, 7], [0, 1, 4, 5, 2, 3, 6, 7], list(range(8))


@pytest.mark.parametrize(
    ("weight", "order", "expected"),
    [
        (AT_THE_BOUND, DEFAULT, 1.0),
        (AT_THE_BOUND, EQUAL, 1.0),
        (AT_THE_BOUND, ACROSS, -math.inf),
        (torch.zeros(2, 8).double(), ACROSS, 1.0),
        (MIXED, DEFAULT, 0.0),
        (MIXED, ACROSS, 1.0),
        (MIXED, [0, 4, 5, 6, 1, 2, 3, 7], None),
    ],
)
def test_efficacy_of_a_run_is_that_of_its_scores(weight: Tensor, order: list[int], expected: float | None) -> None:
    """A run adds up the sums of its sites; the same scores, one below the other, have the same efficacy."""
    statistics = InputStatistics(torch.eye(8).double(), 8)
    sites = [WeightSite(name, name, (Reader(name, None),), num_items=8, moves=()) for name in "ab"]
    layers = [SiteLayers(site, [weight * (2 if site.name == "b" else 1)], [statistics], **OPTIONS) for site in sites]
    sums = [part.kept(torch.tensor(order), n=2, m=4) for part in layers]
    kept, default, bound, _ = map(sum, zip(*sums, strict=True))
    found = efficacy_of_sums(kept, default, bound)
    assert found == pytest.approx(efficacy(torch.cat([x.scores.mT for x in layers]), torch.tensor(order), n=2, m=4))
    if expected is not None:
        assert found == pytest.approx(expected)


def test_features_are_standardised_statistics_of_the_channels() -> None:
    model = tiny("transformers_llama")
    for layers in layers_of(model, read_sites(model, within_heads=True)).values():
        features = layers.features()
        assert features.shape == (layers.site.num_items, NUM_FEATURES)
        torch.testing.assert_close(features.mean(0), torch.zeros(NUM_FEATURES).double(), atol=1e-9, rtol=0)
        torch.testing.assert_close(features.std(0, correction=0), torch.ones(NUM_FEATURES).double())
        # The fourth is the mean score, up to an affine map.
        mean = layers.scores.mean(1)
        torch.testing.assert_close(features[:, 3], (mean - mean.mean()) / mean.std(correction=0))


def test_features_of_a_dead_channel_and_of_equal_ones_are_finite() -> None:
    site = WeightSite("x", "x", (Reader("a", None),), num_items=4, moves=())
    hessian = torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    for weight in (torch.zeros(3, 4), torch.ones(3, 4)):
        layers = SiteLayers(site, [weight], [InputStatistics(hessian, 1)], **OPTIONS)
        assert torch.isfinite(layers.features()).all()


# Whole weights


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", BUILDERS)
def test_dense_rows_assemble_to_the_weights_of_the_model(name: str, choice: str) -> None:
    model = tiny(name)
    sites = read_sites(model, **CHOICES[choice])
    rows = {site.name: [dense_rows(model, reader) for reader in site.readers] for site in sites}
    weights = assemble_weights(model, sites, rows)
    assert set(weights) == {f"{reader.module}.weight" for site in sites for reader in site.readers}
    for weight_name, weight in weights.items():
        assert torch.equal(weight, model.get_parameter(weight_name))


@pytest.mark.parametrize("kinds", [["attn.k"], ["attn.v", "attn.q"], ["attn.q", "attn.k", "attn.v"]])
def test_rows_that_are_not_selected_stay(kinds: list[str]) -> None:
    model = tiny("timm")
    sites = read_sites(model, select=kinds, coupling="independent")
    weights = assemble_weights(
        model, sites[::-1], {site.name: [torch.full((16, 16), float(site.kind == "attn.k"))] for site in sites}
    )
    for block in range(2):
        dense = model.blocks[block].attn.qkv.weight
        found = weights[f"blocks.{block}.attn.qkv.weight"]
        assert found.dtype == dense.dtype
        for index, part in enumerate(("attn.q", "attn.k", "attn.v")):
            rows = slice(16 * index, 16 * index + 16)
            expected = torch.full((16, 16), float(part == "attn.k")).double() if part in kinds else dense[rows]
            assert torch.equal(found[rows], expected)
