"""Validation, derived values and construction: the one place where YAML becomes objects.

Everything here but `build` runs before torch is imported; the keys are in `permlab.schema`.
"""

import copy
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from permlab.data.spec import DataSpec
from permlab.effect import idle_settings
from permlab.errors import ConfigError
from permlab.ops.scan_order import check_name
from permlab.ops.schedule import parse
from permlab.option import (
    REQUIRED,
    choices,
    class_constant,
    describe,
    matches,
)
from permlab.schema import (
    COMPONENT_GROUPS,
    CONF,
    GROUPS,
    OWN_TRAINER_KEYS,
    check_component,
    class_name,
    component_names,
    component_options,
    component_path,
    components,
    is_component,
    nearest,
    schema,
)
from permlab.secret import leaks

# Parts of the root that are no choice of a file.
SECTIONS = ("paths", "checkpoint")
# Where a run is made, not what it computes: left out of the hash that names the run.
MACHINE_KEYS = (
    "seed",
    "force",
    "num_threads",
    "ckpt_path",
    "paths",
    "checkpoint",
    "logger",
    "data.num_workers",
    "optim.name",
    "trainer.name",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.profiler",
    # Without effect until a number is not finite; then a stopped run goes on where it was, skipping.
    "trainer.on_nonfinite",
    "trainer.max_skips",
)


# By which `hydra.utils.instantiate`, which is not used here, would be told what to call.
INSTANTIATE_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


# Construction


def build(group: str, settings: Mapping[str, Any], *context: Any) -> Any:
    """Construct the component that `settings` describe: `component_class(*context, **options)`.

    This is the only place that turns a configuration into objects, and it can reach nothing
    but the classes in the package's own group folders.

    Raises:
        ConfigError: if the constructor refuses the values.
    """
    component = settings["component"]
    options = {key: settings[key] for key in component_options(group, component) if key in settings}
    module = importlib.import_module(f"permlab.{group}.{component}")
    try:
        return getattr(module, class_name(component))(*context, **options)
    except ValueError as error:
        raise ConfigError(f"{group}={settings.get('name', component)}: {error}") from error


def data_spec(settings: Mapping[str, Any]) -> DataSpec:
    """Shape of the configured dataset; its class answers this without importing torch.

    Raises:
        ConfigError: if its files are missing or not what they should be.
    """
    try:
        return build("data", settings).spec()
    except ValueError as error:
        where = f"data.root={settings['root']}" if "root" in settings else f"data={settings.get('name')}"
        raise ConfigError(f"{where}: {error}") from error


# Validation


def prepare(composed: Mapping[str, Any], given: Iterable[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Complete configuration and warnings, from what Hydra composed.

    Args:
        given: dotted keys that the user named, each of which is warned of where it has no effect.
    Raises:
        ConfigError: with every problem of the configuration.
    """
    config = copy.deepcopy(dict(composed))
    warnings = drop_ineffective(config)
    problems = validate(config)
    if problems:
        raise ConfigError(problems)
    warnings += idle_settings(config, data_spec(config["data"]), given)
    derive(config)
    return config, warnings


def drop_ineffective(config: dict[str, Any]) -> list[str]:
    """Remove keys that belong to another component of the same group, and say so.

    A sweep over methods sets `method.num_iters` for all of them; it means nothing to some.
    """
    warnings = []
    for group in COMPONENT_GROUPS:
        settings = config.get(group)
        if not isinstance(settings, dict) or not is_component(group, settings.get("component")):
            continue
        known = schema(group, settings["component"])
        elsewhere = set().union(*(component_options(group, other) for other in components(group)))
        for key in [key for key in settings if key not in known and key in elsewhere]:
            warnings.append(f"{group}.{key}={settings.pop(key)} has no effect with {group}={settings['name']}")
    return warnings


def validate(config: Mapping[str, Any]) -> list[str]:
    """Every problem of a composed configuration, as `key=value: what is wrong; nearest valid choice`."""
    problems = _check_safety(config)
    for group in ("", *SECTIONS, *GROUPS):
        settings = config if group == "" else config.get(group)
        if not isinstance(settings, Mapping):
            problems.append(f"{group}={settings}: expected a group of keys")
            continue
        try:
            problems += _check_group(group, settings)
        except ConfigError as error:
            problems += error.problems
    try:
        return problems or _check_across(config)
    except OSError as error:  # of a path that cannot even be asked for: too long, or not allowed
        return [f"{str(error.filename)[:80]}: {error.strerror}"]


def _check_safety(config: Mapping[str, Any]) -> list[str]:
    """What a configuration may hold nowhere: a class to construct, or a secret, which its files would show."""
    problems = [
        f"{key}: nothing is constructed from a configuration but the components by name" for key in _targets(config)
    ]
    for key in dict.fromkeys(leaks(config)):
        problems.append(
            f"{key}: holds a secret, which the run's files would show; it belongs into the environment alone"
        )
    return problems


def _targets(value: Any, path: str = "") -> list[str]:
    """Dotted keys by which Hydra would construct any class there is."""
    found = []
    if isinstance(value, Mapping):
        for key, part in value.items():
            here = f"{path}.{key}" if path else str(key)
            found += [here] if key in INSTANTIATE_KEYS else _targets(part, here)
    elif isinstance(value, list):
        found += [key for part in value for key in _targets(part, path)]
    return found


def _check_group(group: str, settings: Mapping[str, Any]) -> list[str]:
    if group in COMPONENT_GROUPS:
        check_component(group, settings.get("component"))
    known = schema(group, settings.get("component"))
    if "name" in known and not _is_choice(group, settings.get("name")):
        name = settings.get("name")
        return [f"{group}.name={name}: no such choice{nearest(name, component_names(group))}"]
    dotted = f"{group}." if group else ""
    problems = []
    for key, value in settings.items():
        if group == "" and (key in GROUPS or key in SECTIONS):
            continue
        if key not in known:
            where = [f"{dotted}{name}" for name in known] + ([] if group else list(GROUPS))
            owned = group == "trainer" and key in OWN_TRAINER_KEYS
            why = "set by permlab itself" if owned else "unknown key" + nearest(f"{dotted}{key}", where)
            problems.append(f"{dotted}{key}={value}: {why}")
        elif value == "???":
            problems.append(f"{dotted}{key}: missing, expected {describe(known[key].type)}")
        elif not matches(value, known[key].type) and not _derived_later(group, key, value):
            hint = nearest(value, choices(known[key].type)) if isinstance(value, str) else ""
            problems.append(f"{dotted}{key}={value}: expected {describe(known[key].type)}{hint}")
    missing = [key for key, option in known.items() if key not in settings and option.default is REQUIRED]
    return problems + [f"{dotted}{key}: missing, expected {describe(known[key].type)}" for key in missing]


def _is_choice(group: str, name: Any) -> bool:
    """Whether a name is one of the group's: it becomes part of the run directory's path."""
    return isinstance(name, str) and name in component_names(group)


def _derived_later(group: str, key: str, value: Any) -> bool:
    return value is None and (group, key) == ("model", "patch_size")


def _check_across(config: Mapping[str, Any]) -> list[str]:
    """Rules that involve more than one key; called once every single key is right."""
    model, method, trainer = config["model"], config["method"], config["trainer"]
    problems = []
    try:
        spec = data_spec(config["data"])
    except ConfigError as error:
        return error.problems
    problems += _check_kind("model", model, "reads", spec, config) + _check_kind(
        "task", config["task"], "takes", spec, config
    )
    num_items = None
    try:
        text = spec.kind == "text"  # which has no patches
        height, width = spec.grid(spec.patch_size if text else model.get("patch_size") or spec.patch_size)
        merged = 1 if text else model.get("merge_size", 1)  # patches of an item's side
        height, width = height // merged, width // merged
        num_items = height * width
    except ValueError as error:
        problems.append(f"model.patch_size={model['patch_size']}: {error}")
    task = config["task"]
    if _constant("task", task["component"], "permutes") == "weights":
        num_items = None
    problems += _check_order(method["order"], num_items)
    problems += _check_temperature(method)
    problems += _check_method(task, method)
    warm, frozen = method.get("warmup_fraction", 0), method.get("freeze_fraction", 0)
    if warm + frozen > 1:
        problems.append(f"method.freeze_fraction={frozen}: with method.warmup_fraction={warm} exceeds 1")
    if method.get("baseline") == "leave_one_out" and method.get("num_samples", 2) < 2:
        problems.append(f"method.num_samples={method['num_samples']}: method.baseline=leave_one_out needs at least 2")
    if (method.get("surrogate"), method.get("estimator")) == ("product", "relaxed"):
        problems.append("method.estimator=relaxed: method.surrogate=product needs straight_through")
    if "num_heads" in model and model["width"] % model["num_heads"]:
        problems.append(f"model.num_heads={model['num_heads']}: does not divide model.width={model['width']}")
    if "num_kv_heads" in model and model["num_heads"] % model["num_kv_heads"]:
        problems.append(f"model.num_kv_heads={model['num_kv_heads']}: does not divide {model['num_heads']} heads")
    if trainer["max_steps"] == -1 and trainer["max_epochs"] in (-1, None):
        problems.append("trainer.max_steps=-1: schedules need an end; set trainer.max_steps or trainer.max_epochs")
    if config["ckpt_path"] and not Path(config["ckpt_path"]).is_file():
        problems.append(f"ckpt_path={config['ckpt_path']}: no such file{_nearest_file(config['ckpt_path'])}")
    return problems + _check_teacher(task) + _check_pruning(task, spec)


def _check_method(task: Mapping[str, Any], method: Mapping[str, Any]) -> list[str]:
    tasks = _constant("method", method["component"], "tasks")
    if tasks is not None and task["component"] not in tasks:
        return [f"task={task['name']}: method={method['name']} searches for task={' or '.join(tasks)} only"]
    if _constant("task", task["component"], "permutes") == "nothing" and method["component"] != "fixed":
        return [f"method={method['name']}: task={task['name']} has no place for it; nearest valid choice: fixed"]
    return []


def _constant(group: str, component: str, name: str) -> Any:
    """A literal class constant of a component, without importing it."""
    return class_constant(component_path(group, component), class_name(component), name)


def _check_pruning(task: Mapping[str, Any], spec: DataSpec) -> list[str]:
    problems = []
    if "dense" not in task:
        return []
    if task["n"] >= task["m"]:
        problems.append(f"task.n={task['n']}: keeps all of every task.m={task['m']}; expected less")
    length = task["sequence_length"]
    if length is not None and spec.kind == "text" and length > spec.width:
        problems.append(f"task.sequence_length={length}: exceeds data.sequence_length={spec.width}")
    dense = task["dense"]
    if dense is not None and not Path(dense, "config.yaml").is_file():
        problems.append(f"task.dense={dense}: not a run directory (no config.yaml)")
    elif dense is not None and not Path(dense, "checkpoints", "best.ckpt").is_file():
        problems.append(f"task.dense={dense}: no checkpoints/best.ckpt; the run has not validated yet")
    return problems


def _check_kind(
    group: str, settings: Mapping[str, Any], constant: str, spec: DataSpec, config: Mapping[str, Any]
) -> list[str]:
    component = settings["component"]
    kinds = _constant(group, component, constant) or ("image",)
    if spec.kind in kinds:
        return []
    data = config["data"]["name"]
    able = [name for name in component_names("data") if _kind_of(name) in kinds]
    return [
        f"{group}={settings['name']}: {constant} {' or '.join(kinds)} data, but data={data} is {spec.kind}"
        f"{nearest(data, able)}"
    ]


def _kind_of(data: str) -> str:
    import yaml

    settings = yaml.safe_load((CONF / "data" / f"{data}.yaml").read_text())
    parents = [parent for parent in settings.get("defaults", []) if parent != "_self_"]
    if "component" not in settings and parents:
        return _kind_of(parents[0])
    component = settings.get("component", data)
    return _constant("data", component, "kind") or "image"


def _check_order(order: Any, num_items: int | None) -> list[str]:
    if isinstance(order, list):
        expected = list(range(num_items if num_items is not None else len(order)))
        return (
            [] if sorted(order) == expected else [f"method.order={order}: not a permutation of {len(expected)} items"]
        )
    if order.endswith(".npz"):
        return [] if Path(order).is_file() else [f"method.order={order}: no such file{_nearest_file(order)}"]
    try:
        check_name(order)
    except ValueError as error:
        return [f"method.order={order}: {error}"]
    return []


def _check_temperature(method: Mapping[str, Any]) -> list[str]:
    try:
        parse(method.get("temperature", 1.0))
    except ValueError as error:
        return [f"method.temperature={method['temperature']}: {error}"]
    return []


def _check_teacher(task: Mapping[str, Any]) -> list[str]:
    if "teacher" not in task:
        return []
    teacher = task["teacher"]
    if teacher is None:
        weights = [key for key in ("distill_weight", "feature_weight") if task.get(key)]
        return [f"task.{key}={task[key]}: needs task.teacher" for key in weights]
    if teacher.startswith("timm/") or Path(teacher, "config.yaml").is_file():
        return []
    return [f"task.teacher={teacher}: neither a run directory with a config.yaml nor timm/<model name>"]


def _nearest_file(path: str) -> str:
    folder = Path(path).parent
    names = [str(file) for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    return nearest(path, names) if names else ""


# Derived values and the run directory


def derive(config: dict[str, Any]) -> None:
    """Fill in what follows from other keys, so that a saved configuration is complete."""
    spec = data_spec(config["data"])
    if "patch_size" in config["model"] and (config["model"]["patch_size"] is None or spec.kind == "text"):
        config["model"]["patch_size"] = spec.patch_size
    trainer, task = config["trainer"], config["task"]
    if trainer["val_check_interval"] is None:
        # About twenty validations, and for a very short run just one, at its end.
        steps = trainer["max_steps"] * trainer["accumulate_grad_batches"]
        trainer["val_check_interval"] = max(steps // 20, min(steps, 20)) if steps > 0 else 1.0
    if "control" in task and config["method"]["component"] == "fixed":
        task["control"] = False  # a fixed order is its own control


def digest(config: Mapping[str, Any]) -> str:
    """Eight hex digits of what the run computes: the configuration without seed and machine keys."""
    reduced = copy.deepcopy(dict(config))
    # A named dataset is the same wherever it lies; a folder of one's own is known by its place alone.
    own = config["data"]["component"] in ("image_folder", "hub_text")
    keys = MACHINE_KEYS if own else (*MACHINE_KEYS, "data.root")
    for dotted in keys:
        *parents, key = dotted.split(".")
        node = reduced
        for parent in parents:
            node = node[parent]
        node.pop(key, None)
    return hashlib.sha256(json.dumps(reduced, sort_keys=True).encode()).hexdigest()[:8]


def run_directory(config: Mapping[str, Any]) -> Path:
    """`<paths.runs>/<task>/<data>-<model>-<method>/seed=<seed>-<hash8>`: never a function of the clock."""
    names = "-".join(config[group]["name"].replace("/", "_") for group in ("data", "model", "method"))
    name = config["task"]["name"].replace("/", "_")
    return Path(config["paths"]["runs"], name, names, f"seed={config['seed']}-{digest(config)}")
