"""Weights in transformers' format: a config.json and safetensors, in a folder or on the hub. Never a pickle."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig

from permlab.option import same_value

ConfigType = TypeVar("ConfigType", bound=PreTrainedConfig)

_FILES = ("config.json", "model.safetensors.index.json", "model*.safetensors")
_PICKLES = (".bin", ".pt", ".pth")


def open_checkpoint(name: str, config_class: type[ConfigType]) -> tuple[Path, ConfigType]:
    """Folder and configuration of a checkpoint; what is no folder here is downloaded from the hub.

    Args:
        name: a folder, or the name of a repository on the hub.
        config_class: of the configuration that the checkpoint has to have.
    Raises:
        ValueError: if there is no such checkpoint, it is another kind of model, or it cannot be read.
    """
    folder = Path(name) if Path(name).is_dir() else _download(name)
    try:
        settings = json.loads((folder / "config.json").read_text())
        kind = settings["model_type"]
        config = config_class.from_dict(settings) if kind == config_class.model_type else None
    except Exception as error:  # a malformed configuration fails in as many ways as there are settings
        raise ValueError(f"pretrained={name}: no readable config.json ({_reason(error)})") from error
    if config is None:
        raise ValueError(f"pretrained={name}: its model_type is {kind}, not {config_class.model_type}")
    return folder, config


def check_equal(name: str, settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Compare settings of a checkpoint with ours.

    Args:
        settings: the checkpoint's value and ours, by the name of our option; numbers in single precision.
    Raises:
        ValueError: naming the first that differs, with both values.
    """
    for option, (theirs, ours) in settings.items():
        if not same_value(theirs, ours):
            raise ValueError(f"pretrained={name}: its {option} is {theirs}, not {ours}")


@torch.no_grad()
def load_checkpoint(
    name: str, folder: Path, model: nn.Module, *, rename: Callable[[str], str | None], fresh: tuple[str, ...] = ()
) -> None:
    """Copy the checkpoint's tensors into a model's parameters, in the precision that those have.

    One tensor is in memory at a time, besides the model.

    Args:
        rename: our name of a tensor; None for one that is of no use here.
        fresh: parameters that the checkpoint does not have, and that stay as they are.
    Raises:
        ValueError: if a tensor is missing, or one too many, or of another shape, or a file cannot be read.
    """
    # A tied parameter has two names, and a checkpoint may hold it under either or both.
    places = dict(model.named_parameters(remove_duplicate=False))
    missing = {id(place): key for key, place in places.items() if key not in fresh}
    for file in _weight_files(name, folder):
        for key, tensor in _read(name, file):
            ours = rename(key)
            if ours is None:
                continue
            if ours not in places:
                raise ValueError(f"pretrained={name}: there is no place for its tensor {key}")
            if tensor.shape != places[ours].shape:
                shapes = f"{list(tensor.shape)}, not {list(places[ours].shape)}"
                raise ValueError(f"pretrained={name}: its tensor {key} is {shapes}")
            places[ours].copy_(tensor)
            missing.pop(id(places[ours]), None)
    if missing:
        raise ValueError(f"pretrained={name}: it has no tensor for {min(missing.values())}")


def tensor_names(name: str, folder: Path) -> Iterable[str]:
    """Names of a checkpoint's tensors, which are not read.

    Raises:
        ValueError: if there are none, or a file cannot be read.
    """
    for file in _weight_files(name, folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                yield from tensors.keys()
        except Exception as error:
            raise ValueError(f"pretrained={name}: {file.name} cannot be read ({_reason(error)})") from error


def as_causal_lm_config(
    config: ConfigType, architecture: str, *, head: nn.Module, embedding: nn.Module, num_slots: int
) -> ConfigType:
    """A copy of a network's configuration as the configuration of a whole language model.

    Args:
        config: of the network; everything else is put in.
        architecture: transformers' class of the language model.
        head, embedding: whose weights are one parameter where they are tied.
        num_slots: longest text that the model was made for.
    """
    config, weight = copy.deepcopy(config), head.get_parameter("weight")
    config.architectures = [architecture]
    config.vocab_size = len(weight)
    config.tie_word_embeddings = weight is embedding.get_parameter("weight")
    config.max_position_embeddings = num_slots
    config.use_cache = True
    config.dtype = weight.dtype
    return config


def _download(name: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's errors are many; all mean that there are no weights
        raise ValueError(f"pretrained={name}: no such folder, and none from the hub ({_reason(error)})") from error


def _weight_files(name: str, folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"pretrained={name}: no readable {index.name} ({_reason(error)})") from error
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"pretrained={name}: {pickles[0]} is a pickle, which is not read; save the model as safetensors"
        )
    raise ValueError(f"pretrained={name}: there is no .safetensors file in it")


def _read(name: str, file: Path) -> Iterable[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (the file is no mapping)
                yield key, tensors.get_tensor(key)
    except Exception as error:  # a missing shard, a cut-off file, an unknown number format
        raise ValueError(f"pretrained={name}: {file.name} cannot be read ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
