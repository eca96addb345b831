"""From command-line words to a plain configuration, by Hydra's composition.

Every override that changes a key is forced, so that unknown keys, wrong types and wrong choices
all reach our validation and are reported together, with the nearest valid choice.
"""

from collections.abc import Sequence
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from permlab.config import prepare
from permlab.errors import ConfigError
from permlab.schema import CONF, component_names, nearest

# Keys whose values are paths or names that Hydra's grammar would need quoted: `run=a/seed=0-12`, `random(3)`.
VERBATIM_KEYS = (
    *("run", "export", "ckpt_path", "paths.runs", "paths.data", "data.root", "data.tokenizer"),
    *("task.teacher", "task.dense", "method.order", "model.pretrained"),
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
    if key.lstrip("+") in VERBATIM_KEYS and any(mark in value for mark in "=() ") and value[0] not in "'\"[":
        return f"{key}='{value}'" if "'" not in value else word
    return word


def resolve_train(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Complete, validated configuration of one training, and warnings about settings without effect.

    Raises:
        ConfigError: with every problem found.
    """
    composed, problems = compose_config("train", words)
    try:
        config, warnings = prepare(composed, [*_keys(words), *_keys_of_experiments(words)])
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return config, warnings


def compose_config(name: str, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Plain configuration from Hydra, and the choices that had to be left out because they do not exist."""
    problems, usable = [], []
    for override in parse_overrides(words):
        problem = _check_override(override)
        if problem:
            problems.append(problem)
        else:
            usable.append(_forced(override, name))
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(name, overrides=usable, return_hydra_config=True)
            chosen = {str(k): v for k, v in config.hydra.runtime.choices.items()}
            OmegaConf.set_readonly(config, False)
            OmegaConf.set_struct(config, False)
            config.pop("hydra")
            composed = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
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
    if override.is_sweep_override():
        return f"{override.input_line}: several values need -m"
    folder = CONF / key
    if not folder.is_dir() or override.type == OverrideType.DEL:
        return None
    valid = component_names(key)
    if isinstance(value, str) and value in valid:
        return None
    return f"{key}={value}: no such choice{nearest(value, valid)}"


def _forced(override: Override, name: str) -> str:
    """The override with `++`, so that a key Hydra does not know is still composed and then reported by us."""
    line = override.input_line or ""
    if override.type == OverrideType.CHANGE and not (CONF / override.key_or_group).is_dir():
        return f"++{line}"
    return line
