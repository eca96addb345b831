"""From a complete configuration to the model and the method that sits at its items."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from permlab.config import build, data_spec
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError
from permlab.method.base import Method
from permlab.model.base import Backbone
from permlab.ops.scan_order import scan_order
from permlab.permutation import Site, check_order


@dataclass(frozen=True)
class Assembly:
    """The parts of a run that depend on the configuration alone."""

    spec: DataSpec
    model: Backbone
    method: Method


def assemble(config: Mapping[str, Any]) -> Assembly:
    """Build backbone and method; weights are drawn from `seed`, the backbone's first.

    The backbone of a run is therefore the same whatever the method, which pairs a run with
    its control.

    Raises:
        ConfigError: if a component refuses its values.
    """
    torch.manual_seed(config["seed"])
    spec = data_spec(config["data"])
    model = build("model", config["model"], spec)
    order = starting_order(config["method"]["order"], model.height, model.width)
    site = Site("patches", order, num_features=model.num_features)
    return Assembly(spec, model, build("method", config["method"], site))


def starting_order(order: str | list[int], height: int, width: int) -> Int64[Tensor, " n"]:
    """The order that `method.order` names: a scan order, indices, or the `order` array of an .npz file.

    Raises:
        ConfigError: if it is no permutation of the height x width grid.
    """
    if isinstance(order, str) and not order.endswith(".npz"):
        return scan_order(order, height, width)
    indices = torch.tensor(order) if isinstance(order, list) else _read_order(Path(order))
    try:
        check_order(indices)
        if len(indices) != height * width:
            raise ValueError(f"{len(indices)} items, the {height}x{width} grid has {height * width}")
    except ValueError as error:
        raise ConfigError(f"method.order={order}: {error}") from error
    return indices


def _read_order(path: Path) -> Tensor:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["order"].astype(np.int64))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"method.order={path}: no readable `order` array ({error})") from error


def load_weights(path: Path, *modules: tuple[str, nn.Module]) -> None:
    """Load parts of a checkpoint, each a (prefix, module) pair; nothing is unpickled.

    Raises:
        ConfigError: if the file cannot be read or holds another model's weights.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise ConfigError(f"checkpoint {path}: cannot be read ({type(error).__name__})") from error
    for prefix, module in modules:
        part = {key[len(prefix) + 1 :]: value for key, value in state.items() if key.startswith(f"{prefix}.")}
        try:
            module.load_state_dict(part)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ConfigError(f"checkpoint {path}: holds another {prefix} ({reason})") from error
