import itertools

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from timm.models.vision_transformer import VisionTransformer

from permlab.config.build import build
from permlab.config.schema import CONF
from permlab.data.spec import DataSpec
from permlab.model.vit import Vit

SPEC = DataSpec(kind="image", num_classes=5, channels=2, height=4, width=6)
IMAGENET = DataSpec(kind="image", num_classes=1000, channels=3, height=224, width=224)
SIZE = {"width": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
TINY = {"width": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0}
POSITIONS, READOUTS = ("item", "slot", "none"), ("cls", "mean", "last")


def vit(spec=SPEC, **changes):
    options = {"patch_size": 2, **SIZE, "drop_path": 0.0, "position": "item", "readout": "cls", "pretrained": False}
    return Vit(spec, **(options | changes))


def scatter(model):
    """Weights of order one everywhere, so that no part is too small to show."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize(("position", "readout"), [*itertools.product(POSITIONS, ("cls", "mean"))])
def test_in_raster_order_it_is_timms_own_model(position, readout):
    pooling = {"global_pool": "token"} if readout == "cls" else {"global_pool": "avg", "class_token": False}
    oracle = VisionTransformer(
        img_size=(4, 6), patch_size=2, in_chans=2, num_classes=5, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0,
        fc_norm=False, pos_embed="none" if position == "none" else "learn", **pooling,
    )  # fmt: skip
    oracle = scatter(oracle)
    model = vit(position=position, readout=readout).double().eval()
    model.load_state_dict(oracle.state_dict())
    images = torch.rand(3, 2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(model(images), oracle(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("position", "readout"), [*itertools.product(POSITIONS, READOUTS)])
def test_which_settings_depend_on_the_order(position, readout):
    model = scatter(vit(position=position, readout=readout))
    items = model.embed(torch.rand(3, 2, 4, 6, dtype=torch.float64))
    change = (model.read(items) - model.read(items[:, [4, 2, 0, 1, 5, 3]])).abs().max()
    if position != "slot" and readout != "last":
        assert change < 1e-9
    else:
        assert change > 1e-3


def test_the_last_readout_hears_of_the_order_through_the_last_item_only():
    model = scatter(vit(position="item", readout="last"))
    items = model.embed(torch.rand(3, 2, 4, 6, dtype=torch.float64))
    torch.testing.assert_close(model.read(items[:, [4, 2, 0, 1, 3, 5]]), model.read(items), rtol=1e-9, atol=1e-9)


def test_slot_positions_are_added_after_the_order():
    model, order = scatter(vit(position="slot")), torch.tensor([4, 2, 0, 1, 5, 3])
    by_item = scatter(vit(position="item"))
    by_item.load_state_dict(model.state_dict())
    # A table that has been put in the items' order travels with them to the slots it came from.
    with torch.no_grad():
        by_item.pos_embed[:, 1:][:, order] = model.pos_embed[:, 1:]
    images = torch.rand(3, 2, 4, 6, dtype=torch.float64)
    result = model.read(model.embed(images)[:, order])
    torch.testing.assert_close(result, by_item.read(by_item.embed(images)[:, order]), rtol=1e-12, atol=1e-12)


def test_an_item_holds_its_patch_and_nothing_else():
    model = scatter(vit(position="none"))
    images = torch.rand(1, 2, 4, 6, dtype=torch.float64)
    kernel, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    expected = torch.einsum("chw,dchw->d", images[0, :, 2:4, 2:4], kernel) + bias
    torch.testing.assert_close(model.embed(images)[0, 4], expected)


def test_drop_path_acts_in_training_only():
    model, images = vit(drop_path=0.5), torch.rand(64, 2, 4, 6)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
        model.eval()
        kept = vit().eval()
        kept.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(images), kept(images))


@pytest.fixture(scope="module")
def tiny_weights():
    return timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict()


@pytest.fixture
def weights(monkeypatch, tiny_weights):
    """Weights that timm takes for its published ones: the download is replaced."""
    state = dict(tiny_weights)

    def load(name, *args, **kwargs):
        assert name.startswith("timm/vit_tiny_patch16_224.")
        return dict(state)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", load)
    return state


def test_pretrained_weights_of_the_same_shape_are_taken_whole(weights):
    model = vit(IMAGENET, patch_size=16, pretrained=True, **TINY)
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)


def test_pretrained_weights_are_fitted_to_other_images(weights):
    weights["pos_embed"] = weights["pos_embed"].clone()
    weights["pos_embed"][:, 1:] = 0.25
    spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=12)
    model = vit(spec, pretrained=True, readout="mean", position="slot", **TINY)
    assert torch.equal(model.blocks[3].mlp.fc1.weight, weights["blocks.3.mlp.fc1.weight"])
    assert model.patch_embed.proj.weight.shape == (192, 1, 2, 2)
    # Resampling keeps a constant table constant.
    torch.testing.assert_close(model.pos_embed, torch.full((1, 24, 192), 0.25))
    assert model(torch.rand(2, 1, 8, 12)).shape == (2, 10)


@pytest.mark.parametrize("change", [{"width": 96}, {"depth": 11}, {"num_heads": 6}, {"mlp_ratio": 2.0}])
def test_a_size_without_pretrained_weights_names_those_which_have(change):
    with pytest.raises(ValueError, match=r"sizes which have: 192, 12, 3; 384, 12, 6; 768, 12, 12; 1024, 24, 16"):
        vit(IMAGENET, patch_size=16, pretrained=True, **(TINY | change))


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("vit_ti", 5_717_416), ("vit_s", 22_050_664), ("vit_b", 86_567_656), ("vit_l", 304_326_632)],
)
def test_presets_have_the_published_sizes(name, num_parameters):
    with initialize_config_dir(str(CONF / "model"), version_base="1.3"):
        settings = OmegaConf.to_container(compose(name))
    with torch.device("meta"):
        model = build("model", settings | {"patch_size": 16}, IMAGENET)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


@pytest.mark.parametrize(("position", "readout"), [*itertools.product(POSITIONS, READOUTS)])
def test_gradients_reach_every_parameter(position, readout):
    model = vit(position=position, readout=readout)
    model(torch.rand(3, 2, 4, 6)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("position", POSITIONS)
def test_bfloat16(position):
    model, images = vit(position=position), torch.rand(3, 2, 4, 6)
    expected = model(images)
    result = model.bfloat16()(images.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, atol=0.03, rtol=0.03)


def test_the_seed_fixes_the_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(vit().state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_class_token_and_positions_are_left_out_of_weight_decay():
    marked = {name for name, parameter in vit().named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert marked == {"cls_token", "pos_embed"}


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="num_heads=3 does not divide width=16"):
        vit(num_heads=3)


def test_a_patch_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="3 does not divide a 4x6 image"):
        vit(patch_size=3)


def test_weights_that_cannot_be_had_are_an_error_of_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"pretrained=true: no weights of vit_tiny.*ConnectionError: no route\)"):
        vit(IMAGENET, **TINY, patch_size=16, pretrained=True)
