"""Where a method sits when it permutes the items of the input: the order it starts from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from permlab.config.build import build
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError
from permlab.method.base import Method
from permlab.model.base import Backbone
from permlab.ops.scan_order import scan_order
from permlab.permutation import Site, check_order
from permlab.record.stored import UNREADABLE_ARRAYS

SITE = "patches"


def at_items(model: Backbone, settings: Mapping[str, Any]) -> Method:
    """The method that `settings` describe, at the items of a backbone.

    Raises:
        ConfigError: if a component refuses its values, or the starting order does not fit.
    """
    order = starting_order(settings["order"], model.height, model.width)
    return build("method", settings, Site(SITE, order, num_features=model.num_features))


def at_samples(
    model: Backbone, spec: DataSpec, settings: Mapping[str, Any], name: str, grid: tuple[int, int], images: int = 1
) -> Method:
    """The method that `settings` describe, where each item is one or more whole images, as a backbone encodes them.

    Args:
        spec: shape of an image.
        name: of the site.
        grid: rows and columns of the items, for the starting order.
        images: in an item, whose features are put one behind the other.
    Raises:
        ConfigError: if a component refuses its values, or the starting order does not fit.
    """
    order = starting_order(settings["order"], *grid)
    return build("method", settings, Site(name, order, num_features=images * feature_length(model, spec)))


@torch.no_grad()
def feature_length(model: Backbone, spec: DataSpec) -> int:
    """Number of features that a backbone encodes an image of this shape as."""
    was_training = model.training
    blank = torch.zeros(1, spec.channels, spec.height, spec.width)
    length = model.eval().encode(model.embed(blank)).shape[-1]
    model.train(was_training)
    return length


def starting_order(order: str | list[int], height: int, width: int) -> Int64[Tensor, " n"]:
    """The order that `method.order` names: a scan order, indices, or the `order` array of an .npz file.

    Raises:
        ConfigError: if it is no permutation of the height x width grid.
    """
    if isinstance(order, str) and not order.endswith(".npz"):
        return scan_order(order, height, width)
    indices = torch.tensor(order) if isinstance(order, list) else read_order(Path(order))
    try:
        check_order(indices)
        if len(indices) != height * width:
            raise ValueError(f"{len(indices)} items, the {height}x{width} grid has {height * width}")
    except ValueError as error:
        raise ConfigError(f"method.order={order}: {error}") from error
    return indices


def read_order(path: Path, name: str = "order") -> Int64[Tensor, " n"]:
    """One array of an .npz file, as indices.

    Raises:
        ConfigError: naming file and array, if it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays[name].astype(np.int64))
    except UNREADABLE_ARRAYS as error:
        raise ConfigError(f"method.order={path}: no readable `{name}` array ({error})") from error
