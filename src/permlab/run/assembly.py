"""From a plan to the parts of its run, everything that can refuse it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from permlab.config.build import build
from permlab.config.plan import Plan
from permlab.data.module import DataModule
from permlab.errors import ConfigError
from permlab.method.base import Method
from permlab.method.site_methods import SiteMethods
from permlab.model.base import Backbone
from permlab.model.checkpointing import checkpoint_stages
from permlab.task.guard import NonFiniteGuard
from permlab.task.learner import Learner


@dataclass(frozen=True)
class Assembly:
    """Model, the method at its places, their learner, and the data."""

    model: Backbone
    method: Method | SiteMethods
    learner: Learner
    data: DataModule


def assemble(plan: Plan, before: Mapping[str, Path] | None = None) -> Assembly:
    """Build every part; weights are drawn from `seed`, the backbone's first.

    The backbone of a run is therefore the same whatever the method, which pairs a run with
    its control.

    Args:
        before: directories of the runs that this one needs; None where it takes over nothing from them.
    Raises:
        ConfigError: if a component refuses its values, or what comes from the runs before does not fit.
    """
    model, method = place(plan)
    data = DataModule(plan.data, plan.config["data"], plan.task.data_seed(plan))
    try:
        learner = plan.task.learner()(plan.task, model, method, plan.config["optim"], plan.config["seed"])
    except ValueError as error:
        raise ConfigError(f"task={plan.config['task']['name']}: {error}") from error
    learner.adopt(before or {})
    learner.cache_folder, learner.run_folder = plan.cache_folder, plan.directory
    learner.guard = NonFiniteGuard(**{key: plan.config["trainer"][key] for key in ("on_nonfinite", "max_skips")})
    if plan.config["trainer"].get("gradient_checkpointing"):
        try:
            checkpoint_stages(model)
        except ValueError as error:
            raise ConfigError(f"trainer.gradient_checkpointing=true: {error}") from error
    return Assembly(model, method, learner, data)


def place(plan: Plan) -> tuple[Backbone, Method | SiteMethods]:
    """Build the model and the method at its places, without what is trained from elsewhere.

    Raises:
        ConfigError: if a component refuses its values.
    """
    torch.manual_seed(plan.config["seed"])
    with _default_dtype(getattr(torch, plan.task.weight_dtype)):
        model = build("model", plan.config["model"], plan.spec)
    return model, plan.task.learner().place(plan, model)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def opening(plan: Plan, parts: Assembly) -> str:
    """The lines that a run begins with: what is asked of which parts, and how many samples from where."""
    config, spec, model = plan.config, plan.spec, parts.model
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{config['task']['name']}: {config['data']['name']} ({spec.num_classes} {spec.labels}), "
        f"{config['model']['name']} ({count:,} parameters) reading {spec.describe(model.height, model.width)}, "
        f"method {config['method']['name']}{parts.learner.describe()}\n"
        f"data: {parts.data.describe()}"
    )
