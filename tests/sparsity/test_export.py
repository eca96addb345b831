import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import LLAMA, inputs_of, llama, outputs, random_order, scatter, tiny, vim, vit
from torch import nn
from transformers import LlamaForCausalLM

from permlab.sparsity import export as module
from permlab.sparsity.export import (
    SemiStructuredLinear,
    as_causal_lm,
    as_timm,
    export,
    load_export,
    read_patterns,
    time_layers,
    to_semi_structured,
    verify_pattern,
)
from permlab.sparsity.fold import GatheredLinear, fold
from permlab.sparsity.site import read_sites

FILES = {"model.safetensors", "permutation.safetensors", "sparsity.json", "config.json", "SHA256SUMS"}


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


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("name", ["vit", "timm", "vim", "llama_tied", "transformers_tied", "qwen_vl"])
def test_an_export_is_the_pruned_model_in_the_folded_layout(tmp_path, name, n, m):
    setting = case(name, n=n, m=m)
    before = {key: value.clone() for key, value in setting["pruned"].state_dict().items()}
    report = export(tmp_path / "x", **setting)
    assert {path.name for path in (tmp_path / "x").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert all(torch.equal(before[key], value) for key, value in setting["pruned"].state_dict().items())

    loaded = load_export(tmp_path / "x", fresh(name))
    expected = outputs(setting["pruned"], setting["inputs"])
    torch.testing.assert_close(outputs(loaded, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)

    # Zeros counted with numpy, from the files alone.
    state, sparsity = (
        load_file(tmp_path / "x" / "model.safetensors"),
        json.loads((tmp_path / "x/sparsity.json").read_text()),
    )
    groups = nonzero = size = 0
    for tensor, pattern in sparsity["tensors"].items():
        weight = state[tensor].numpy()
        kept = (weight.reshape(len(weight), -1, m) != 0).sum(-1)
        assert pattern == {"n": n, "m": m}
        assert kept.max() == n
        groups, nonzero, size = groups + kept.size, nonzero + kept.sum(), size + weight.size
    assert set(sparsity["tensors"]) == {f"{r.module}.weight" for site in setting["sites"] for r in site.readers}
    assert report["num_groups"] == groups
    assert report["num_tensors"] == len(sparsity["tensors"])
    assert report["nonzero_fraction"] == pytest.approx(nonzero / size)
    assert report["nonzero_fraction"] == pytest.approx(n / m)
    assert max(report["dense_difference"], report["pruned_difference"]) < 1e-5
    gathered = sum(not site.moves for site in setting["sites"])
    assert (report["num_gathered"], report["num_folded"]) == (gathered, len(setting["sites"]) - gathered)
    assert json.loads((tmp_path / "x" / "config.json").read_text()) == {"name": name}
    stored = load_file(tmp_path / "x" / "permutation.safetensors")
    assert stored.keys() == setting["orders"].keys()
    assert all(torch.equal(stored[key], order) for key, order in setting["orders"].items())


@pytest.mark.parametrize("name", ["vit_mean_slot", "vim_forward", "llama_image", "qwen2", "timm_norms"])
def test_every_coupling_and_the_foldable_sites_alone(tmp_path, name):
    for choice in ({"coupling": "independent"}, {"select": "foldable"}, {"select": "stream"}):
        setting = case(name, **choice)
        folder = tmp_path / str(choice)
        report = export(folder, **setting)
        loaded = load_export(folder, fresh(name))
        expected = outputs(setting["pruned"], setting["inputs"])
        torch.testing.assert_close(outputs(loaded, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)
        if "select" in choice:
            assert report["num_gathered"] == 0
            assert not any(isinstance(layer, GatheredLinear) for layer in loaded.modules())


def test_the_sites_are_written_down(tmp_path):
    setting = case("vit", coupling="independent", select=["attn.q", "mlp.fc2"])
    report = export(tmp_path / "x", **setting)
    sparsity = json.loads((tmp_path / "x" / "sparsity.json").read_text())
    assert sparsity["sites"][0] == {
        "name": "blocks.0.attn.q", "kind": "attn.q", "mode": "gather", "num_items": 16, "num_heads": 1, "repeats": 1,
        "readers": [{"module": "blocks.0.attn.qkv", "rows": [0, 16]}],
    }  # fmt: skip
    assert [site["mode"] for site in sparsity["sites"]] == ["gather", "folded"] * 2
    assert sparsity["gathers"]["blocks.0.attn.qkv"] == [16, 32]
    assert sparsity["tensors"]["blocks.0.attn.qkv.weight"] == {"n": 2, "m": 4, "rows": [[0, 16]]}
    # Keys and values are dense and are not counted.
    assert report["num_groups"] == 2 * (16 * 4 + 16 * 6)
    torch.testing.assert_close(
        outputs(load_export(tmp_path / "x", fresh("vit")), setting["inputs"]),
        outputs(setting["pruned"], setting["inputs"]), rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_half_precision_is_compared_in_single_and_kept(tmp_path):
    setting = case("vit", dtype=torch.bfloat16)
    for inputs in ({"inputs": setting["inputs"]}, (setting["inputs"],), setting["inputs"]):
        folder = tmp_path / type(inputs).__name__
        assert export(folder, **(setting | {"inputs": inputs}))["pruned_difference"] < 1e-5
    setting["inputs"] = setting["inputs"].float()
    state = load_file(folder / "model.safetensors")
    assert {value.dtype for key, value in state.items() if not key.endswith("input_order")} == {torch.bfloat16}
    loaded = load_export(folder, fresh("vit"))
    expected = outputs(copy.deepcopy(setting["pruned"]).float(), setting["inputs"])
    torch.testing.assert_close(outputs(loaded, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)


def test_tied_weights_are_stored_once_and_load_into_either(tmp_path):
    setting = case("llama_tied", select="foldable")
    export(tmp_path / "x", **setting)
    with safe_open(tmp_path / "x" / "model.safetensors", framework="pt") as file:
        assert "embedding.weight" in file.keys()  # noqa: SIM118  # no dict
        assert "head.weight" not in file.keys()  # noqa: SIM118
    for name in ("llama_tied", "llama_text"):
        loaded = load_export(tmp_path / "x", fresh(name))
        assert (loaded.head.weight is loaded.embedding.weight) == (name == "llama_tied")
        expected = outputs(setting["pruned"], setting["inputs"])
        torch.testing.assert_close(outputs(loaded, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)


# Refusals: nothing is written


def refused(folder, setting, message):
    parent = Path(folder).parent
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        export(folder, **setting)
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before
    assert not any(path.name.endswith(".partial") for path in parent.iterdir())


def test_nothing_is_written_over(tmp_path):
    setting = case("vit", select="foldable")
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", **setting)
    refused(tmp_path / "empty", setting, "empty exists and is not empty")
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", setting, "file exists and is not empty")


def test_a_wrong_export_is_refused(tmp_path):
    setting = case("vit", select="foldable")
    other = {key: order.flip(0) for key, order in setting["orders"].items()}
    refused(tmp_path / "x", setting | {"orders": other}, "leaves its 2 heads")
    # Pruned in one order, exported in another.
    other = {site.name: random_order(site) for site in setting["sites"]}
    refused(
        tmp_path / "x", setting | {"orders": other}, r"blocks\.0\.\S+\.weight is not 2:4 in columns \d+ to \d+ of row"
    )
    refused(tmp_path / "x", setting | {"pruned": setting["dense"]}, r"blocks\.0\.attn\.proj\.weight is not 2:4")
    refused(tmp_path / "x", setting | {"pruned": vit(width=8)}, "in the dense model and")
    refused(tmp_path / "x", setting | {"config": {"model": object()}}, "the config cannot be written as JSON")
    broken = copy.deepcopy(setting["pruned"])
    broken.head.bias.data[0] = torch.nan
    refused(tmp_path / "x", setting | {"pruned": broken}, "folding changes the pruned model by nan")


def test_a_fold_that_changes_the_model_is_refused(tmp_path, monkeypatch):
    setting = case("vit", select="foldable")

    def spoil(model, sites, orders):
        modes = fold(model, sites, orders)
        model.blocks[0].mlp.fc2.weight.mul_(1.1)
        return modes

    monkeypatch.setattr(module, "fold", spoil)
    refused(tmp_path / "x", setting, r"folding changes the dense model by 0\.\d+ of its output, over 0\.0001")


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    setting, calls = case("vit", select="foldable"), []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk full")
        save(*arguments, **options)

    save = module.save_file
    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export(tmp_path / "x", **setting)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_export_of_this_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no export: it has no sparsity\.json"):
        load_export(tmp_path, fresh("vit"))
    setting = case("vit")
    export(tmp_path / "x", **setting)
    with pytest.raises(ValueError, match="has no layer"):
        load_export(tmp_path / "x", fresh("llama_text"))
    with pytest.raises(ValueError, match=r"cls_token is \(1, 1, 16\) in .* and None in Vit"):
        load_export(tmp_path / "x", fresh("vit_mean_slot"))
    (tmp_path / "x" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"it has no model\.safetensors"):
        load_export(tmp_path / "x", fresh("vit"))


# Patterns


def test_patterns_against_counting_by_hand():
    weight = torch.randn(6, 16) * (torch.rand(6, 16) < 0.4)
    worst = max(int((weight[r, c : c + 8] != 0).sum()) for r in range(6) for c in (0, 8))
    assert verify_pattern({"w": weight}, {"w": {"n": worst, "m": 8}}) == {
        "num_tensors": 1, "num_groups": 12, "nonzero_fraction": pytest.approx(np.count_nonzero(weight.numpy()) / 96),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"w is not {worst - 1}:8 in columns"):
        verify_pattern({"w": weight}, {"w": {"n": worst - 1, "m": 8}})


def test_broken_patterns_are_named():
    good, bad = torch.eye(4), torch.eye(4)
    bad[2, 0] = 1
    with pytest.raises(ValueError, match="b is not 1:4 in columns 0 to 3 of row 2, which hold 2 values"):
        verify_pattern({"a": good, "b": bad}, {"a": {"n": 1, "m": 4}, "b": {"n": 1, "m": 4}})
    assert verify_pattern({"b": bad}, {"b": {"n": 1, "m": 4, "rows": [[0, 2], [3, 4]]}})["num_groups"] == 3
    with pytest.raises(ValueError, match="there is no tensor c"):
        verify_pattern({"a": good}, {"c": {"n": 1, "m": 4}})
    with pytest.raises(ValueError, match="a: groups of 3 do not divide 4 columns"):
        verify_pattern({"a": good}, {"a": {"n": 1, "m": 3}})


def test_patterns_of_sites_name_rows_only_where_some_are_dense():
    model = tiny("vit")
    whole = {f"blocks.{i}.attn.qkv.weight": {"n": 1, "m": 2} for i in range(2)}
    assert read_patterns(read_sites(model, select=["attn.qkv"]), n=1, m=2) == whole
    sites = read_sites(model, select=["attn.k", "attn.v"], coupling="independent")
    assert read_patterns(sites, n=1, m=2) == {
        name: {"n": 1, "m": 2, "rows": [[16, 32], [32, 48]]} for name in whole
    }  # fmt: skip


# Models of other libraries


@pytest.mark.parametrize("name", ["llama_text", "llama_tied"])
def test_a_folded_text_model_is_transformers_own(tmp_path, name):
    setting = case(name, select="foldable")
    fold(setting["pruned"], setting["sites"], setting["orders"])
    expected = outputs(setting["pruned"], setting["inputs"])
    as_causal_lm(setting["pruned"]).save_pretrained(tmp_path)
    restored = LlamaForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    torch.testing.assert_close(outputs(restored, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)
    assert restored.config.tie_word_embeddings == (name == "llama_tied")
    tokens = setting["inputs"][:1]
    steps = restored.generate(tokens, max_new_tokens=2, do_sample=False)[0, 6:]
    for step in steps:  # with the cache that our model does not keep
        assert step == outputs(setting["pruned"], tokens)[0, -1].argmax()
        tokens = torch.cat([tokens, step.view(1, 1)], dim=1)


@pytest.mark.parametrize("nested", [True, False])
def test_the_export_of_a_text_model_becomes_transformers_own(tmp_path, nested):
    torch.manual_seed(3)
    setting = case("llama_tied")
    options = LLAMA | {"component": "llama", "tie_embeddings": True, "lr": 0.1, "patch_size": None}
    setting["config"] = {"model": options, "seed": 0} if nested else options
    dense = llama(tie_embeddings=True).eval()
    nn.init.normal_(dense.embedding.weight, std=0.3)
    setting |= {"dense": dense, "pruned": prune(dense, setting["sites"], setting["orders"], n=2, m=4)}
    assert export(tmp_path / "x", **setting)["num_gathered"] == 6
    restored = as_causal_lm(tmp_path / "x")
    expected = outputs(setting["pruned"], setting["inputs"])
    torch.testing.assert_close(outputs(restored, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)


def test_the_angles_of_a_half_precision_copy_are_not_rounded():
    backbone = llama().bfloat16()
    copied = as_causal_lm(backbone)
    assert torch.equal(copied.model.rotary_emb.inv_freq, backbone.network.rotary_emb.inv_freq)
    assert copied.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("choice", [{"select": "foldable"}, {}, {"coupling": "independent"}])
def test_a_vision_model_is_timms_own(choice):
    setting = case("vit", **choice)
    fold(setting["pruned"], setting["sites"], setting["orders"])
    copied = as_timm(setting["pruned"])
    torch.testing.assert_close(copied(setting["inputs"]), outputs(setting["pruned"], setting["inputs"]))
    assert copied.state_dict().keys() == setting["pruned"].state_dict().keys()
    assert copied.blocks[0].mlp.fc2.weight is not setting["pruned"].blocks[0].mlp.fc2.weight


def test_models_that_others_have_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a Llama of image with item"):
        as_causal_lm(tiny("llama_image"))
    with pytest.raises(ValueError, match="got a Vit of"):
        as_causal_lm(tiny("vit"))
    with pytest.raises(ValueError, match="is no export"):
        as_causal_lm(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {"component": "vit"}}')
    with pytest.raises(ValueError, match="holds a vit, not a llama"):
        as_causal_lm(str(tmp_path))
    with pytest.raises(ValueError, match="got Vit, position=slot, readout=mean"):
        as_timm(tiny("vit_mean_slot"))
    with pytest.raises(ValueError, match="got Linear"):
        as_timm(nn.Linear(2, 2))


# Sparse kernels; what of them can be tested without a device that has them


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
        ("llama_tied", {"select": "foldable"}, 4),
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
