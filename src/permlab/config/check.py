"""Validation: every problem of a configuration, each naming key, value and nearest valid choice.

It loops over the owners of rules: a group's keys over their types, an option over its marks, and what
involves several groups over the task. The keys are in `permlab.config.schema`.
"""

import copy
import difflib
import glob
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from permlab.config.checkpoint import derived, disagreements
from permlab.config.effect import idle_settings
from permlab.config.plan import Plan, make_plan
from permlab.config.schema import (
    COMPONENT_GROUPS,
    GROUPS,
    OWN_TRAINER_KEYS,
    SECTIONS,
    check_component,
    component_names,
    component_options,
    components,
    constant,
    is_component,
    preset_component,
    schema,
)
from permlab.config.secret import leaks
from permlab.config.suggest import nearest_key
from permlab.errors import ConfigError, nearest
from permlab.ops.scan_order import COMPRESSIBLE, check_name
from permlab.ops.schedule import parse
from permlab.option import REQUIRED, ItemSide, OrderForm, Rule, TemperatureForm, choices, describe, matches

# Folders above a missing file that are looked into for another, and files that are compared with it.
MAX_CLIMB, MAX_NEAR = 3, 1000
# By which `hydra.utils.instantiate`, which is not used here, would be told what to call.
INSTANTIATE_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


def checked(composed: Mapping[str, Any], given: Iterable[str] = ()) -> tuple[Plan, list[str]]:
    """Plan of a run and warnings, from what Hydra composed.

    Args:
        given: dotted keys that the user named, each of which is warned of where it has no effect.
    Raises:
        ConfigError: with every problem of the configuration.
    """
    config = copy.deepcopy(dict(composed))
    warnings = drop_ineffective(config)
    plan = plan_of(config)
    return plan, warnings + idle_settings(plan, config, given)


def plan_of(config: Mapping[str, Any], directory: Path | None = None) -> Plan:
    """Plan of a configuration that may hold anything.

    Args:
        directory: where the run lies already; None for where its configuration puts it.
    Raises:
        ConfigError: with every problem of the configuration.
    """
    problems = _check_single(config)
    if problems:
        raise ConfigError(problems)
    try:
        plan = make_plan(config, directory)
        problems = _check_across(plan)
    except OSError as error:  # of a path that cannot even be asked for: too long, or not allowed
        raise ConfigError(f"{str(error.filename)[:80]}: {error.strerror}") from error
    if problems:
        raise ConfigError(problems)
    return plan


def check_settings(group: str, settings: Mapping[str, Any]) -> None:
    """Refuse what is wrong with the settings of one component by themselves.

    Raises:
        ConfigError: with every problem found.
    """
    problems = _check_group(group, settings, {group: settings}) or [
        *_check_forms(group, settings, None, has_patches=True),
        *_check_rules(group, settings),
    ]
    if problems:
        raise ConfigError(problems)


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


def _check_single(config: Mapping[str, Any]) -> list[str]:
    """Problems of every key by itself, as `key=value: what is wrong; nearest valid choice`."""
    problems = _check_safety(config)
    for group in ("", *SECTIONS, *GROUPS):
        settings = config if group == "" else config.get(group)
        if not isinstance(settings, Mapping):
            problems.append(f"{group}={settings}: expected a group of keys")
            continue
        try:
            problems += _check_group(group, settings, config)
        except ConfigError as error:
            problems += error.problems
    return problems


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


def _check_group(group: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
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
            owned = OWN_TRAINER_KEYS.get(key) if group == "trainer" else None
            problems.append(f"{dotted}{key}={value}: {owned or 'unknown key' + nearest_key(group, key, config)}")
        elif value == "???":
            problems.append(f"{dotted}{key}: missing, expected {describe(known[key].type)}")
        elif not matches(value, known[key].type) and not _derived_later(group, key, settings):
            hint = nearest(value, choices(known[key].type)) if isinstance(value, str) else ""
            problems.append(f"{dotted}{key}={value}: expected {describe(known[key].type)}{hint}")
    missing = [key for key, option in known.items() if key not in settings and option.default is REQUIRED]
    return problems + [f"{dotted}{key}: missing, expected {describe(known[key].type)}" for key in missing]


def _is_choice(group: str, name: Any) -> bool:
    """Whether a name is one of the group's: it becomes part of the run directory's path."""
    return isinstance(name, str) and name in component_names(group)


def _derived_later(group: str, key: str, settings: Mapping[str, Any]) -> bool:
    """Whether null stands for what the data or a checkpoint will say, or the data set's `complete`."""
    if settings[key] is not None or group not in ("model", "data"):
        return False
    if group == "data":
        return key in (constant("data", settings["component"], "leaves_open") or ())
    return key == "patch_size" or key in derived(settings["component"])


# Rules between keys, called once every single key is right


def _check_across(plan: Plan) -> list[str]:
    config = plan.config
    problems = _check_kinds(plan)
    num_items = None
    try:
        num_items = count_items(plan)
    except ValueError as error:
        problems.append(f"model.patch_size={config['model']['patch_size']}: {error}")
    if plan.task.permutes == "weights":
        num_items = None  # each of its sites has a number of its own
    has_patches = num_items is not None and not plan.spec.is_sequence
    for group in COMPONENT_GROUPS:
        problems += _check_forms(group, config[group], num_items, has_patches)
    problems += _check_method(plan)
    for group in COMPONENT_GROUPS:
        problems += _check_rules(group, config[group])
    problems += disagreements(config, plan.spec.num_classes if "tokenizer" in config["data"] else None)
    return [*problems, *_check_trainer(config), *plan.task.problems(plan)]


def _check_kinds(plan: Plan) -> list[str]:
    """Model and task say which kinds of data they take."""
    config, problems = plan.config, []
    reads = constant("model", config["model"]["component"], "reads") or ("image",)
    for group, verb, kinds in (("model", "reads", reads), ("task", "takes", plan.task.takes)):
        if plan.spec.kind not in kinds:
            able = [name for name in component_names("data") if _kind_of(name) in kinds]
            problems.append(
                f"{group}={config[group]['name']}: {verb} {' or '.join(kinds)} data, but data={config['data']['name']} "
                f"is {plan.spec.kind}{nearest(config['data']['name'], able)}"
            )
    return problems


def _kind_of(data: str) -> str:
    return constant("data", preset_component("data", data), "kind") or "image"


def count_items(plan: Plan) -> int:
    """Items of a sample: the entries of a sequence, or the patches of an image, by the options that are their sides.

    Raises:
        ValueError: if a patch does not divide the image.
    """
    spec, model = plan.spec, plan.config["model"]
    if spec.is_sequence:
        return spec.width
    options = component_options("model", model["component"])
    first, *others = [model[key] for key, option in options.items() if option.marks(ItemSide)] or [1]
    height, width = spec.grid(first)
    for side in others:
        height, width = height // side, width // side
    return height * width


def _check_forms(group: str, settings: Mapping[str, Any], num_items: int | None, has_patches: bool) -> list[str]:
    """Orders and temperatures, whose forms are their own small languages."""
    problems = []
    for key, option in schema(group, settings["component"]).items():
        if option.marks(OrderForm) and (problem := _order_problem(settings[key], num_items, has_patches)):
            problems.append(f"{group}.{key}={settings[key]}: {problem}")
        if option.marks(TemperatureForm) and (problem := _temperature_problem(settings[key])):
            problems.append(f"{group}.{key}={settings[key]}: {problem}")
    return problems


def _order_problem(order: Any, num_items: int | None, has_patches: bool) -> str | None:
    if isinstance(order, list):
        expected = list(range(num_items if num_items is not None else len(order)))
        return None if sorted(order) == expected else f"not a permutation of {len(expected)} items"
    if order.endswith(".npz"):
        return None if Path(order).is_file() else f"no such file{_nearest_file(order)}"
    if order == COMPRESSIBLE:
        return None if has_patches else "there are no patches to compress; expected a scan order, such as row"
    try:
        check_name(order)
    except ValueError as error:
        is_near = difflib.get_close_matches(order, [COMPRESSIBLE])
        return f"unknown order {order!r}; did you mean {COMPRESSIBLE}?" if is_near else str(error)
    return None


def _temperature_problem(temperature: Any) -> str | None:
    try:
        parse(temperature)
    except ValueError as error:
        return str(error)
    return None


def _check_method(plan: Plan) -> list[str]:
    """A method says what it can permute, and a task what it permutes."""
    method, task, wanted = plan.config["method"], plan.config["task"], plan.task.permutes
    able = _permutes("method", method["component"])
    if wanted in able:
        return []
    if wanted == "nothing" and "items" in able:
        others = [name for name in components("method") if wanted in _permutes("method", name)]
        nearest_one = f"nearest valid choice: {' or '.join(others)}"
        return [f"method={method['name']}: task={task['name']} has no place for it; {nearest_one}"]
    tasks = [name for name in components("task") if set(_permutes("task", name)) & set(able)]
    return [f"task={task['name']}: method={method['name']} searches for task={' or '.join(tasks)} only"]


def _permutes(group: str, component: str) -> tuple[str, ...]:
    found = constant(group, component, "permutes") or {"method": ("items", "weights"), "task": "items"}[group]
    return (found,) if isinstance(found, str) else tuple(found)


def _check_rules(group: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Marks on the options of a component."""
    for key, option in component_options(group, settings["component"]).items():
        rules: list[Rule] = option.marks(Rule) if key in settings else []
        if settings.get(key) is None:
            continue  # what a checkpoint will say
        for problem in (rule.problem(settings[key], settings, group) for rule in rules):
            if problem:
                yield f"{group}.{key}={settings[key]}: {problem}"


def _check_trainer(config: Mapping[str, Any]) -> Iterator[str]:
    trainer, resumed = config["trainer"], config["ckpt_path"]
    if trainer["max_steps"] == -1 and trainer["max_epochs"] in (-1, None):
        yield "trainer.max_steps=-1: schedules need an end; set trainer.max_steps or trainer.max_epochs"
    if resumed and not Path(resumed).is_file():
        yield f"ckpt_path={resumed}: no such file{_nearest_file(resumed)}"


def _nearest_file(path: str) -> str:
    """The files most like one that is missing: of its kind, in its folder or near it."""
    suffix = Path(path).suffix
    folder = next((above for above in list(Path(path).parents)[:MAX_CLIMB] if above.is_dir()), None)
    if folder is None:
        return "; nor is there its folder"
    depths = ("", "*/", "*/*/") if folder != Path(folder.anchor) else ("",)
    found = (file for depth in depths for file in folder.glob(f"{depth}[!.]*{glob.escape(suffix)}"))
    names = [str(file) for file in itertools.islice(found, MAX_NEAR) if file.is_file()]
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.0)
    if not near:
        return f"; there is no {suffix or 'file'} in or below {folder}"
    return f"; nearest valid choice{'s' if len(near) > 1 else ''}: {', '.join(near)}"
