"""Published weights of Vision Mamba: their names and their place for the class token, there and back to the bit."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from permlab.data.spec import DataSpec
from permlab.model.vim import Vim
from permlab.model.vim_checkpoint import from_published, read_tensors, save_published, to_published

SIZE = {"width": 8, "depth": 2, "num_states": 3, "expand": 2, "conv_kernel": 4, "drop_path": 0.0}
TINY = {"width": 192, "depth": 24, "num_states": 16, "expand": 2, "conv_kernel": 4, "drop_path": 0.0}


def published(
    *, width: int, depth: int, num_states: int, rows: int, patch: int = 2, channels: int = 2, classes: int = 5, **_
) -> dict[str, Tensor]:
    """Randomly filled tensors under the names and in the shapes that hustvl/Vim builds, `expand=2`."""
    inner, rank = 2 * width, -(-width // 16)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, rows, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for layer in range(depth):
        mixer = f"layers.{layer}.mixer"
        shapes |= {f"{mixer}.in_proj.weight": (2 * inner, width), f"{mixer}.out_proj.weight": (width, inner)}
        shapes |= {f"{mixer}.A_log": (inner, num_states), f"{mixer}.A_b_log": (inner, num_states)}
        for back in ("", "_b"):
            shapes |= {
                f"{mixer}.D{back}": (inner,),
                f"{mixer}.conv1d{back}.weight": (inner, 1, 4),
                f"{mixer}.conv1d{back}.bias": (inner,),
                f"{mixer}.x_proj{back}.weight": (rank + 2 * num_states, inner),
                f"{mixer}.dt_proj{back}.weight": (inner, rank),
                f"{mixer}.dt_proj{back}.bias": (inner,),
            }
        shapes[f"layers.{layer}.norm.weight"] = (width,)
    shapes |= {"norm_f.weight": (width,), "head.weight": (classes, width), "head.bias": (classes,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def vim(spec: DataSpec | None = None, **changes) -> Vim:
    spec = spec or DataSpec("image", 5, channels=2, height=4, width=4)
    options = {"patch_size": 2, **SIZE, "position": "item", "readout": "cls", "direction": "bidirectional"}
    return Vim(spec, **(options | changes)).eval()


@pytest.fixture
def file(tmp_path: Path) -> str:
    save_file(published(**SIZE, rows=5), tmp_path / "vim.safetensors")
    return str(tmp_path / "vim.safetensors")


def test_there_are_as_many_names_as_published_and_they_come_back_to_the_bit(tmp_path: Path) -> None:
    state = published(**TINY, rows=197, patch=16, channels=3, classes=1000)
    assert len(state) == 415
    save_file(state, tmp_path / "model.safetensors")
    spec = DataSpec("image", 1000, channels=3, height=224, width=224)
    model = vim(spec, patch_size=16, **TINY, pretrained=str(tmp_path))
    save_published(model, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("rows", [2, 5, 10, 197])
def test_the_class_token_row_moves_and_returns(rows: int) -> None:
    table = torch.arange(float(rows)).view(1, rows, 1)
    moved = from_published({"cls_token": table[:, :1], "pos_embed": table, "layers.0.norm.weight": table})
    assert moved["pos_embed"][0, -1] == (rows - 1) // 2
    assert torch.equal(to_published(moved)["pos_embed"], table)


@pytest.mark.parametrize("size", [(4, 4), (6, 2)])
def test_logits_are_those_of_the_published_sequence(tmp_path: Path, size: tuple[int, int]) -> None:
    """Class token in the middle first, then the table added to the whole sequence, as hustvl/Vim does."""
    num_items = size[0] * size[1] // 4
    state = published(**SIZE, rows=num_items + 1)
    save_file(state, tmp_path / "vim.safetensors")
    spec = DataSpec("image", 5, channels=2, height=size[0], width=size[1])
    model = vim(spec, pretrained=str(tmp_path / "vim.safetensors"))
    images, middle = torch.rand(3, 2, *size), num_items // 2
    x = torch.nn.functional.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=2
    ).flatten(2).mT  # fmt: skip
    x = torch.cat([x[:, :middle], state["cls_token"].expand(3, -1, -1), x[:, middle:]], dim=1) + state["pos_embed"]
    for block in model.blocks:
        x = block(x)
    x = torch.nn.functional.rms_norm(x, (8,), state["norm_f.weight"], 1e-5)[:, middle]
    torch.testing.assert_close(model(images), x @ state["head.weight"].T + state["head.bias"])


@pytest.mark.parametrize("wrapped", ["model", "state_dict", "bare"])
def test_checkpoints_of_a_training_are_read_without_unpickling(tmp_path: Path, wrapped: str) -> None:
    state = {f"module.{name}": tensor for name, tensor in published(**SIZE, rows=5).items()}
    content = state if wrapped == "bare" else {wrapped: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "checkpoint.pth")
    found = read_tensors(str(tmp_path))
    assert all(torch.equal(found[name.removeprefix("module.")], state[name]) for name in state)


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_objects_are_not_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": published(**SIZE, rows=5), "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"pretrained=.*evil.pth: evil.pth cannot be read \(UnpicklingError"):
        read_tensors(str(tmp_path / "evil.pth"))
    assert "unpickled" not in capsys.readouterr().out


def test_what_is_not_there_or_not_clear_is_named(tmp_path: Path, file: str) -> None:
    with pytest.raises(ValueError, match=r"no such file or folder; nearest valid choice: .*vim.safetensors"):
        read_tensors(str(tmp_path / "vin.safetensors"))
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"which of other.safetensors, vim.safetensors"):
        read_tensors(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file of weights"):
        read_tensors(str(tmp_path / "empty"))
    torch.save({"model": 3}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read_tensors(str(tmp_path / "none.pth"))
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"cut.safetensors cannot be read"):
        read_tensors(str(tmp_path / "cut.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.mixer.D_b": None}, "it has no layers.1.mixer.D_b"),
        ({"layers.0.mixer.gamma": torch.ones(2)}, "layers.0.mixer.gamma has no place here"),
        ({"layers.0.mlp.w1.weight": torch.ones(2, 2)}, "these are ARM's blocks"),
        ({"layers.0.mixer.A_c_log": torch.ones(2, 2)}, "these are ARM's blocks"),
        ({"norm_f.weight": torch.ones(9)}, r"norm_f.weight is \[9\], not \[8\]"),
        ({"pos_embed": torch.ones(1, 8, 8)}, "a position table of 7 rows has no 2x2 grid to be fitted from"),
        ({"cls_token": None}, "it has no cls_token"),
    ],
)
def test_weights_that_do_not_fit_are_named_as_published(tmp_path: Path, change: dict, message: str) -> None:
    state = {**published(**SIZE, rows=5), **change}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=f"^pretrained=.*v.safetensors: {message}"):
        vim(pretrained=str(tmp_path / "v.safetensors"))


def test_another_grid_patch_size_and_head_are_fitted(tmp_path: Path) -> None:
    state = published(**SIZE, rows=5)
    state["pos_embed"][:, [0, 1, 3, 4]] = 0.25
    save_file(state, tmp_path / "v.safetensors")
    spec = DataSpec("image", 7, channels=1, height=12, width=20)
    model = vim(spec, patch_size=4, pretrained=str(tmp_path / "v.safetensors"))
    # Interpolation keeps a constant table constant, and leaves the class token's row alone.
    torch.testing.assert_close(model.pos_embed[:, :-1], torch.full((1, 15, 8), 0.25))
    assert torch.equal(model.pos_embed[:, -1], state["pos_embed"][:, 2])
    assert model.patch_embed.weight.shape == (8, 1, 4, 4)
    assert model.head.weight.std() < 0.1  # as initialised, not the random numbers of the file
    assert torch.equal(model.blocks[1].mixer.A_b_log, state["layers.1.mixer.A_b_log"])
    assert model(torch.rand(2, 1, 12, 20)).shape == (2, 7)


@pytest.mark.parametrize(
    "changes", [{"readout": "mean"}, {"position": "none"}, {"readout": "last", "position": "slot"}]
)
def test_parts_that_a_model_has_not_are_left_out(file: str, changes: dict) -> None:
    model, state = vim(pretrained=file, **changes), load_file(file)
    assert torch.equal(model.norm.weight, state["norm_f.weight"])
    if model.pos_embed is not None:
        assert torch.equal(model.pos_embed, state["pos_embed"][:, [0, 1, 3, 4]])


def test_our_own_names_are_read_too(tmp_path: Path, file: str) -> None:
    model = vim(pretrained=file)
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    again = vim(pretrained=str(tmp_path / "ours.safetensors")).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"ends in .safetensors"):
        save_published(model, tmp_path / "ours.pth")
