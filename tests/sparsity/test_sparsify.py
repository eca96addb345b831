"""Any model pruned in one call: masks are those of the scores, orders those of the search, an export opens."""

import copy

import pytest
import torch
from tiny_models import inputs_of, outputs, tiny
from torch import nn

from permlab.sparsity.export import load_export
from permlab.sparsity.pattern import read_patterns, verify_pattern
from permlab.sparsity.site import Move, Reader, WeightSite, read_sites
from permlab.sparsity.sparsify import sparsify

HIDDEN = WeightSite("hidden", "hidden", (Reader("2", None),), 16, (Move("0.weight", 0), Move("0.bias", 0)))
OPEN = WeightSite("hidden", "hidden", (Reader("2", None),), 16, ())


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()


def kept_by_wanda(model: nn.Sequential, samples: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """By the definition: of every four channels of the order, the two with the largest |weight| times input norm."""
    scores = model[2].weight.abs() * model[1](model[0](samples)).norm(dim=0)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for group in order.view(-1, 4):
        for row in range(len(scores)):
            keep[row, group[scores[row, group].topk(2).indices]] = True
    return keep


@pytest.mark.parametrize("search", ["none", "deal_and_match", "swap_search", "reconstruction_search"])
def test_masks_are_those_of_wanda_under_the_order(search: str) -> None:
    model, samples = mlp(), torch.randn(64, 8).double()
    before = copy.deepcopy(model.state_dict())
    pruned = sparsify(model, samples.split(20), sites=[HIDDEN], search=search)
    expected = model[2].weight * kept_by_wanda(model, samples, pruned.orders["hidden"])
    torch.testing.assert_close(pruned.model[2].weight, expected, rtol=0, atol=0)
    assert (pruned.orders["hidden"].tolist() == list(range(16))) == (search == "none")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert pruned.model.training == model.training
    assert (pruned.efficacy["hidden"] > 0) == (
        search in ("deal_and_match", "swap_search")
    ) or search == "reconstruction_search"


@pytest.mark.parametrize("site", [HIDDEN, OPEN], ids=["folded", "gathered"])
def test_an_export_of_a_module_of_ones_own_opens(site: WeightSite, tmp_path) -> None:
    model, samples = mlp(), torch.randn(32, 8).double()
    pruned = sparsify(model, [samples], sites=[site])
    report = pruned.export(tmp_path / "new", samples, config={"layers": [8, 16, 4]})
    assert (report["num_folded"], report["num_gathered"]) == ((1, 0) if site.moves else (0, 1))
    loaded = load_export(tmp_path / "new", mlp())
    torch.testing.assert_close(loaded(samples), pruned.model(samples))
    verify_pattern(loaded.state_dict(), read_patterns([site], n=2, m=4))


@pytest.mark.parametrize("name", ["vit", "llama_text"])
def test_sites_of_known_families_are_read_from_the_model(name: str) -> None:
    model = tiny(name)
    inputs = inputs_of(model)
    batch = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
    pruned = sparsify(model, [batch], search="deal_and_match", pruner="sparsegpt", damping=0.1)
    assert list(pruned.orders) == [site.name for site in read_sites(model)]
    for site in pruned.sites:
        for reader in site.readers:
            weight = pruned.model.get_submodule(reader.module).weight
            assert (weight != 0).double().mean() <= 0.5
    assert torch.isfinite(outputs(pruned.model, inputs)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruner": "wand"}, "pruner=wand; nearest valid choice: wanda"),
        ({"search": "swop_search"}, "search=swop_search; nearest valid choice: swap_search"),
        ({"m": 5}, "site hidden: "),
        ({"num_groups": 3}, "site hidden: num_groups=3 does not divide 16 channels"),
        ({"sites": [WeightSite("h", "h", (Reader("3", None),), 16, ())]}, "there is no layer 3"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(mlp(), [torch.randn(8, 8).double()], **({"sites": [HIDDEN]} | changes))
