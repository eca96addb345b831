"""Vision transformers of any size, from a folder of timm's: whatever the checkpoint has is kept, and fitted."""

import json
from pathlib import Path

import pytest
import timm
import torch
from pruned_models import prune
from safetensors.torch import load_file, save_file

from permlab.data.spec import DataSpec
from permlab.model.vit import Vit
from permlab.sparsity.export_folder import export
from permlab.sparsity.site import read_sites

ARGS = {"img_size": 12, "patch_size": 2, "in_chans": 3, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
SIZE = {"patch_size": 2, "width": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
SAME = DataSpec(kind="image", num_classes=5, channels=3, height=12, width=12)
SMALLER = DataSpec(kind="image", num_classes=4, channels=1, height=4, width=6)


def save(folder: Path, **changes) -> Path:
    """A network of timm's whose every weight shows, as a folder of timm's."""
    args = ARGS | {"num_classes": 5, "init_values": 1.0} | changes
    torch.manual_seed(3)
    network = timm.models.vision_transformer.VisionTransformer(**args)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    own = {key: value for key, value in args.items() if key != "num_classes"}
    about = {"input_size": [3, 12, 12], "num_classes": args["num_classes"], "first_conv": "patch_embed.proj"}
    config = {"architecture": "vit_small_patch14_dinov2", "num_classes": args["num_classes"], "model_args": own}
    (folder / "config.json").write_text(
        json.dumps(config | {"num_features": 16, "pretrained_cfg": about | {"classifier": "head"}})
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("timm") / "scaled")


def vit(spec: DataSpec, pretrained: object, **changes) -> Vit:
    options = SIZE | {"drop_path": 0.0, "position": "item", "readout": "cls", "pretrained": str(pretrained)}
    return Vit(spec, **(options | changes)).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_values": None},
        {"reg_tokens": 2},
        {"reg_tokens": 2, "no_embed_class": True},
        {"no_embed_class": True},
        {"qk_norm": True, "qkv_bias": False},
    ],
)
def test_logits_are_timms_own(tmp_path: Path, changes: dict) -> None:
    folder, images = save(tmp_path / "x", **changes), torch.rand(2, 3, 12, 12)
    oracle = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(vit(SAME, folder)(images), oracle(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_are_fitted_to_other_images_and_classes(folder: Path) -> None:
    images = torch.rand(2, 1, 4, 6)
    oracle = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=(4, 6), in_chans=1, num_classes=0)
    model = vit(SMALLER, folder)
    features = oracle.eval().forward_features(images)
    torch.testing.assert_close(model.tokens(model.embed(images)), features, rtol=1e-4, atol=1e-5)
    assert model(images).shape == (2, 4)
    # The class token, which nothing reads then, is no image's: what the items see of it stays.
    mean = vit(SMALLER, folder, readout="mean")
    torch.testing.assert_close(mean.encode(mean.embed(images)), features[:, 1:].mean(1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2, "no_embed_class": True}])
def test_layer_scale_folds_and_leaves_with_the_model(tmp_path: Path, changes: dict) -> None:
    dense = vit(SAME, save(tmp_path / "x", **changes)).double()
    sites = read_sites(dense, select="foldable")
    generator = torch.Generator().manual_seed(1)
    orders = {}
    for site in sites:
        width = site.num_items // site.num_heads
        heads = [torch.randperm(width, generator=generator) + width * head for head in range(site.num_heads)]
        orders[site.name] = torch.cat(heads)
    images, pruned = torch.rand(2, 3, 12, 12, dtype=torch.float64), prune(dense, sites, orders, n=2, m=4)
    report = export(
        tmp_path / "out", dense=dense, pruned=pruned, sites=sites, orders=orders, inputs=images, n=2, m=4, config={}
    )
    assert report["num_gathered"] == 0
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval().double()
    torch.testing.assert_close(again(images), pruned(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 32}, "its width is 16, not 32"),
        ({"depth": 3}, "its depth is 2, not 3"),
        ({"mlp_ratio": 4.0}, r"its mlp_ratio is 1\.5, not 4\.0"),
    ],
)
def test_other_sizes_than_the_checkpoint_has_are_refused(folder: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^pretrained=.*: {message}$"):
        vit(SAME, folder, **change)


def test_a_configuration_that_disagrees_with_its_tensors_is_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path / "x")
    state = load_file(folder / "model.safetensors")
    save_file(state | {"norm.weight": torch.ones(8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"pretrained=.*norm\.weight") as caught:
        vit(SAME, folder)
    assert "\n" not in str(caught.value)
    del state["blocks.1.ls2.gamma"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.ls2\.gamma"):
        vit(SAME, folder)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"pretrained=.*: cannot be loaded") as caught:
        vit(SAME, folder)
    assert "\n" not in str(caught.value)


def test_networks_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a norm_pre, which is no plain vision transformer"):
        vit(SAME, save(tmp_path / "pre", pre_norm=True))
    with pytest.raises(ValueError, match="has no class token; nearest valid choice: mean"):
        vit(SAME, save(tmp_path / "mean", class_token=False, global_pool="avg", fc_norm=False))
