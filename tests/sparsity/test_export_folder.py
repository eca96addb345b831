"""The folder of an export: what is in it, what is refused, and what comes back."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from pruned_models import case, fresh
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import outputs, random_order, vit

from permlab.sparsity import export_folder as module
from permlab.sparsity.export_folder import export, load_export
from permlab.sparsity.fold import GatheredLinear, fold

OURS = {"permutation.safetensors", "sparsity.json", "permlab.json", "report.json", "SHA256SUMS"}
# Of transformers' models the weights of one with gathers are out of transformers' sight.
WEIGHTS = {"llama_tied": "permlab", "transformers_tied": "permlab", "qwen_vl": "permlab"}


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("name", ["vit", "timm", "vim", "llama_tied", "transformers_tied", "qwen_vl"])
def test_an_export_is_the_pruned_model_in_the_folded_layout(tmp_path, name, n, m):
    setting = case(name, n=n, m=m)
    before = {key: value.clone() for key, value in setting["pruned"].state_dict().items()}
    report = export(tmp_path / "x", **setting)
    weights = f"{WEIGHTS.get(name, 'model')}.safetensors"
    generation = {"generation_config.json"} if name in WEIGHTS else set()
    files = {path.name for path in (tmp_path / "x").iterdir()}
    assert files == OURS | {weights, "config.json"} | generation
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / "x" / "SHA256SUMS").read_text().splitlines())
    assert sums == {
        file: hashlib.sha256((tmp_path / "x" / file).read_bytes()).hexdigest() for file in files - {"SHA256SUMS"}
    }
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert all(torch.equal(before[key], value) for key, value in setting["pruned"].state_dict().items())

    loaded = load_export(tmp_path / "x", fresh(name))
    expected = outputs(setting["pruned"], setting["inputs"])
    torch.testing.assert_close(outputs(loaded, setting["inputs"]), expected, rtol=1e-4, atol=1e-5)

    # Zeros counted with numpy, from the files alone.
    state, sparsity = (
        load_file(tmp_path / "x" / weights),
        json.loads((tmp_path / "x/sparsity.json").read_text()),
    )
    groups = nonzero = size = 0
    for tensor, pattern in sparsity["tensors"].items():
        weight = state[tensor].numpy()
        kept = (weight.reshape(len(weight), -1, m) != 0).sum(-1)
        assert {"n": n, "m": m}.items() <= pattern.items()
        assert pattern.keys() <= {"n", "m", "ours"}
        assert kept.max() == n
        groups, nonzero, size = groups + kept.size, nonzero + kept.sum(), size + weight.size
    names = {f"{reader.module}.weight" for site in setting["sites"] for reader in site.readers}
    assert {pattern.get("ours", tensor) for tensor, pattern in sparsity["tensors"].items()} == names
    assert report["num_groups"] == groups
    assert report["num_tensors"] == len(sparsity["tensors"])
    assert report["nonzero_fraction"] == pytest.approx(nonzero / size)
    assert report["nonzero_fraction"] == pytest.approx(n / m)
    assert max(report["dense_difference"], report["pruned_difference"]) < 1e-5
    gathered = sum(not site.moves for site in setting["sites"])
    assert (report["num_gathered"], report["num_folded"]) == (gathered, len(setting["sites"]) - gathered)
    assert json.loads((tmp_path / "x" / "permlab.json").read_text()) == {"name": name}
    assert json.loads((tmp_path / "x" / "report.json").read_text()) == report
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
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118  # no dict
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
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
    refused(tmp_path / "x", setting | {"pruned": setting["dense"]}, r"blocks\.0\.attn\.qkv\.weight is not 2:4")
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
