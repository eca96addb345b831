"""From a complete configuration to the model and the method that sits at its items."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from permlab.checkpoint import find_damage
from permlab.config import build, data_spec
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError
from permlab.method.base import Method
from permlab.model.base import Backbone
from permlab.ops.scan_order import scan_order
from permlab.option import class_constant
from permlab.permutation import Site, check_order
from permlab.schema import class_name, component_path
from permlab.sparsity.layer import NUM_FEATURES
from permlab.sparsity.site import Reader, WeightSite, read_sites
from permlab.sparsity.site_methods import SiteMethods


@dataclass(frozen=True)
class Assembly:
    """The parts of a run that depend on the configuration alone."""

    spec: DataSpec
    model: Backbone
    method: Method | SiteMethods
    left_dense: tuple[str, ...] = ()  # optional weight sites that the pattern does not divide


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
    if permutes(config["task"]["component"]) == "weights":
        return Assembly(spec, model, *_site_methods(config, model))
    order = starting_order(config["method"]["order"], model.height, model.width)
    site = Site("patches", order, num_features=model.num_features)
    return Assembly(spec, model, build("method", config["method"], site))


def _site_methods(config: Mapping[str, Any], model: Backbone) -> tuple[SiteMethods, tuple[str, ...]]:
    """A method for every weight site that the task selects and the pattern divides, and the sites it does not."""
    task, settings = config["task"], config["method"]
    try:
        sites, num_groups, left_dense = fitting_sites(model, task)
    except ValueError as error:
        raise ConfigError(f"task=prune: {error}") from error
    bases = [_base_order(settings["order"], site, count) for site, count in zip(sites, num_groups, strict=True)]

    def make(site: WeightSite, count: int) -> Method:
        order = torch.arange(site.num_items)
        return build("method", settings, Site(site.name, order, num_groups=count, num_features=NUM_FEATURES))

    return SiteMethods(sites, bases, num_groups, make), left_dense


def fitting_sites(model: Backbone, task: Mapping[str, Any]) -> tuple[list[WeightSite], list[int], tuple[str, ...]]:
    """The selected sites with their numbers of groups, and the names of sites that are left out.

    A site that is marked as optional is left out, and its layers stay dense, where the pattern
    does not divide it.

    Raises:
        ValueError: if a site does not exist, two have a layer in common, or the pattern or the groups do not
            divide one.
    """
    found = read_sites(model, select=task["sites"], coupling=task["coupling"], within_heads=task["within_heads"])
    _check_apart(found, task)
    sites, counts, left_dense = [], [], []
    for site in found:
        count = _num_groups(site, task)
        if site.num_items % (count * task["m"]) == 0:
            sites.append(site)
            counts.append(count)
        elif site.optional:
            left_dense.append(site.name)
        else:
            raise ValueError(_misfit(site, count, task))
    if not sites:
        raise ValueError(f"sites={task['sites']}: none of them fits {task['n']}:{task['m']}")
    return sites, counts, tuple(left_dense)


def _check_apart(sites: list[WeightSite], task: Mapping[str, Any]) -> None:
    """The residual stream's layers are those of other sites too."""
    readers: dict[Reader, str] = {}
    for site in sites:
        for reader in site.readers:
            if reader in readers:
                raise ValueError(f"task.sites={task['sites']}: {readers[reader]} and {site.name} share {reader.module}")
            readers[reader] = site.name


def _num_groups(site: WeightSite, task: Mapping[str, Any]) -> int:
    if site.num_heads > 1:
        return site.num_heads
    if task["num_groups"] is not None:
        return task["num_groups"]
    return max(1, site.num_items // task["block_size"])


def _misfit(site: WeightSite, count: int, task: Mapping[str, Any]) -> str:
    m, width = task["m"], site.num_items
    fit = [c for c in range(1, width + 1) if width % (c * m) == 0]
    if not fit:
        valid = [length for length in range(task["n"] + 1, width + 1) if width % length == 0]
        near = ", ".join(map(str, sorted(sorted(valid, key=lambda length: abs(length - m))[:2])))
        return f"task.m={m}: does not divide the {width} input channels of site {site.name}; nearest that do: {near}"
    key = "block_size" if task["num_groups"] is None else "num_groups"
    if site.num_heads > 1:
        key = "within_heads" if task["within_heads"] else "sites"
    return (
        f"task.{key}={task[key]}: {count} groups of whole {m}s do not divide the {width} channels of site "
        f"{site.name}; numbers of groups which do: {', '.join(map(str, fit))}"
    )


def _base_order(order: str | list[int], site: WeightSite, num_groups: int) -> Int64[Tensor, " n"]:
    """The starting order of a site: the site's own array of an .npz file, or a scan order in every group."""
    if isinstance(order, str) and order.endswith(".npz"):
        indices = _read_order(Path(order), site.name)
    else:
        size = site.num_items // num_groups
        one = starting_order(order, 1, size)
        indices = (torch.arange(num_groups).unsqueeze(1) * size + one).flatten()
    try:
        Site(site.name, indices, num_groups=num_groups)
    except ValueError as error:
        raise ConfigError(f"method.order={order}: {error}") from error
    if len(indices) != site.num_items:
        raise ConfigError(f"method.order={order}: {len(indices)} items, site {site.name} has {site.num_items}")
    return indices


def permutes(component: str) -> str:
    """What the method of a task permutes, read from the task's file: `items`, `weights` or `nothing`."""
    path = component_path("task", component)
    return class_constant(path, class_name(component), "permutes") or "items"


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


def _read_order(path: Path, name: str = "order") -> Tensor:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays[name].astype(np.int64))
    except UNREADABLE_ARRAYS as error:
        raise ConfigError(f"method.order={path}: no readable `{name}` array ({error})") from error


# What NumPy raises for a file that is no .npz, or one that is cut short, garbled, or holds pickled objects.
UNREADABLE_ARRAYS = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


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
