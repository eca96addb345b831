"""Keys of every configuration group, their types and ranges; read without importing torch.

A group's schema is its dataclass below (keys that every component of the group has) joined
with the options of the chosen component, which are the keyword-only arguments of its
constructor.
"""

import ast
import importlib.util
import re
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from permlab.errors import ConfigError, nearest
from permlab.option import (
    REQUIRED,
    AddedLater,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Option,
    Order,
    PositiveFloat,
    PositiveInt,
    Range,
    Rate,
    TakenAsWritten,
    Verbatim,
    class_constant,
    options_of,
)

PACKAGE = Path(__file__).resolve().parents[1]
CONF = PACKAGE.parents[1] / "conf"
COMPONENT_GROUPS = ("model", "method", "task", "data")
GROUPS = (*COMPONENT_GROUPS, "optim", "trainer", "logger")
# Parts of the root that are no choice of a file.
SECTIONS = ("paths", "checkpoint")
# Arguments of lightning.Trainer that no run is given, and what to set instead.
OWN_TRAINER_KEYS = dict.fromkeys(
    (
        *("callbacks", "plugins", "barebones", "use_distributed_sampler", "num_sanity_val_steps"),
        *("reload_dataloaders_every_n_epochs", "enable_autolog_hparams", "model_registry"),
    ),
    "set by permlab itself",
) | {
    "logger": "set by permlab itself; logger=csv, tensorboard, wandb or none is a group of its own",
    "default_root_dir": "set by permlab itself; runs lie below paths.runs",
    "enable_checkpointing": "set by permlab itself; checkpoint.* says how often and how many",
    "fast_dev_run": "not used, as it keeps nothing to test; debug=fdr runs all there is on one batch of each split",
}
# Keys of the trainer group that permlab reads itself and lightning.Trainer does not know.
EXTRA_TRAINER_KEYS = ("name", "on_nonfinite", "max_skips", "profiler", "gradient_checkpointing")
# Batches of an epoch, or a part of them.
Batches = PositiveInt | Annotated[float, Range(gt=0, le=1)]


@dataclass
class ComponentKeys:
    """Every component: the preset's name and the file of its class."""

    name: str
    component: str


@dataclass
class ModelKeys(ComponentKeys):
    lr: Rate  # recommended peak of the preset, which optim.lr refers to


@dataclass
class MethodKeys(ComponentKeys):
    order: Order  # starting order, or the order of `fixed`


@dataclass
class DataKeys(ComponentKeys):
    batch_size: PositiveInt  # per process
    num_workers: NonNegativeInt


@dataclass
class OptimKeys:
    name: str
    lr: Rate
    weight_decay: Annotated[float, Range(ge=0, le=1000)]
    beta1: Annotated[float, Range(ge=0, lt=1)]
    beta2: Annotated[float, Range(ge=0, lt=1)]
    schedule: Literal["onecycle", "cosine", "linear", "constant"]
    warmup_fraction: Fraction
    hold_fraction: Annotated[Fraction, AddedLater(0.0)]


@dataclass
class TrainerKeys:
    """The arguments of lightning.Trainer whose values are checked; the others are passed on by name."""

    name: str
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"]
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp"]
    devices: PositiveInt | Literal["auto", -1] | list[int] | str
    num_nodes: PositiveInt
    precision: str | Literal[16, 32, 64]
    max_steps: PositiveInt | Literal[-1]
    max_epochs: PositiveInt | Literal[-1] | None
    accumulate_grad_batches: PositiveInt
    gradient_clip_val: NonNegativeFloat | None
    log_every_n_steps: PositiveInt
    val_check_interval: PositiveInt | Fraction | None
    # At NaN or infinity: end the run, or leave out that optimiser step.
    on_nonfinite: Annotated[Literal["stop", "skip"], AddedLater("stop")]
    max_skips: Annotated[NonNegativeInt, AddedLater(10)]  # optimiser steps that may be left out
    limit_train_batches: Annotated[Batches | None, AddedLater(None)]
    limit_val_batches: Annotated[Batches | None, AddedLater(None)]
    limit_test_batches: Annotated[Batches | None, AddedLater(None)]
    overfit_batches: Annotated[PositiveInt | Fraction, AddedLater(0)]
    detect_anomaly: Annotated[bool, AddedLater(False)]
    profiler: Annotated[Literal["simple", "advanced", "pytorch"] | None, AddedLater(None)]
    gradient_checkpointing: Annotated[bool, AddedLater(False)]  # compute activations again rather than keep them
    enable_progress_bar: Annotated[bool, AddedLater(True)]
    enable_model_summary: Annotated[bool, AddedLater(False)]


@dataclass
class LoggerKeys:
    name: str
    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None
    tags: list[str]
    log_artifacts: bool
    copies: Annotated[list[Literal["csv", "tensorboard"]], AddedLater([])]


@dataclass
class PathsKeys:
    runs: Verbatim
    data: Verbatim


@dataclass
class CheckpointKeys:
    """When the state of a run is saved, besides at every validation, and how many states are kept."""

    every_n_steps: PositiveInt | None  # optimiser steps, 1 or more
    every_minutes: PositiveFloat | None  # of training; fractions are fine
    keep: PositiveInt  # newest states, 1 or more, besides the best weights


@dataclass
class RootKeys:
    seed: NonNegativeInt
    force: bool
    num_threads: PositiveInt | None
    ckpt_path: Verbatim | None
    figures: Annotated[bool, AddedLater(True)]
    plan: Annotated[bool | Literal["json"], AddedLater(False)]
    debug: Annotated[str | None, AddedLater(None)] = None  # so no debugging run passes for the run that it debugs


@dataclass
class EvaluationKeys:
    """Of `eval.py`."""

    run: Verbatim
    split: Literal["val", "test"]
    upload: bool
    figures: bool
    export: Verbatim | None
    sparse: bool
    tasks: list[str] | Verbatim | None
    limit: PositiveInt | None


_SCHEMAS: dict[str, type] = {
    "": RootKeys,
    "paths": PathsKeys,
    "checkpoint": CheckpointKeys,
    "model": ModelKeys,
    "method": MethodKeys,
    "task": ComponentKeys,
    "data": DataKeys,
    "optim": OptimKeys,
    "trainer": TrainerKeys,
    "logger": LoggerKeys,
}


# Components and their options


def class_name(component: str) -> str:
    """CamelCase of a file stem: `ssm_probe` -> `SsmProbe`."""
    return "".join(part.capitalize() for part in component.split("_"))


def component_path(group: str, component: str) -> Path:
    """Source file of a component: `<group>/<component>.py`, or `<group>/<component>/<group>.py` in a folder of its own.

    Raises:
        ConfigError: if there is none; the name may not leave the group's folder.
    """
    check_component(group, component)
    return _file(group, component)


def component_module(group: str, component: str) -> str:
    """Dotted name of the module that a component's class is in."""
    relative = component_path(group, component).relative_to(PACKAGE.parent).with_suffix("")
    return ".".join(relative.parts)


def constant(group: str, component: str, name: str) -> Any:
    """A literal class constant of a component, without importing it; None where it has none."""
    return class_constant(component_path(group, component), class_name(component), name)


def component_options(group: str, component: str) -> dict[str, Option]:
    return options_of(component_path(group, component), class_name(component))


@cache
def verbatim_keys() -> frozenset[str]:
    """Dotted keys, those of `eval.py` included, whose values are taken as they are written."""
    found = {field.name for field in fields(EvaluationKeys) if Option(field.type).marks(TakenAsWritten)}
    for group in _SCHEMAS:
        options = [schema(group, None).items()]
        options += [component_options(group, c).items() for c in components(group)] if group in COMPONENT_GROUPS else []
        found |= {f"{group}.{key}".lstrip(".") for part in options for key, o in part if o.marks(TakenAsWritten)}
    return frozenset(found)


def schema(group: str, component: str | None) -> dict[str, Option]:
    """Keys of a group: the shared ones and those of the chosen component."""
    own = {
        field.name: Option(field.type, REQUIRED if field.default is MISSING else field.default)
        for field in fields(_SCHEMAS[group])
    }
    if group in COMPONENT_GROUPS and component is not None:
        own |= component_options(group, component)
    if group == "trainer":
        own |= {key: option for key, option in _lightning_options().items() if key not in own}
    return own


def added_later(group: str, component: str | None) -> dict[str, Any]:
    """Values, by key, that stand for options which runs of earlier versions do not have; see `AddedLater`."""
    marks: dict[str, list[AddedLater]] = {
        key: option.marks(AddedLater) for key, option in schema(group, component).items()
    }
    return {key: found[0].value for key, found in marks.items() if found}


@cache
def _lightning_options() -> dict[str, Option]:
    """Argument names of lightning.Trainer, read from its source (importing it takes seconds)."""
    package = importlib.util.find_spec("lightning")
    assert package is not None
    assert package.submodule_search_locations
    source = Path(package.submodule_search_locations[0], "pytorch", "trainer", "trainer.py").read_text()
    trainer = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "Trainer")
    init = next(node for node in trainer.body if getattr(node, "name", "") == "__init__")  # type: ignore[attr-defined]
    return {a.arg: Option(Any, None) for a in init.args.kwonlyargs if a.arg not in OWN_TRAINER_KEYS}


@cache
def components(group: str) -> tuple[str, ...]:
    """Files and folders of a group that hold the class of their name and are named by a YAML file of the group."""
    named = set()
    for path in (CONF / group).glob("*.yaml"):
        found = re.search(r"^component: *(\w+)", path.read_text(errors="replace"), re.MULTILINE)
        named.add(found[1] if found else path.stem)
    return tuple(sorted(name for name in named if _holds_class(group, name)))


def preset_component(group: str, preset: str) -> str:
    """Component of a choice of a group, its own or that of the preset which it builds on."""
    import yaml

    settings = yaml.safe_load((CONF / group / f"{preset}.yaml").read_text())
    parents = [parent for parent in settings.get("defaults", []) if parent != "_self_"]
    if "component" not in settings and parents:
        return preset_component(group, parents[0])
    return settings.get("component", preset)


def _file(group: str, component: str) -> Path:
    alone = PACKAGE / group / f"{component}.py"
    return alone if alone.is_file() else PACKAGE / group / component / f"{group}.py"


def _holds_class(group: str, component: str) -> bool:
    return _flaw(group, component) is None


def _flaw(group: str, component: str) -> str | None:
    """Why the source of a component is not there or cannot be read; None where it can."""
    try:
        options_of(_file(group, component), class_name(component))
    except (OSError, ValueError) as error:
        return str(error)
    return None


def is_component(group: str, component: object) -> bool:
    return component in components(group)


def check_component(group: str, component: object) -> None:
    """Refuse what no YAML file of the group names, with the nearest that one does.

    Raises:
        ConfigError: naming the key.
    """
    if not is_component(group, component):
        reason = missing(group, component)
        hint = f"; {reason}" if reason else nearest(component, components(group))
        raise ConfigError(f"{group}.component={component}: no such component{hint}")


def missing(group: str, component: object) -> str | None:
    """What a new component lacks: its source, a class that can be read, its YAML; None where it has all, or nothing.

    Example:
        >>> missing("method", "sinkhorn"), missing("method", "no_such_method")
        (None, None)
    """
    if group not in COMPONENT_GROUPS or not re.fullmatch(r"[a-z]\w*", str(component)) or is_component(group, component):
        return None
    name, values = str(component), CONF / group / f"{component}.yaml"
    path, flaw = _file(group, name), _flaw(group, name)
    if path.is_file():
        return flaw.replace(f"{CONF.parent}/", "") if flaw else f"{_place(path)} has no {_place(values)}"
    return f"{_place(values)} has no {_place(PACKAGE / group / name)}.py" if values.is_file() else None


def _place(path: Path) -> str:
    return str(path.relative_to(CONF.parent))


def component_names(group: str) -> list[str]:
    """Choices of a group: the stems of its YAML files."""
    folder = CONF / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
