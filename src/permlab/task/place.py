"""Where a method sits when it permutes the items of the input: the order it starts from."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from permlab.config.build import build
from permlab.config.plan import Plan, open_data
from permlab.data.module import DataModule
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError
from permlab.method.base import Method
from permlab.model.base import Backbone
from permlab.ops.compression import codebook_tokens, colour_tokens, reductions
from permlab.ops.scan_order import COMPRESSIBLE, scan_order
from permlab.permutation import Site, check_order
from permlab.record.stored import UNREADABLE_ARRAYS

SITE = "patches"
# Training images, at most, on which scan orders are compared by how well they compress.
NUM_COMPRESSED = 512


def at_items(model: Backbone, plan: Plan) -> Method:
    """The method of a plan, at the items of a backbone.

    Raises:
        ConfigError: if a component refuses its values, the starting order does not fit, or images that it
            depends on cannot be read.
    """
    settings = plan.config["method"]
    order = settings["order"]
    if order == COMPRESSIBLE:
        table = compression(plan, model.height, model.width)
        order = max(table, key=lambda scan: table[scan]["mean"])
    site = Site(SITE, starting_order(order, model.height, model.width), num_features=model.num_features)
    return build("method", settings, site)


def compression(plan: Plan, height: int, width: int) -> Mapping[str, Mapping[str, float]]:
    """How much smaller the patches of a plan's training images are in each scan order than row by row, in per cent.

    Args:
        height, width: of the grid of patches.
    Returns:
        By scan order and by the tokens that were compressed, and their `mean`; see `permlab.ops.compression`.
    Raises:
        ConfigError: if the images cannot be read, or the grid does not divide them.
    """
    return _compression(json.dumps(plan.config["data"]), plan.task.data_seed(plan), height, width)


@cache
def _compression(settings: str, seed: int, height: int, width: int) -> Mapping[str, Mapping[str, float]]:
    data, spec = open_data(json.loads(settings))
    # What a data set draws is no draw of the weights that are made beside this.
    with torch.random.fork_rng(devices=[]):
        module = DataModule(data, json.loads(settings), seed)
        images = torch.cat([images for images, _ in module.sample("train", NUM_COMPRESSED)])
    try:
        rows = images.unflatten(-2, (height, -1)).unflatten(-1, (width, -1))  # b c height h width w
    except RuntimeError as error:
        raise ConfigError(f"a grid of {height}x{width} does not divide {spec.height}x{spec.width} pixels") from error
    patches = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    tokens = {"colour": colour_tokens(patches, images.shape[1]), "codebook": codebook_tokens(patches, seed=seed)}
    return reductions(tokens, height, width)


def at_samples(model: Backbone, plan: Plan, name: str, grid: tuple[int, int], images: int = 1) -> Method:
    """The method of a plan, where each item is one or more whole images, as a backbone encodes them.

    Args:
        name: of the site.
        grid: rows and columns of the items, for the starting order.
        images: in an item, whose features are put one behind the other.
    Raises:
        ConfigError: if a component refuses its values, or the starting order does not fit.
    """
    settings = plan.config["method"]
    order = starting_order(settings["order"], *grid)
    return build("method", settings, Site(name, order, num_features=images * feature_length(model, plan.spec)))


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
