"""Checkpoint files: written whole or not at all, checked before they are used.

The format of `torch.save` is a zip archive with a checksum (CRC-32) of every part, so a file
vouches for itself: there is no second file that a crash could leave out of step with it.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import CheckpointIO
from torch import Tensor, nn

from permlab.errors import ConfigError
from permlab.record.rundir import older, write_checkpoint

LAST = "last.ckpt"


class CheckpointFiles(CheckpointIO):
    """Lightning's checkpoints, atomic, the newest `keep` states being kept.

    Args:
        keep: states, of which `last.ckpt` is the newest and `last-1.ckpt` the one before.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        write_checkpoint(path, checkpoint, keep=self.keep if path.name == LAST else 1)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """The state in a file; nothing is unpickled, whatever is asked for."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class State:
    """A checkpoint to resume from, and what of it is needed before.

    Args:
        path: of the file.
        step: optimiser steps behind it.
        line: the newest line of the metrics when it was written.
    """

    path: Path
    step: int
    line: str = ""


def find_damage(path: Path) -> str:
    """Why a checkpoint cannot be used; empty if every part of it is what was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of the archive, its compression or the disk: damage has many faces
        size = path.stat().st_size if path.is_file() else 0
        return f"truncated or no checkpoint, {size:,} bytes ({error})"
    return f"checksum of {damaged} does not fit" if damaged else ""


def read_state(path: Path) -> State:
    """Position of a checkpoint that a run can be resumed from.

    Raises:
        ConfigError: if it is damaged, or holds no state of a training.
    """
    problem = find_damage(path)
    if not problem:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return State(path, int(state["global_step"]), str(state.get("metrics_line", "")))
        except Exception as error:
            problem = f"cannot be read ({type(error).__name__})"
    raise ConfigError(f"checkpoint {path}: {problem}")


def newest_state(folder: Path) -> tuple[State | None, dict[Path, str]]:
    """The newest state that is whole, and the newer ones that are not, with what is wrong with them.

    Raises:
        ConfigError: if there are states and not one of them is whole.
    """
    paths = [folder / LAST, *(older(folder / LAST, age) for age in _ages(folder))]
    damaged: dict[Path, str] = {}
    for path in paths:
        if not path.is_file():
            continue
        try:
            return read_state(path), damaged
        except ConfigError as error:
            damaged[path] = str(error).removeprefix(f"checkpoint {path}: ")
    if damaged:
        problems = "; ".join(f"{path}: {problem}" for path, problem in damaged.items())
        raise ConfigError(f"no usable checkpoint: {problems}; force=true trains again from the start")
    return None, {}


def _ages(folder: Path) -> list[int]:
    ages = [path.stem.removeprefix("last-") for path in folder.glob("last-*.ckpt")]
    return sorted(int(age) for age in ages if age.isdigit())


def read_unfinished(path: Path) -> Mapping[str, Any]:
    """What work that was cut off had written about itself; empty where there is no such file, or none that is whole."""
    if not path.is_file() or find_damage(path):
        return {}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of the pickle that nobody unpickles
        return {}
    return found if isinstance(found, Mapping) else {}


def load_weights(path: Path, *modules: tuple[str, nn.Module]) -> None:
    """Load parts of a checkpoint, each a (prefix, module) pair; nothing is unpickled.

    Raises:
        ConfigError: if the file cannot be read or holds another model's weights.
    """
    problem = find_damage(path)
    if problem:
        raise ConfigError(f"checkpoint {path}: {problem}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
            raise TypeError("state_dict holds more than tensors by name")
        if any(value.is_complex() for value in state.values()):
            raise TypeError("state_dict holds complex numbers")
    except Exception as error:
        raise ConfigError(f"checkpoint {path}: cannot be read ({type(error).__name__})") from error
    for prefix, module in modules:
        part = {key[len(prefix) + 1 :]: value for key, value in state.items() if key.startswith(f"{prefix}.")}
        try:
            module.load_state_dict(part)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
            raise ConfigError(f"checkpoint {path}: holds another {prefix} ({reason})") from error
