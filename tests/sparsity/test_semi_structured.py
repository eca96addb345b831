"""Sparse kernels: what of them can be tested without a device that has them."""

import json

import pytest
import torch
from pruned_models import case, fresh, prune
from tiny_models import inputs_of, outputs, random_order, scatter, tiny, vim
from torch import nn

from permlab.sparsity import semi_structured as module
from permlab.sparsity.export_folder import export, load_export
from permlab.sparsity.fold import fold
from permlab.sparsity.pattern import read_patterns
from permlab.sparsity.semi_structured import SemiStructuredLinear, time_layers, to_semi_structured
from permlab.sparsity.site import read_sites


def test_without_cuda_sparse_kernels_are_refused(monkeypatch):
    model = tiny("vit")
    with pytest.raises(ValueError, match="run on CUDA, and this machine has none"):
        to_semi_structured(model, {})
    with pytest.raises(ValueError, match="run on CUDA, and this machine has none"):
        time_layers(model, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="move the model there first"):
        to_semi_structured(model, {})


@pytest.fixture
def pretend(monkeypatch):
    """A device whose sparse kernels are the dense ones, and which refuses narrow weights as torch does."""

    def compress(weight):
        if weight.shape[1] < 16:
            raise RuntimeError("both dimensions")
        compressed.append(tuple(weight.shape))
        return weight

    compressed = []
    monkeypatch.setattr(module, "_check_cuda", lambda model: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", compress)
    return compressed


def test_layers_that_are_no_plain_product_stay_dense(pretend):
    model = scatter(vim(width=64))
    inputs = inputs_of(model)
    sites = read_sites(model, select=["mixer.dt_proj", "mixer.in_proj"])
    orders = {site.name: random_order(site) for site in sites}
    model = prune(model, sites, orders, n=2, m=4)
    expected = outputs(model, inputs)
    fold(model, sites, orders)
    reasons = to_semi_structured(model, read_patterns(sites, n=2, m=4))
    assert reasons == {
        f"blocks.{i}.mixer.dt_proj.weight": f"blocks.{i}.mixer.dt_proj is a StepProjection" for i in (0, 1)
    }
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "choice", "num_sparse"),
    [
        ("vit", {}, 8),
        ("vit", {"coupling": "independent"}, 12),
        ("vit", {"coupling": "independent", "select": ["attn.k", "attn.v"]}, 4),
        ("llama_tied", {"select": "foldable"}, 14),
        ("vim", {}, 8),
    ],
)
def test_sparse_layers_take_the_place_of_pruned_ones(tmp_path, pretend, name, choice, num_sparse):
    setting = case(name, **choice)
    export(tmp_path / "x", **setting)
    model = load_export(tmp_path / "x", fresh(name))
    patterns = json.loads((tmp_path / "x" / "sparsity.json").read_text())["tensors"]
    assert to_semi_structured(model, patterns) == {}
    assert len(pretend) == num_sparse
    assert sum(isinstance(layer, SemiStructuredLinear) for layer in model.modules()) == len(patterns)
    expected = outputs(setting["pruned"], setting["inputs"])
    torch.testing.assert_close(outputs(model, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)


def test_layers_without_a_kernel_stay_dense_and_are_named(pretend):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16))
    patterns = {"0.weight": {"n": 2, "m": 4}}
    with pytest.raises(ValueError, match=r"0\.weight is not 2:4"):
        to_semi_structured(model, patterns)
    with pytest.raises(ValueError, match=r"0\.weight is 1:4; torch has kernels for 2:4 only"):
        to_semi_structured(model, {"0.weight": {"n": 1, "m": 4}})
    nn.init.zeros_(model[0].weight)
    assert to_semi_structured(model, patterns) == {"0.weight": "both dimensions"}
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="no layer of the model is sparse"):
        time_layers(model, torch.zeros(2, 8))


def test_layers_are_timed_on_the_inputs_that_they_get(pretend, monkeypatch):
    model = tiny("vit").float()
    sites = read_sites(model, select=["mlp.fc1", "mlp.fc2"])
    orders = {site.name: random_order(site) for site in sites}
    model = prune(model, sites, orders, n=2, m=4)
    fold(model, sites, orders)
    to_semi_structured(model, read_patterns(sites, n=2, m=4))
    shapes = []

    def time(call, num_repeats):
        result = call()
        shapes.append([tuple(x.shape) for x in (result if isinstance(result, list) else [result])])
        return float(num_repeats)

    monkeypatch.setattr(module, "_time", time)
    report = time_layers(model, inputs_of(model), num_repeats=3)
    assert report["blocks.1.mlp.fc1"] == {"dense_ms": 3.0, "sparse_ms": 3.0, "gather_ms": 3.0}
    assert report["blocks.1.mlp.fc2"] == {"dense_ms": 3.0, "sparse_ms": 3.0, "gather_ms": 0.0}
    assert shapes[:5] == [[(3, 5, 24)], [(3, 5, 24)], [(3, 5, 16)], [(3, 5, 16)], [(3, 5, 16)]]
    assert not any(layer._forward_pre_hooks for layer in model.modules())
