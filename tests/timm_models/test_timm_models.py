"""Our backbones through timm: what timm's own tests check of every model, on our small presets."""

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import permlab.timm_models
from permlab.config.schema import component_names, constant
from permlab.timm_models import timm_name
from permlab.timm_models.timm_model import TimmModel

NANO = [name for name in timm.list_models("permlab_*") if name.endswith("_nano")]
SMALL = {"img_size": 32, "patch_size": 8}
each_nano = pytest.mark.parametrize("name", NANO)


def create(name: str, **options) -> TimmModel:
    return timm.create_model(name, **(SMALL | options)).eval()


def images(model: TimmModel, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *model.img_size)


def test_every_preset_that_reads_images_is_registered_under_a_name_in_full() -> None:
    names = timm.list_models("permlab_*")
    assert {"permlab_vim_tiny", "permlab_vim_base", "permlab_vit_small", "permlab_vit_nano", "permlab_vim_nano"} <= {
        *names
    }
    assert 10 < len(names) <= len(component_names("model"))
    assert timm.list_models(module="timm_models") == names
    assert {"permlab_vim_nano", "permlab_vit_nano", "permlab_llama_nano"} <= set(NANO)


def test_the_package_stays_light_and_timm_knows_nothing_before() -> None:
    code = "import permlab, sys; print(*({'torch', 'timm', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == ""


@each_nano
def test_forward(name: str) -> None:
    model = timm.create_model(name).eval()
    assert model.default_cfg["input_size"] == (3, *model.img_size) == (3, 224, 224)
    with torch.no_grad():
        logits = model(torch.randn(1, *model.default_cfg["input_size"]))
    assert logits.shape == (1, 1000)
    assert logits.isfinite().all()
    with pytest.raises(ValueError, match="no gradient checkpointing"):
        model.set_grad_checkpointing()
    model.set_grad_checkpointing(False)


@each_nano
def test_backward(name: str) -> None:
    model = create(name, num_classes=42).train()
    logits = model(images(model))
    logits.mean().backward()
    assert logits.shape == (2, 42)
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert silent == []
    assert logits.isfinite().all()


@each_nano
def test_classifier_and_its_removal(name: str) -> None:
    model = create(name)
    inputs, state = images(model), model.state_dict()
    assert model.num_classes == 1000
    assert model.num_features == model.head_hidden_size > 0
    assert f"{model.default_cfg['classifier']}.weight" in state
    assert f"{model.default_cfg['first_conv']}.weight" in state
    assert model.get_classifier() is model.head
    features = model.forward_features(inputs)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.ndim == 3
    assert features.shape[-1] == model.num_features
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(inputs))
    model.reset_classifier(7)
    assert model(inputs).shape == (2, 7)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(inputs), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(inputs), features)
    model.reset_classifier(3, model.readouts)
    assert model(inputs).shape == (2, 3)
    with pytest.raises(ValueError, match="global_pool=max: this model was made with"):
        model.reset_classifier(3, "max")


@each_nano
def test_made_without_a_classifier_or_pooling(name: str) -> None:
    model = create(name, num_classes=0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images(model)).shape == (2, model.num_features)
    model = create(name, num_classes=0, global_pool="")
    assert model(images(model)).ndim == 3


@each_nano
def test_features_of_the_levels(name: str) -> None:
    model = create(name)
    inputs = images(model)
    features, levels = model.forward_intermediates(inputs)
    torch.testing.assert_close(features, model.forward_features(inputs))
    assert len(levels) == len(model.feature_info) >= 3
    for info, level in zip(model.feature_info, levels, strict=True):
        assert level.shape == (2, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])
        assert level.isfinite().all()
        assert info["module"] in dict(model.named_modules())
    (last,) = model.forward_intermediates(inputs, indices=1, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(last, levels[-1].flatten(2).mT)
    with pytest.raises(ValueError, match="this model has"):
        model.forward_intermediates(inputs, indices=[9])
    with pytest.raises(ValueError, match="without norm"):
        model.forward_intermediates(inputs, norm=True)


@each_nano
def test_features_only(name: str) -> None:
    for options in ({}, {"feature_cls": "getter", "out_indices": (0, -1)}):
        model = timm.create_model(name, features_only=True, **SMALL, **options).eval()
        levels = model(torch.randn(2, 3, 32, 32))
        assert [level.shape[1] for level in levels] == model.feature_info.channels()
        assert [32 // level.shape[2] for level in levels] == model.feature_info.reduction()
        assert len(levels) == (2 if options else 3)


@pytest.mark.parametrize("name", ["permlab_vim_nano", "permlab_vit_nano"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_other_sizes_interpolate_the_table(name: str, pool: str, tmp_path) -> None:
    model = create(name, global_pool=pool)
    front, behind = model.item_positions[1:]
    rows = slice(front, model.pos_embed.shape[1] - behind)
    with torch.no_grad():
        model.pos_embed[:, rows] = torch.arange(4.0).repeat_interleave(4)[:, None]  # the row of the grid
    before = model(images(model))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    model.set_input_size((64, 32))
    assert model(torch.randn(2, 3, 64, 32)).shape == before.shape
    table = model.pos_embed[0, front : front + 32, 0].view(8, 4)
    assert (table.diff(dim=0) > 0).all()  # more rows between the same two ends, columns alike
    torch.testing.assert_close(table, table[:, :1].expand(8, 4))
    with pytest.raises(ValueError, match="images are 32x32, the model reads 64x32"):
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="patch size cannot be changed"):
        model.set_input_size(64, patch_size=4)
    larger = create(name, global_pool=pool, img_size=64, checkpoint_path=str(tmp_path / "model.pth"))
    assert larger(images(larger)).shape == before.shape
    same = create(name, global_pool=pool, checkpoint_path=str(tmp_path / "model.pth"))
    model.set_input_size(32)
    assert same.state_dict().keys() == model.state_dict().keys()


def test_the_state_dict_is_the_backbones_and_published_names_load(tmp_path) -> None:
    from permlab.model.vim_checkpoint import save_published

    model = create("permlab_vim_nano", num_classes=5)
    save_published(model, tmp_path / "vim.safetensors")
    again = create("permlab_vim_nano", num_classes=5, checkpoint_path=str(tmp_path / "vim.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    overlay = {"file": str(tmp_path / "vim.safetensors"), "num_classes": 5}
    again = create("permlab_vim_nano", num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.blocks[0].mixer.A_log, again.blocks[0].mixer.A_log)
    assert again.num_classes == 3


def test_options_of_the_backbone_are_keywords() -> None:
    model = create("permlab_vim_nano", direction="forward", readout="last", position="none", drop_path_rate=0.1)
    assert (model.direction, model.global_pool, model.pos_embed) == ("forward", "last", None)
    assert model.blocks[1].drop_path.drop_prob == 0.1
    for options, message in [
        ({"directon": "forward"}, "directon: vim has no such option; nearest valid choice: direction"),
        ({"global_pool": "max"}, "global_pool=max: unknown"),
        ({"patch_size": 5}, "5 does not divide a 32x32 image"),
    ]:
        with pytest.raises(ValueError, match=message):
            create("permlab_vim_nano", **options)


def test_a_backbone_that_pools_as_it_reads() -> None:
    model = create("permlab_ssm_probe", num_classes=5)
    inputs = images(model)
    features = model.forward_features(inputs)
    assert features.shape == (2, model.num_features)
    model(inputs).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.set_input_size(64)
    model.reset_classifier(0)
    assert model(images(model)).shape == (2, model.head_hidden_size)


@each_nano
def test_groups_for_an_optimiser(name: str) -> None:
    from timm.models import group_parameters

    model = create(name)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) >= 1 + len(model.stages)


def test_what_is_registered_is_asked_of_the_components() -> None:
    assert constant("model", "vim", "stem") == "patch_embed"
    assert timm_name("vit_l") == "permlab_vit_large"
    assert set(permlab.timm_models.default_cfgs) == set(timm.list_models("permlab_*"))
