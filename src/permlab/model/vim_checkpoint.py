"""Weights of Vision Mamba and ARM under their published names: read, brought to a model's shape, and written.

The names are those of hustvl/Vim: `layers.0.mixer.in_proj.weight`, `norm_f.weight`, `patch_embed.proj.weight`.
OliverRensu/ARM has them too for what the two models share; its blocks have two scans more and an MLP, and what Vim
calls a mixer are `scans` here. The published position table has the class token's row in the middle, where the token
stands in the sequence; ours has it last, where no number of items moves it.

ARM's weights from before fine-tuning know one scan, no class token and no last norm: its parameters begin all four
scans, and what else is missing begins as in a fresh model.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from permlab.errors import nearest
from permlab.model.base import Backbone

# Published beginnings of names, and ours.
_NAMES = {"layers.": "blocks.", "norm_f.": "norm.", "patch_embed.proj.": "patch_embed."}
_THEIR_SCANS, _OUR_SCANS = ".mixer.", ".scans."  # in ARM's blocks
# What each scan has of its own, and the suffixes of the scans that are missing before ARM is fine-tuned.
_OF_A_SCAN = re.compile(r"\.(conv1d|x_proj|dt_proj|A|D)(?=_log$|\.|$)")
_OTHER_SCANS = ("_b", "_c", "_c_b")
# The beginnings of names that only pre-training has: the decoder, and norms of features on several levels.
_DECODER = ("ar_", "dec_", "enc2dec.", "mask", *(f"norm_{level}." for level in range(1, 5)))
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_PARTS = ("model", "model_ema", "state_dict")  # of a training's checkpoint, the first that is there
CLASS_TOKEN, TABLE = "cls_token", "pos_embed"


# Names


def is_published(state: Mapping[str, Any]) -> bool:
    """Whether tensors have their published names, and not ours."""
    return any(name.startswith("layers.") for name in state)


def is_arm(state: Mapping[str, Any]) -> bool:
    """Whether tensors, under their published names or ours, are those of ARM's blocks."""
    return any(".A_c_log" in name or ".mlp." in name for name in state)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names, the class token's position last.

    Example:
        >>> table = torch.tensor([[[0.0], [9.0], [1.0]]])
        >>> state = from_published({"norm_f.weight": torch.ones(1), "cls_token": table[:, :1], "pos_embed": table})
        >>> sorted(state), state["pos_embed"].flatten()
        (['cls_token', 'norm.weight', 'pos_embed'], tensor([0., 1., 9.]))
    """
    found = _renamed(state, _NAMES, middle_last)
    return (
        {name.replace(_THEIR_SCANS, _OUR_SCANS): tensor for name, tensor in found.items()} if is_arm(state) else found
    )


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_published`, to the bit."""
    found = _renamed(state, {ours: theirs for theirs, ours in _NAMES.items()}, last_to_middle)
    return {name.replace(_OUR_SCANS, _THEIR_SCANS): tensor for name, tensor in found.items()}


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str], move: Any) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        start = next((start for start in names if name.startswith(start)), "")
        found[names.get(start, "") + name[len(start) :]] = tensor
    if CLASS_TOKEN in found and TABLE in found:
        found[TABLE] = move(found[TABLE])
    return found


def middle_last(table: Tensor) -> Tensor:
    """Move a position table's middle row, `[1, n + 1, d]`, behind the others."""
    middle = (table.shape[1] - 1) // 2
    return torch.cat([table[:, :middle], table[:, middle + 1 :], table[:, middle : middle + 1]], dim=1)


def last_to_middle(table: Tensor) -> Tensor:
    """Move a position table's last row between the others."""
    middle = (table.shape[1] - 1) // 2
    return torch.cat([table[:, :middle], table[:, -1:], table[:, middle:-1]], dim=1)


def save_published(model: nn.Module, file: str | Path) -> None:
    """Write a Vision Mamba's weights for hustvl/Vim, or an ARM's for OliverRensu/ARM, as safetensors.

    Args:
        model: a `Vim` or an `Arm` of ours; its position table may have been learned by item or by slot.
        file: ending in `.safetensors`.
    Raises:
        ValueError: if the file has another ending.
    Example: `load_state_dict(safetensors.torch.load_file(file))` of the published model takes it.
    """
    if Path(file).suffix != ".safetensors":
        raise ValueError(f"{file}: expected a name that ends in .safetensors")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in to_published(model.state_dict()).items()}
    save_file(state, file, metadata={"format": "pt"})


# Files


def read_tensors(source: str) -> dict[str, Tensor]:
    """Tensors by name of a file, or of the one file of weights in a folder; nothing is unpickled.

    Of a checkpoint of a training the part `model` is read, else `model_ema`, else `state_dict`.

    Args:
        source: path of a `.safetensors` file or one of `torch.save`, or of a folder that holds one of these.
    Raises:
        ValueError: if there is no such file, it cannot be read without unpickling, or it holds no tensors.
    """
    file = _file_of(source)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # The published checkpoints hold the command line's options, plain values in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut-off file, another format, objects that would have to be unpickled
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"pretrained={source}: {file.name} cannot be read ({type(error).__name__}: {reason})"
        ) from error
    parts = [content, *(content.get(part) for part in _PARTS)] if isinstance(content, Mapping) else []
    for part in parts:
        if isinstance(part, Mapping) and part and all(isinstance(value, Tensor) for value in part.values()):
            return {str(name).removeprefix("module."): value for name, value in part.items()}
    raise ValueError(f"pretrained={source}: {file.name} holds no tensors by name, nor in {', '.join(_PARTS)}")


def _file_of(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        near = [str(other) for other in path.parent.glob("*") if other.is_dir() or other.suffix in _SUFFIXES]
        raise ValueError(f"pretrained={source}: no such file or folder{nearest(source, near) if near else ''}")
    for suffix in _SUFFIXES:
        files = sorted(path.glob(f"*{suffix}"))
        if len(files) > 1:
            raise ValueError(f"pretrained={source}: which of {', '.join(file.name for file in files)}?")
        if files:
            return files[0]
    raise ValueError(f"pretrained={source}: there is no file of weights in it ({', '.join(_SUFFIXES)})")


# Shapes


@torch.no_grad()
def load_fitting(source: str, model: Backbone) -> None:
    """Load weights of another grid, patch size, number of channels or classes into a Vision Mamba or an ARM.

    Position table and patch embedding are interpolated, as the ViT's are; the head stays as it was
    initialised if its shape is another, and positions or the class token are left out where the model has none.

    Args:
        source: see `read_tensors`; under the published names or ours.
        model: changed in place.
    Raises:
        ValueError: naming the first tensor that is missing, has no place, or has a shape that cannot be fitted; and
            for the blocks of the other of the two models.
    """
    found, expected = read_tensors(source), model.state_dict()
    theirs = is_published(found)
    if is_arm(found) and not is_arm(expected):
        raise ValueError(f"pretrained={source}: these are ARM's blocks, with four scans or an MLP, which Vim has not")
    if is_arm(expected) and not is_arm(found):
        raise ValueError(f"pretrained={source}: these are no blocks of ARM, which have four scans and an MLP")
    state = from_published(found) if theirs else found
    if theirs and is_arm(found) and not any(".A_c_log" in name for name in found):
        state = _before_fine_tuning(state, expected)
    try:
        state = model.adapt(_without_absent(state, expected))
        state["patch_embed.weight"] = _fit_patches(state["patch_embed.weight"], expected["patch_embed.weight"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"pretrained={source}: {error}") from error
    heads = ("head.weight", "head.bias")
    if any(name not in state or state[name].shape != expected[name].shape for name in heads):
        state |= {name: expected[name] for name in heads}
    for name in [*state, *expected]:
        shapes = [list(tensors[name].shape) if name in tensors else None for tensors in (state, expected)]
        if shapes[0] != shapes[1]:
            said = next(iter(to_published({name: torch.empty(0)}))) if theirs else name
            wrong = f"is {shapes[0]}, not {shapes[1]}" if None not in shapes else "has no place here"
            raise ValueError(f"pretrained={source}: " + (f"{said} {wrong}" if shapes[0] else f"it has no {said}"))
    model.load_state_dict(state)


def _before_fine_tuning(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ARM's state as fine-tuning begins with it: one scan's parameters in all four, no decoder, the rest fresh."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(_DECODER):
            names = [_OF_A_SCAN.sub(rf".\1{suffix}", name) for suffix in ("", *_OTHER_SCANS)]
            found |= dict.fromkeys(names, tensor)
    if TABLE in found and TABLE in expected:
        found[TABLE] = torch.cat([found[TABLE], expected[TABLE][:, -1:].to(found[TABLE])], dim=1)
    fresh = (CLASS_TOKEN, "norm.weight", "norm.bias")
    return {name: expected[name] for name in fresh if name in expected} | found


def _without_absent(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the class token and the positions that a model has not."""
    state = dict(state)
    if CLASS_TOKEN in state and CLASS_TOKEN not in expected:
        del state[CLASS_TOKEN]
        if TABLE in state:
            state[TABLE] = state[TABLE][:, :-1]
    if TABLE not in expected:
        state.pop(TABLE, None)
    return state


def _fit_patches(weight: Tensor, expected: Tensor) -> Tensor:
    """A patch embedding for patches of another size, or for another number of channels."""
    if weight.shape == expected.shape:
        return weight
    from timm.layers import resample_patch_embed  # seconds to import
    from timm.models import adapt_input_conv

    if weight.shape[1] != expected.shape[1]:
        weight = adapt_input_conv(expected.shape[1], weight)
    if weight.shape[2:] != expected.shape[2:]:
        weight = resample_patch_embed(weight.float(), list(expected.shape[2:]))
    return weight
