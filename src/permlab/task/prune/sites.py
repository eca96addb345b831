"""Which weight sites of a model are pruned, in how many groups, and the method at each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from permlab.config.build import build
from permlab.errors import ConfigError
from permlab.method.base import Method
from permlab.method.site_methods import SiteMethods
from permlab.model.base import Backbone
from permlab.permutation import Site
from permlab.sparsity.layer import NUM_FEATURES
from permlab.sparsity.site import Reader, WeightSite, read_sites
from permlab.task.place import read_order, starting_order
from permlab.task.prune.task import Prune


def at_sites(model: Backbone, task: Prune, settings: Mapping[str, Any]) -> SiteMethods:
    """A method for every weight site that the task selects and the pattern divides.

    Args:
        settings: of the method.
    Raises:
        ConfigError: if a component refuses its values, or a site does not fit.
    """
    try:
        sites, num_groups, left_out = fitting_sites(model, task)
    except ValueError as error:
        raise ConfigError(f"task=prune: {error}") from error
    bases = [_base_order(settings["order"], site, count) for site, count in zip(sites, num_groups, strict=True)]

    def make(site: WeightSite, count: int) -> Method:
        order = torch.arange(site.num_items)
        return build("method", settings, Site(site.name, order, num_groups=count, num_features=NUM_FEATURES))

    return SiteMethods(sites, bases, num_groups, make, left_out=left_out)


def fitting_sites(model: Backbone, task: Prune) -> tuple[list[WeightSite], list[int], tuple[str, ...]]:
    """The selected sites with their numbers of groups, and the names of sites that are left out.

    A site that is marked as optional is left out, and its layers stay dense, where the pattern
    does not divide it.

    Raises:
        ValueError: if a site does not exist, two have a layer in common, or the pattern or the groups do not
            divide one.
    """
    found = read_sites(model, select=task.sites, coupling=task.coupling, within_heads=task.within_heads)
    _check_apart(found, task)
    sites, counts, left_out = [], [], []
    for site in found:
        count = _num_groups(site, task)
        if site.num_items % (count * task.m) == 0:
            sites.append(site)
            counts.append(count)
        elif site.optional:
            left_out.append(site.name)
        else:
            raise ValueError(_misfit(site, count, task))
    if not sites:
        raise ValueError(f"sites={task.sites}: none of them fits {task.n}:{task.m}")
    return sites, counts, tuple(left_out)


def _check_apart(sites: list[WeightSite], task: Prune) -> None:
    """The residual stream's layers are those of other sites too."""
    readers: dict[Reader, str] = {}
    for site in sites:
        for reader in site.readers:
            if reader in readers:
                raise ValueError(f"task.sites={task.sites}: {readers[reader]} and {site.name} share {reader.module}")
            readers[reader] = site.name


def _num_groups(site: WeightSite, task: Prune) -> int:
    if site.num_heads > 1:
        return site.num_heads
    if task.num_groups is not None:
        return task.num_groups
    return max(1, site.num_items // task.block_size)


def _misfit(site: WeightSite, count: int, task: Prune) -> str:
    m, width = task.m, site.num_items
    fit = [c for c in range(1, width + 1) if width % (c * m) == 0]
    if not fit:
        valid = [length for length in range(task.n + 1, width + 1) if width % length == 0]
        near = ", ".join(map(str, sorted(sorted(valid, key=lambda length: abs(length - m))[:2])))
        return f"task.m={m}: does not divide the {width} input channels of site {site.name}; nearest that do: {near}"
    key = "block_size" if task.num_groups is None else "num_groups"
    if site.num_heads > 1:
        key = "within_heads" if task.within_heads else "sites"
    return (
        f"task.{key}={getattr(task, key)}: {count} groups of whole {m}s do not divide the {width} channels of site "
        f"{site.name}; numbers of groups which do: {', '.join(map(str, fit))}"
    )


def _base_order(order: str | list[int], site: WeightSite, num_groups: int) -> Int64[Tensor, " n"]:
    """The starting order of a site: the site's own array of an .npz file, or a scan order in every group."""
    if isinstance(order, str) and order.endswith(".npz"):
        indices = read_order(Path(order), site.name)
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
