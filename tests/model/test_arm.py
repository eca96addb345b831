"""ARM against its definition and its published names, on grids of any shape and in any order."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import configure
from safetensors.torch import load_file, save_file
from torch import Tensor

from permlab.config.build import build
from permlab.data.spec import DataSpec
from permlab.model.arm import Arm, GridScans, column_order
from permlab.model.vim import Vim
from permlab.model.vim_checkpoint import save_published

IMAGENET = DataSpec(kind="image", num_classes=1000, channels=3, height=224, width=224)
SIZE = {"width": 8, "depth": 2, "num_states": 3, "expand": 1, "conv_kernel": 4, "mlp_width": 12, "drop_path": 0.0}
BASE = {"width": 768, "depth": 12, "num_states": 16, "expand": 1, "conv_kernel": 4, "mlp_width": 2048, "drop_path": 0.0}
SCANS = ("", "_b", "_c", "_c_b")


def arm(grid: tuple[int, int] = (2, 3), **changes) -> Arm:
    spec = DataSpec(kind="image", num_classes=5, channels=2, height=2 * grid[0], width=2 * grid[1])
    options = {"patch_size": 2, **SIZE, "position": "item", "readout": "cls", "pretrained": None}
    return Arm(spec, **(options | changes)).eval()


def images(model: Arm, count: int = 3) -> Tensor:
    return torch.rand(count, 2, 2 * model.height, 2 * model.width, dtype=next(model.parameters()).dtype)


# Sizes


@pytest.mark.parametrize(
    ("preset", "count"), [("arm_ti", 5_996_968), ("arm_s", 22_167_400), ("arm_b", 85_031_656), ("arm_l", 297_035_720)]
)
def test_parameter_counts_are_those_of_their_shapes(preset: str, count: int) -> None:
    settings = configure([f"model={preset}"])["model"] | {"patch_size": 16}
    with torch.device("meta"):
        model = build("model", settings, IMAGENET)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    d, depth, hidden = settings["width"], settings["depth"], settings["mlp_width"]
    assert hidden == 8 * d // 3
    rank = math.ceil(d / 16)
    scan = (4 + 1) * d + d * (rank + 32) + (rank + 1) * d + 16 * d + d
    block = 3 * d * d + 4 * scan + 3 * d * hidden + 2 * hidden + d + 4 * d
    assert count == depth * block + (3 * 256 + 1) * d + 198 * d + 2 * d + (d + 1) * 1000


# The scans


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def scan_token_by_token(state: dict[str, np.ndarray], suffix: str, tokens: np.ndarray) -> np.ndarray:
    """One gated selective scan from its definition in plain numpy, `[l, d]` to `[l, e]`."""
    weight = {name: state[name] for name in ("in_proj.weight", f"A{suffix}_log", f"D{suffix}")}
    x, z = np.split(tokens @ weight["in_proj.weight"].T, 2, axis=1)
    taps, bias = state[f"conv1d{suffix}.weight"][:, 0], state[f"conv1d{suffix}.bias"]
    rates = -np.exp(weight[f"A{suffix}_log"])
    rank = state[f"dt_proj{suffix}.weight"].shape[1]
    memory, outputs = np.zeros_like(rates), []
    for t in range(len(tokens)):
        u = bias + sum(x[t - lag] * taps[:, -1 - lag] for lag in range(taps.shape[1]) if lag <= t)
        u = u * sigmoid(u)
        step, B, C = np.split(state[f"x_proj{suffix}.weight"] @ u, [rank, rank + rates.shape[1]])
        dt = np.log1p(np.exp(state[f"dt_proj{suffix}.weight"] @ step + state[f"dt_proj{suffix}.bias"]))
        memory = np.exp(dt[:, None] * rates) * memory + (dt * u)[:, None] * B
        outputs.append((memory @ C + weight[f"D{suffix}"] * u) * z[t] * sigmoid(z[t]))
    return np.stack(outputs)


def walks(height: int, width: int) -> dict[str, list[int]]:
    """Tokens in the order of each scan, by loops over rows and columns; `None` of the grid is the class token."""
    middle = height * width // 2
    token = {(row, column): row * width + column for row in range(height) for column in range(width)}
    token = {cell: slot + (slot >= middle) for cell, slot in token.items()}
    rows = [token[row, column] for row in range(height) for column in range(width)]
    columns = [token[row, column] for column in range(width) for row in range(height)]
    for walk in (rows, columns):
        walk.insert(middle, middle)
    return {"": rows, "_b": rows[::-1], "_c": columns, "_c_b": columns[::-1]}


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 4), (4, 1), (3, 3), (1, 1)])
def test_the_scans_are_their_definition_on_every_grid(grid: tuple[int, int]) -> None:
    scans = GridScans(6, 3, 1, 4, grid, depth=2).double()
    with torch.no_grad():
        for parameter in scans.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    tokens = torch.randn(2, grid[0] * grid[1] + 1, 6, dtype=torch.float64)
    state = {name: tensor.numpy() for name, tensor in scans.state_dict().items()}
    for sample, found in zip(tokens.numpy(), scans(tokens).detach().numpy(), strict=True):
        total = np.zeros((len(sample), 6))
        for suffix, walk in walks(*grid).items():
            total[walk] += scan_token_by_token(state, suffix, sample[walk])
        np.testing.assert_allclose(found, total @ state["out_proj.weight"].T / 4, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("grid", [*itertools.product((1, 2, 5), (1, 3, 4))])
def test_the_class_token_stands_in_the_middle_of_rows_and_columns(grid: tuple[int, int]) -> None:
    assert column_order(*grid).tolist() == walks(*grid)["_c"]
    assert column_order(*grid)[grid[0] * grid[1] // 2] == grid[0] * grid[1] // 2


def test_every_scan_has_a_say_and_follows_the_order() -> None:
    model = arm((2, 4), position="none").double()
    items = model.embed(images(model))
    order = torch.tensor([4, 2, 0, 1, 7, 5, 3, 6])
    reordered = model.read(items[:, order])
    assert (reordered - model.read(items)).abs().max() > 1e-9
    for suffix in SCANS:
        other = arm((2, 4), position="none").double()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            for block in other.blocks:
                getattr(block.scans, f"D{suffix}").mul_(2)
        assert (other.read(items[:, order]) - reordered).abs().max() > 1e-9, suffix


def test_slots_are_laid_on_the_grid_in_their_order_and_not_by_item() -> None:
    """What is read in column order on a grid is read in row order on the grid turned round, with rows for columns."""
    wide, high = arm((2, 3), position="none").double(), arm((3, 2), position="none").double()
    swapped = {"": "_c", "_b": "_c_b", "_c": "", "_c_b": "_b"}
    state = wide.state_dict()
    turned = dict(state)
    for name in state:
        for part in ("conv1d", "x_proj", "dt_proj", "D", "A"):
            for suffix, other in swapped.items():
                ends = (f".{part}{suffix}", f".{part}{suffix}_log", f".{part}{suffix}.weight", f".{part}{suffix}.bias")
                if name.endswith(ends):
                    turned[name] = state[name.replace(f".{part}{suffix}", f".{part}{other}", 1)]
    high.load_state_dict(turned)
    items = wide.embed(images(wide))
    columns = [0, 3, 1, 4, 2, 5]
    torch.testing.assert_close(high.read(items[:, columns]), wide.read(items), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [(4, 6), (2, 10)])
def test_logits_of_a_whole_model_are_those_of_the_published_sequence(size: tuple[int, int]) -> None:
    """Class token in the middle first, then the table; blocks and norms by torch's own functions."""
    grid = (size[0] // 2, size[1] // 2)
    for readout in ("cls", "mean", "last"):
        model = arm(grid, readout=readout).double()
        x, middle = images(model), model.num_items // 2
        tokens = torch.nn.functional.conv2d(x, model.patch_embed.weight, model.patch_embed.bias, stride=2)
        tokens, table = tokens.flatten(2).mT, model.pos_embed
        class_token = model.cls_token.expand(3, -1, -1)
        tokens = torch.cat([tokens[:, :middle], class_token, tokens[:, middle:]], dim=1)
        tokens = tokens + torch.cat([table[:, :middle], table[:, -1:], table[:, middle:-1]], dim=1)
        for block in model.blocks:
            norm = torch.nn.functional.layer_norm(tokens, (8,), block.norm1.weight, block.norm1.bias, 1e-5)
            tokens = tokens + block.scans(norm)
            norm = torch.nn.functional.layer_norm(tokens, (8,), block.norm2.weight, block.norm2.bias, 1e-5)
            gate, linear = norm @ block.mlp.w1.weight.T, norm @ block.mlp.w2.weight.T
            tokens = tokens + (gate * torch.sigmoid(gate) * linear) @ block.mlp.w3.weight.T
        tokens = torch.nn.functional.layer_norm(tokens, (8,), model.norm.weight, model.norm.bias, 1e-5)
        before, behind = tokens[:, :middle], tokens[:, middle + 1 :]
        features = {"cls": tokens[:, middle], "mean": torch.cat([before, behind], 1).mean(1), "last": tokens[:, -1]}
        torch.testing.assert_close(model(x), features[readout] @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("readout", ["cls", "mean", "last"])
@pytest.mark.parametrize("grid", [(2, 2), (2, 4), (4, 3)])
def test_a_class_token_in_front_is_a_cell_of_the_grid(grid: tuple[int, int], readout: str) -> None:
    """As REOrder's code has it: token L // 2 of all L is kept out, the rest is a raster that is transposed."""
    model = arm(grid, readout=readout, class_token="front").double()
    length = model.num_items + 1
    out = length // 2
    cells = [token for token in range(length) if token != out]
    assert cells[0] == 0  # the class token, and so slot out - 1 has no cell
    columns = np.array(cells).reshape(grid).T.flatten().tolist()
    columns.insert(out, out)
    x = images(model)
    slots = torch.nn.functional.conv2d(x, model.patch_embed.weight, model.patch_embed.bias, stride=2).flatten(2).mT
    class_token = (model.cls_token + model.pos_embed[:, -1:]).expand(3, -1, -1)
    tokens = torch.cat([class_token, slots + model.pos_embed[:, :-1]], dim=1)
    for block in model.blocks:
        scans, state = block.scans, {name: tensor.numpy() for name, tensor in block.scans.state_dict().items()}
        norm = block.norm1(tokens).detach().numpy()
        total = np.zeros_like(norm)
        for suffix, walk in (("", [*range(length)]), ("_c", columns)):
            for name, path in ((suffix, walk), (f"{suffix}_b", walk[::-1])):
                for sample, added in zip(norm, total, strict=True):
                    added[path] += scan_token_by_token(state, name, sample[path])
        tokens = tokens + torch.from_numpy(total / 4) @ scans.out_proj.weight.T
        tokens = tokens + block.mlp(block.norm2(tokens))
    tokens = model.norm(tokens)
    features = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "last": tokens[:, -1]}[readout]
    torch.testing.assert_close(model(x), features @ model.head.weight.T + model.head.bias)
    same = arm(grid, readout=readout).double()
    same.load_state_dict(model.state_dict())
    assert (same(x) - model(x)).abs().max() > 1e-6


def test_weight_decay_leaves_the_dynamics_alone() -> None:
    free = {name.split(".")[-1] for name, p in arm().named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert free == {f"A{suffix}_log" for suffix in SCANS} | {f"D{suffix}" for suffix in SCANS} | {
        "cls_token",
        "pos_embed",
    }


def test_drop_path_acts_in_training_only() -> None:
    model = arm(drop_path=0.5)
    inputs = images(model, 8)
    torch.testing.assert_close(model(inputs), model(inputs))
    model.train()
    assert not torch.equal(model(inputs), model(inputs))


# Published weights


def published(
    *, width: int, depth: int, num_states: int, rows: int, mlp_width: int, patch: int = 2, channels: int = 2,
    classes: int = 5, scans: tuple[str, ...] = SCANS, **_,
) -> dict[str, Tensor]:  # fmt: skip
    """Randomly filled tensors under the names and in the shapes that OliverRensu/ARM builds."""
    rank = -(-width // 16)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, rows, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for layer in range(depth):
        mixer, mlp = f"layers.{layer}.mixer", f"layers.{layer}.mlp"
        shapes |= {f"{mixer}.in_proj.weight": (2 * width, width), f"{mixer}.out_proj.weight": (width, width)}
        for suffix in scans:
            shapes |= {
                f"{mixer}.A{suffix}_log": (width, num_states),
                f"{mixer}.D{suffix}": (width,),
                f"{mixer}.conv1d{suffix}.weight": (width, 1, 4),
                f"{mixer}.conv1d{suffix}.bias": (width,),
                f"{mixer}.x_proj{suffix}.weight": (rank + 2 * num_states, width),
                f"{mixer}.dt_proj{suffix}.weight": (width, rank),
                f"{mixer}.dt_proj{suffix}.bias": (width,),
            }
        shapes |= {f"{mlp}.w1.weight": (mlp_width, width), f"{mlp}.w1.bias": (mlp_width,)}
        shapes |= {f"{mlp}.w2.weight": (mlp_width, width), f"{mlp}.w2.bias": (mlp_width,)}
        shapes |= {f"{mlp}.w3.weight": (width, mlp_width), f"{mlp}.w3.bias": (width,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"layers.{layer}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    shapes |= {"norm_f.weight": (width,), "norm_f.bias": (width,)}
    shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_there_are_as_many_names_as_published_and_they_come_back_to_the_bit(tmp_path: Path) -> None:
    size = BASE | {"depth": 2}
    state = published(**size, rows=197, patch=16, channels=3, classes=1000)
    assert len(state) == 8 + 2 * (2 + 4 * 7 + 6 + 4)
    save_file(state, tmp_path / "model.safetensors")
    model = Arm(
        IMAGENET, **size, patch_size=16, position="item", readout="mean", pretrained=str(tmp_path / "model.safetensors")
    )
    assert torch.equal(model.pos_embed[0, -1], state["pos_embed"][0, 98])  # the class token's
    assert torch.equal(model.blocks[1].scans.A_c_b_log, state["layers.1.mixer.A_c_b_log"])
    save_published(model, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    ours = arm()
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    again = arm(pretrained=str(tmp_path / "ours.safetensors")).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


def test_another_grid_patch_size_and_head_are_fitted(tmp_path: Path) -> None:
    state = published(**SIZE, rows=5)
    state["pos_embed"][:, [0, 1, 3, 4]] = 0.25
    torch.save({"model": state, "epoch": 3}, tmp_path / "arm.pth")
    spec = DataSpec("image", 7, channels=1, height=12, width=20)
    options = SIZE | {"position": "slot", "readout": "last", "pretrained": str(tmp_path)}
    model = Arm(spec, patch_size=4, **options)
    # Interpolation keeps a constant table constant, and leaves the class token's row alone.
    torch.testing.assert_close(model.pos_embed[:, :-1], torch.full((1, 15, 8), 0.25))
    assert torch.equal(model.pos_embed[:, -1], state["pos_embed"][:, 2])
    assert model(torch.rand(2, 1, 12, 20)).shape == (2, 7)
    assert Arm(spec, patch_size=4, **(options | {"position": "none"})).pos_embed is None


def test_weights_from_before_fine_tuning_begin_all_four_scans(tmp_path: Path) -> None:
    state = published(**SIZE, rows=6, scans=("",))
    for name in ("cls_token", "norm_f.weight", "norm_f.bias", "head.weight", "head.bias"):
        del state[name]
    decoder = ("ar_token", "dec_pos_embed", "dec_block.0.attn2.q.weight", "enc2dec.weight", "norm_1.weight", "mask")
    save_file(state | {name: torch.ones(3) for name in decoder}, tmp_path / "arm.safetensors")
    torch.manual_seed(0)
    fresh = arm()
    torch.manual_seed(0)
    model = arm(pretrained=str(tmp_path / "arm.safetensors"))
    for suffix, (part, end) in itertools.product(
        SCANS, [("A", "_log"), ("D", ""), ("conv1d", ".bias"), ("x_proj", ".weight"), ("dt_proj", ".weight")]
    ):
        found = model.state_dict()[f"blocks.1.scans.{part}{suffix}{end}"]
        assert torch.equal(found, state[f"layers.1.mixer.{part}{end}"])
    assert torch.equal(model.pos_embed[:, :6], state["pos_embed"])
    for name in ("cls_token", "norm.weight", "norm.bias", "head.weight"):
        assert torch.equal(model.state_dict()[name], fresh.state_dict()[name])
    assert torch.equal(model.pos_embed[:, 6], fresh.pos_embed[:, 6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.mixer.D_c_b": None}, "it has no layers.1.mixer.D_c_b"),
        ({"layers.0.mixer.gamma": torch.ones(2)}, "layers.0.mixer.gamma has no place here"),
        ({"layers.0.mlp.w2.bias": torch.ones(9)}, r"layers.0.mlp.w2.bias is \[9\], not \[12\]"),
    ],
)
def test_weights_that_do_not_fit_are_named_as_published(tmp_path: Path, change: dict, message: str) -> None:
    state = {**published(**SIZE, rows=7), **change}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"^pretrained=.*a.safetensors: {message}"):
        arm(pretrained=str(tmp_path / "a.safetensors"))


def test_the_two_models_do_not_take_each_others_blocks(tmp_path: Path) -> None:
    spec = DataSpec(kind="image", num_classes=5, channels=2, height=4, width=6)
    size = {name: value for name, value in SIZE.items() if name != "mlp_width"}
    options = size | {"patch_size": 2, "position": "item", "readout": "cls", "direction": "bidirectional"}
    save_published(Vim(spec, **options), tmp_path / "vim.safetensors")
    save_published(arm(), tmp_path / "arm.safetensors")
    save_file(arm().state_dict(), tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match="these are no blocks of ARM"):
        arm(pretrained=str(tmp_path / "vim.safetensors"))
    for name in ("arm", "ours"):
        with pytest.raises(ValueError, match="these are ARM's blocks"):
            Vim(spec, **options, pretrained=str(tmp_path / f"{name}.safetensors"))
