"""From command-line words to a plain configuration, by Hydra's composition.

Every override that changes a key is forced, so that unknown keys, wrong types and wrong choices
all reach our validation and are reported together, with the nearest valid choice.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from permlab.config.check import checked
from permlab.config.evaluation import check_evaluation
from permlab.config.plan import Plan
from permlab.config.schema import CONF, component_names, constant, is_component, missing, verbatim_keys
from permlab.errors import ConfigError, nearest

# Groups of which nothing need be chosen.
OPTIONAL_GROUPS = ("debug", "experiment", "tuned")
# What to use instead of a key of Hydra's that begins so, without its `hydra`.
IN_PLACE_OF_HYDRA = (
    ((".run", ".sweep.", "/output"), "runs lie below paths.runs={value}"),
    (
        ("/launcher", ".launcher"),
        "-m runs its jobs one by one, each in a process of its own; python -m permlab.sweep runs --processes at a time",
    ),
    (
        ("/sweeper", ".sweeper"),
        "-m runs every combination of comma-separated values; python -m permlab.sweep runs a grid of sweeps/",
    ),
    ((".mode",), "-m runs every combination of comma-separated values"),
    (("/job_logging", "/hydra_logging", ".job_logging", ".verbose"), "PERMLAB_DEBUG=1 shows the traceback of an error"),
    (("/help", ".help"), "--help has every choice"),
)


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Hydra's parse of each override; all that cannot be read are reported together."""
    overrides, problems = [], []
    for word in words:
        try:
            overrides += OverridesParser.create().parse_overrides([_quote(word)])
        except HydraException as error:
            reason = "expected key=value" if "=" not in word else str(error).splitlines()[0]
            problems.append(f"{word}: cannot be read as an override, {reason}")
    if problems:
        raise ConfigError(problems)
    return overrides


def _quote(word: str) -> str:
    key, _, value = word.partition("=")
    # Paths and names that Hydra's grammar would need quoted: `run=a/seed=0-12`, `random(3)`.
    if any(mark in value for mark in "=() ") and value[0] not in "'\"[" and key.lstrip("+") in verbatim_keys():
        return f"{key}='{value}'" if "'" not in value else word
    return word


def resolve_train(words: Sequence[str]) -> tuple[Plan, list[str]]:
    """Plan of one training, and warnings about settings without effect.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        composed, problems = compose_config("train", words)
        try:
            plan, warnings = checked(composed, [*_keys(words), *_keys_of_experiments(words)])
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
    except OSError as error:  # of a path that cannot even be asked for: too long, or not allowed
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    if problems:
        raise ConfigError(problems)
    return plan, warnings


def resolve_evaluation(words: Sequence[str]) -> Mapping[str, Any]:
    """Checked configuration of one evaluation.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        composed, problems = compose_config("eval", words)
        if problems:
            raise ConfigError(problems)
        return check_evaluation(composed)
    except OSError as error:  # of a path that cannot even be asked for: too long, or not allowed
        raise ConfigError(f"{error.filename}: {error.strerror}") from error


def resolve(name: str, words: Sequence[str]) -> Any:
    """What `train.py` (a plan) or `eval.py` (a configuration) is asked for.

    Raises:
        ConfigError: with every problem found.
    """
    return resolve_train(words)[0] if name == "train" else resolve_evaluation(words)


def compose_config(name: str, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Plain configuration from Hydra, and the choices that had to be left out because they do not exist."""
    problems, usable = [], []
    chosen_by: dict[str, Override] = {}  # the first word that makes a group's choice
    for override in parse_overrides(words):
        if override.key_or_group in OPTIONAL_GROUPS and override.value() is None:
            continue
        problem = _check_override(override) or _check_once(override, chosen_by)
        if problem:
            problems.append(problem)
        else:
            usable.append(_forced(override))
    try:
        composed, chosen = _compose(name, usable)
    except (
        Exception
    ) as error:  # besides Hydra's and OmegaConf's own, whatever a broken file or a wild override sets off
        reason = (str(error).splitlines() or [""])[0]
        known = isinstance(error, (HydraException, OmegaConfBaseException))
        raise ConfigError([*problems, reason if known and reason else f"{type(error).__name__}: {reason}"]) from error
    if not isinstance(composed, dict):
        raise ConfigError([*problems, f"{name}.yaml: holds no keys"])
    for group, choice in chosen.items():
        if isinstance(composed.get(group), dict):
            named = (
                {"name": choice} if group in ("optim", "trainer", "logger") else {"name": choice, "component": choice}
            )
            composed[group] = named | composed[group]
    return {str(key): value for key, value in composed.items()}, problems


def preset(group: str, choice: str) -> dict[str, Any]:
    """Values of one choice of a group, joined with those it is based on, its name and its component among them."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = OmegaConf.to_container(
            compose(overrides=[f"+{group}={choice}", "+paths.data=data"])[group], resolve=True
        )
    assert isinstance(values, dict)
    return {"name": choice, "component": choice} | {str(key): value for key, value in values.items()}


def _compose(name: str, overrides: list[str]) -> tuple[Any, dict[str, Any]]:
    """What Hydra composes, and the choice made in every group."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(name, overrides=overrides, return_hydra_config=True)
        chosen = {str(group): choice for group, choice in config.hydra.runtime.choices.items()}
        shared = _shared_tuning(chosen, OmegaConf.select(config, "method.component") or chosen.get("method"))
        if shared is not None:
            config = compose(name, overrides=[f"tuned={shared}", *overrides], return_hydra_config=True)
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=False), chosen


def _shared_tuning(chosen: dict[str, Any], component: Any) -> str | None:
    """File of `tuned/` that a method's class names by `tuned_as`, where the preset has none of its own."""
    names = component_names("tuned")
    if chosen.get("tuned") != f"{chosen.get('task')}_{chosen.get('method')}" or chosen["tuned"] in names:
        return None
    if not is_component("method", component):
        return None
    stem = f"{chosen['task']}_{constant('method', component, 'tuned_as')}"
    return stem if stem in names else None


def _keys(words: Sequence[str]) -> list[str]:
    """Dotted keys that these words set, those of a mapping or of a schedule's points by the option's own."""
    keys = [word.partition("=")[0].lstrip("+~") for word in words]
    return [".".join(key.split(".")[:2]) for key in keys]


def _keys_of_experiments(words: Sequence[str]) -> list[str]:
    """Dotted keys that the chosen experiments write out themselves, which are files for one purpose."""
    keys = []
    for override in parse_overrides(words):
        path = CONF / "experiment" / f"{override.value()}.yaml"
        if override.key_or_group == "experiment" and path.is_file():
            for group, settings in (yaml.safe_load(path.read_text()) or {}).items():
                keys += [f"{group}.{key}" for key in settings] if isinstance(settings, dict) else [group]
    return keys


def _check_override(override: Override) -> str | None:
    key, value = override.key_or_group, override.value()
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return f"{override.input_line}: Hydra's own settings are not used; {_in_place_of_hydra(key, value)}"
    if override.is_sweep_override():
        return f"{override.input_line}: several values need -m"
    if not _is_group(key) or override.type == OverrideType.DEL:
        return None
    valid = component_names(key)
    if isinstance(value, str) and value in valid:
        return None
    reason = missing(key, value)
    return f"{key}={value}: {reason}" if reason else f"{key}={value}: no such choice{nearest(value, valid)}"


def _in_place_of_hydra(key: str, value: Any) -> str:
    """What does here what people set that key of Hydra's for."""
    for beginnings, answer in IN_PLACE_OF_HYDRA:
        if key.removeprefix("hydra").startswith(beginnings):
            return answer.format(value=value)
    return "--help says what is"


def _check_once(override: Override, chosen_by: dict[str, Override]) -> str | None:
    """Of two choices in one group the last would win without a word."""
    if not _is_group(override.key_or_group):
        return None
    first = chosen_by.setdefault(override.key_or_group, override)
    both = f"-m {first.key_or_group}={first.value()},{override.value()} runs both"
    return None if first is override else f"{override.input_line}: there is {first.input_line} before it; {both}"


def _is_group(key: str) -> bool:
    return (CONF / key).is_dir()


def _forced(override: Override) -> str:
    """The override with `++`, so that a key Hydra does not know is still composed and then reported by us.

    Whoever writes a plus himself, as Hydra wants it for keys that no file has, means the same; in front of a
    group, each of which has its place here, it means nothing.
    """
    line = override.input_line or ""
    if override.type == OverrideType.DEL:
        return line
    return line.lstrip("+") if _is_group(override.key_or_group) else f"++{line.lstrip('+')}"
