"""A method by the name of its preset, for a module of one's own."""

from typing import Any

import torch

from permlab.config.build import build
from permlab.config.check import check_settings
from permlab.config.compose import compose_config
from permlab.errors import ConfigError
from permlab.method.base import Method
from permlab.permutation import Site


def make_method(preset: str, items: int | Site, **options: Any) -> Method:
    """The method that `conf/method/<preset>.yaml` describes, at a site of one's own.

    A training loop calls `method.advance(step, num_steps)` before each step, so that temperature and phase
    follow their schedule, and gives the method's parameters the learning rate `method.lr` and no weight decay.

    Args:
        preset: as in `method=` on the command line.
        items: how many there are, which then start as they are; or a site, with its starting order and groups.
        options: those of the preset to change, as in `method.<option>=`.
    Raises:
        ConfigError: if there is no such preset or option, or a value is out of its range.
    Example:
        >>> method = make_method("sinkhorn_ste", 4, num_iters=10)
        >>> method().order
        tensor([0, 1, 2, 3])
        >>> make_method("sinkhorn_ste", 4, num_iters=0)
        Traceback (most recent call last):
        permlab.errors.ConfigError: method.num_iters=0: expected an integer > 0
    """
    composed, problems = compose_config("train", [f"method={preset}"])
    if problems:
        raise ConfigError(problems)
    settings = composed["method"] | options
    check_settings("method", settings)
    site = items if isinstance(items, Site) else Site("items", torch.arange(items))
    return build("method", settings, site)
