"""Vision Mamba against its published sizes, its definition, and what order should do to it."""

import itertools

import pytest
import torch
from runs import configure
from torch import nn

from permlab.config.build import build
from permlab.data.spec import DataSpec
from permlab.model.vim import DT_MAX, DT_MIN, Mixer, Vim

SPEC = DataSpec(kind="image", num_classes=5, channels=2, height=4, width=6)
IMAGENET = DataSpec(kind="image", num_classes=1000, channels=3, height=224, width=224)
POSITIONS, READOUTS, DIRECTIONS = ("item", "slot", "none"), ("cls", "mean", "last"), ("bidirectional", "forward")
SIZE = {"width": 8, "depth": 2, "num_states": 3, "expand": 2, "conv_kernel": 4, "drop_path": 0.0}


def vim(**changes) -> Vim:
    options = {"patch_size": 2, **SIZE, "position": "item", "readout": "cls", "direction": "bidirectional"}
    return Vim(SPEC, **(options | changes)).eval()


@pytest.mark.parametrize(
    ("preset", "published", "count"),
    [("vim_ti", 7e6, 7_148_008), ("vim_s", 26e6, 25_796_584), ("vim_b", 98e6, 97_598_440)],
)
def test_parameter_counts_are_the_published_ones(preset: str, published: float, count: int) -> None:
    settings = configure([f"model={preset}"])["model"] | {"patch_size": 16}
    with torch.device("meta"):
        model = build("model", settings, IMAGENET)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == count
    assert round(found / 1e6) == round(published / 1e6)


def test_the_mixer_has_the_parameter_names_of_mamba_and_vim() -> None:
    mixer = Mixer(8, 3, 2, 4, "bidirectional", depth=1)
    mamba = "in_proj.weight conv1d.weight conv1d.bias x_proj.weight dt_proj.weight dt_proj.bias A_log D out_proj.weight"
    backward = "conv1d_b.weight conv1d_b.bias x_proj_b.weight dt_proj_b.weight dt_proj_b.bias A_b_log D_b"
    assert set(mixer.state_dict()) == set(mamba.split()) | set(backward.split())
    assert set(Mixer(8, 3, 2, 4, "forward", depth=1).state_dict()) == set(mamba.split())


def sequential(mixer: Mixer, x: torch.Tensor, z: torch.Tensor, suffix: str) -> torch.Tensor:
    """One direction of the block from its definition, token by token; x, z `[e, l]`."""
    conv, x_proj, dt_proj = (getattr(mixer, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
    rates = -(mixer.A_log if not suffix else mixer.A_b_log).exp()
    skip, taps = getattr(mixer, f"D{suffix}"), conv.weight[:, 0]
    state, outputs = torch.zeros_like(rates), []
    for t in range(x.shape[1]):
        window = [x[:, t - lag] * taps[:, -1 - lag] for lag in range(taps.shape[1]) if t >= lag]
        u = nn.functional.silu(sum(window) + conv.bias)
        projected = x_proj.weight @ u
        step = projected[: mixer.dt_rank]
        B = projected[mixer.dt_rank : mixer.dt_rank + mixer.num_states]
        C = projected[mixer.dt_rank + mixer.num_states :]
        dt = nn.functional.softplus(dt_proj.weight @ step + dt_proj.bias)
        state = torch.exp(dt[:, None] * rates) * state + (dt * u)[:, None] * B
        outputs.append((state @ C + skip * u) * nn.functional.silu(z[:, t]))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_mixer_is_its_definition(direction: str) -> None:
    mixer = Mixer(8, 3, 2, 4, direction, depth=3).double()
    tokens = torch.randn(2, 7, 8, dtype=torch.float64)
    for sample, found in zip(tokens, mixer(tokens), strict=True):
        x, z = (mixer.in_proj.weight @ sample.T).chunk(2)
        y = sequential(mixer, x, z, "")
        if direction == "bidirectional":
            y = (y + sequential(mixer, x.flip(1), z.flip(1), "_b").flip(1)) / 2
        torch.testing.assert_close(found, (mixer.out_proj.weight @ y).T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("position", "readout", "direction"), [*itertools.product(POSITIONS, READOUTS, DIRECTIONS)])
def test_every_setting_depends_on_the_order_and_reaches_every_parameter(
    position: str, readout: str, direction: str
) -> None:
    model = vim(position=position, readout=readout, direction=direction).double()
    images = torch.rand(3, 2, 4, 6, dtype=torch.float64)
    items = model.embed(images)
    assert items.shape == (3, model.num_items, model.num_features)
    logits = model.read(items)
    assert (logits - model.read(items[:, [4, 2, 0, 1, 5, 3]])).abs().max() > 1e-9
    logits.square().sum().backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    # A backward scan begins at the last slot: read there, its decay has not acted yet.
    begins_there = readout == "last" and direction == "bidirectional"
    assert silent == (["blocks.1.mixer.A_b_log"] if begins_there else [])


def test_forward_hears_nothing_of_what_comes_later() -> None:
    model = vim(direction="forward", readout="cls", position="none").double()
    items = model.embed(torch.rand(1, 2, 4, 6, dtype=torch.float64))
    later = items.clone()
    later[:, 3:] += 1
    torch.testing.assert_close(model.encode(later), model.encode(items))
    both = vim(direction="bidirectional", readout="cls", position="none").double()
    assert (both.encode(later) - both.encode(items)).abs().max() > 1e-6


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("sizes", [[1] * 6, [4, 2], [2, 1, 3]])
def test_slots_read_in_steps_are_the_whole_sequence(position: str, sizes: list[int]) -> None:
    model = vim(direction="forward", readout="last", position=position).double()
    items = model.embed(torch.rand(2, 2, 4, 6, dtype=torch.float64))[:, [4, 2, 0, 1, 5, 3]]
    progress, found = None, []
    for part in items.split(sizes, dim=1):
        features, progress = model.step(part, progress)
        found.append(features)
    torch.testing.assert_close(torch.cat(found, 1), model.tokens(items), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.head(found[-1][:, -1]), model.read(items))
    assert progress.num_slots == 6
    assert sum(part.numel() for memory in progress.memories for part in memory) == 2 * 2 * 16 * (3 + 3)


@pytest.mark.parametrize("options", [{}, {"direction": "forward"}, {"readout": "last"}])
def test_what_hears_of_later_slots_is_not_read_in_steps(options: dict) -> None:
    model = vim(**options)
    with pytest.raises(ValueError, match="with direction=forward and readout=last or mean alone"):
        model.step(torch.rand(1, 1, 8))


def test_the_position_table_travels_with_the_item_or_stays_at_the_slot() -> None:
    order = torch.tensor([4, 2, 0, 1, 5, 3])
    images = torch.rand(2, 2, 4, 6)
    for position in ("item", "slot"):
        model = vim(position=position)
        bare = model.patch_embed(images).flatten(2).mT
        table = model.pos_embed[:, :6]
        placed = (bare + table)[:, order] if position == "item" else bare[:, order] + table
        twin = vim(position="none")
        twin.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            twin.cls_token += model.pos_embed[:, -1:]
            torch.testing.assert_close(model.read(model.embed(images)[:, order]), twin.read(placed))


def test_step_sizes_start_between_their_bounds() -> None:
    bias = Mixer(64, 3, 2, 4, "forward", depth=1).dt_proj.bias
    step = nn.functional.softplus(bias)
    assert DT_MIN * 0.99 < step.min() < step.max() < DT_MAX * 1.01


def test_patches_start_as_published() -> None:
    """LeCun's normal law and no bias, as timm draws it for hustvl/Vim."""
    from timm.layers import lecun_normal_

    embedding = vim(width=512, patch_size=2).patch_embed
    assert not embedding.bias.any()
    drawn = torch.empty(512, 2, 2, 2)
    lecun_normal_(drawn)
    drawn = drawn.flatten().sort().values
    torch.testing.assert_close(embedding.weight.detach().flatten().sort().values, drawn, rtol=0.1, atol=0.02)
    assert abs(embedding.weight.std() * 8**0.5 - 1) < 0.05
    assert embedding.weight.abs().max() <= drawn.abs().max() * 1.02


def test_weight_decay_leaves_the_dynamics_alone() -> None:
    free = {name for name, p in vim().named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert {name.split(".")[-1] for name in free} == {"A_log", "A_b_log", "D", "D_b", "cls_token", "pos_embed"}


def test_drop_path_acts_in_training_only() -> None:
    model = vim(drop_path=0.5)
    images = torch.rand(8, 2, 4, 6)
    torch.testing.assert_close(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_bfloat16() -> None:
    model = vim()
    images = torch.rand(2, 2, 4, 6)
    expected = model(images)
    found = model.bfloat16()(images.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
