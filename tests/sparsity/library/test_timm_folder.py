"""An export of a ViT, opened by timm alone: from the folder, from the file of weights, and refused with gathers."""

import json

import pytest
import timm
import torch
from pruned_models import case, prune
from tiny_models import outputs, vit

from permlab.sparsity.export_folder import export
from permlab.sparsity.library.timm_folder import timm_config
from permlab.sparsity.site import read_sites


def exported(folder, *, select="foldable", **changes) -> dict:
    """Export a ViT of other read-outs with the sites and orders of the usual one."""
    setting = case("vit", select=select)
    torch.manual_seed(5)
    dense = vit(**changes).eval()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sites = [site for site in read_sites(dense, select=select) if site.name in setting["orders"]]
    setting |= {"dense": dense, "sites": sites, "pruned": prune(dense, sites, setting["orders"], n=2, m=4)}
    export(folder, **setting)
    return setting


@pytest.mark.parametrize("changes", [{}, {"readout": "mean"}, {"position": "slot"}, {"position": "none"}])
def test_timm_opens_the_folder_and_the_file(tmp_path, changes) -> None:
    setting = exported(tmp_path / "x", **changes)
    expected = outputs(setting["pruned"], setting["inputs"])
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    from_folder = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True)
    from_file = timm.create_model(
        config["architecture"],
        checkpoint_path=str(tmp_path / "x" / "model.safetensors"),
        num_classes=config["num_classes"],
        **config["model_args"],
    )
    overlay = config["pretrained_cfg"] | {"file": str(tmp_path / "x" / "model.safetensors")}
    by_cfg = timm.create_model(
        config["architecture"], pretrained=True, pretrained_cfg=overlay, **config["model_args"]
    )  # fmt: skip
    for model in (from_folder, from_file, by_cfg):
        found = outputs(model.eval().to(setting["inputs"].dtype), setting["inputs"])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert type(model).__module__ == "timm.models.vision_transformer"
    assert tuple(timm.data.resolve_data_config(model=from_folder)["mean"]) == (0.0, 0.0)


def test_a_folder_with_gathers_is_refused_by_timm(tmp_path) -> None:
    exported(tmp_path / "x", select="all")
    with pytest.raises(KeyError, match="architecture"):
        timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True)
    args = timm_config(case("vit")["dense"])["model_args"] | {"num_classes": 5}
    with pytest.raises(RuntimeError, match="input_order"):
        timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "x" / "model.safetensors"), **args)


def test_models_that_timm_has_not_are_none_of_its_folders() -> None:
    assert timm_config(vit(readout="last")) == {}
    config = timm_config(vit(), {"mean": [0.5, 0.5], "std": [0.1, 0.2]})
    assert config["pretrained_cfg"]["std"] == [0.1, 0.2]
    assert json.loads(json.dumps(config)) == config
