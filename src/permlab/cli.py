"""The command line: compose, validate, hand over.

Nothing here imports torch until the configuration is known to be good and the run is known
not to be finished. Composition is Hydra's; every override that changes a key is forced, so
that unknown keys, wrong types and wrong choices all reach our validation and are reported
together, in one line, with the nearest valid choice.
"""

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from permlab.config import CONF, component_names, nearest, prepare, run_directory
from permlab.errors import ConfigError, RunError

# Keys whose values are paths or names that Hydra's grammar would need quoted: `run=a/seed=0-12`, `random(3)`.
VERBATIM_KEYS = ("run", "ckpt_path", "paths.runs", "paths.data", "data.root", "task.teacher", "method.order")
HYDRA_FLAGS = ("--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc")
OWN_FLAGS = ("--help", "-h", "--cfg", "-c", "--resolve", "--package", "-p", "--multirun", "-m")


@dataclass
class Arguments:
    """A command line split into flags and overrides."""

    overrides: list[str] = field(default_factory=list)
    flags: dict[str, str | bool] = field(default_factory=dict)


def main(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run `train` or `eval` with these arguments (default: the process's own); returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch(name, list(arguments))
    except RunError as error:
        if os.environ.get("PERMLAB_DEBUG") == "1":
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted by signal 2", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _dispatch(name: str, arguments: list[str]) -> int:
    if any(argument.split("=")[0] in HYDRA_FLAGS for argument in arguments):
        return _hand_to_hydra(name)
    parsed = split_arguments(arguments)
    if "--help" in parsed.flags:
        print(help_text(name))
        return 0
    if "--cfg" in parsed.flags:
        return _print_config(name, parsed)
    if "--multirun" in parsed.flags:
        from permlab.multirun import multirun

        return multirun(name, expand(parsed.overrides))
    config, warnings = resolve(name, parsed.overrides)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return _commands()[name](config)


def _commands() -> dict[str, Callable[[dict[str, Any]], int]]:
    def train(config: dict[str, Any]) -> int:
        from permlab.report import print_report
        from permlab.rundir import is_done, read_summary

        run_dir = run_directory(config)
        if is_done(run_dir) and not config["force"]:
            print("this run is finished; force=true repeats it")
            print_report(config, read_summary(run_dir))
            return 0
        from permlab.run import train

        train(config)
        return 0

    def evaluate(config: dict[str, Any]) -> int:
        from permlab.run import evaluate

        evaluate(config)
        return 0

    return {"train": train, "eval": evaluate}


# Arguments and overrides


def split_arguments(arguments: Sequence[str]) -> Arguments:
    """Separate flags from overrides.

    Raises:
        ConfigError: for a flag that does not exist or lacks its value.
    """
    parsed = Arguments()
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            parsed.overrides.append(word)
            continue
        flag, _, value = word.partition("=")
        if flag not in OWN_FLAGS:
            raise ConfigError(f"{flag}: unknown flag{nearest(flag, [*OWN_FLAGS, *HYDRA_FLAGS])}")
        long = {"-h": "--help", "-c": "--cfg", "-p": "--package", "-m": "--multirun"}.get(flag, flag)
        if long in ("--cfg", "--package"):
            value = value or next(words, "")
            if not value:
                raise ConfigError(f"{long}: needs a value{'; valid choice: job' if long == '--cfg' else ''}")
        parsed.flags[long] = value or True
    return parsed


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


def expand(words: Sequence[str]) -> list[list[str]]:
    """Jobs of a multirun: the Cartesian product of every swept key, the last one varying fastest."""
    axes = []
    for override in parse_overrides(words):
        key = override.input_line.split("=", 1)[0] if override.input_line else override.key_or_group
        if override.is_sweep_override():
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([override.input_line or ""])
    return [list(job) for job in itertools.product(*axes)]


def resolve(name: str, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Complete, validated configuration of one run, and warnings about settings without effect.

    Raises:
        ConfigError: with every problem found.
    """
    composed, problems = compose_config(name, words)
    if name == "eval":
        if problems:
            raise ConfigError(problems)
        return _check_eval(composed), []
    try:
        config, warnings = prepare(composed)
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
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([*problems, str(error).splitlines()[0]]) from error
    assert isinstance(composed, dict)
    for group, choice in chosen.items():
        if isinstance(composed.get(group), dict):
            named = (
                {"name": choice} if group in ("optim", "trainer", "logger") else {"name": choice, "component": choice}
            )
            composed[group] = named | composed[group]
    return {str(key): value for key, value in composed.items()}, problems


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


def _check_eval(config: dict[str, Any]) -> dict[str, Any]:
    valid = ("run", "split", "upload")
    problems = [f"{key}={config[key]}: unknown key{nearest(key, [*valid])}" for key in config if key not in valid]
    run, split, upload = (config.get(key) for key in valid)
    if run == "???":
        problems.append("run: missing, expected a run directory")
    elif not Path(str(run), "config.yaml").is_file():
        problems.append(f"run={run}: not a run directory (no config.yaml){_nearest_run(str(run))}")
    elif not Path(str(run), "checkpoints", "best.ckpt").is_file():
        problems.append(f"run={run}: no checkpoints/best.ckpt; the run has not validated yet")
    if split not in ("val", "test"):
        problems.append(f"split={split}: expected val or test{nearest(split, ['val', 'test'])}")
    if not isinstance(upload, bool):
        problems.append(f"upload={upload}: expected true or false")
    if problems:
        raise ConfigError(problems)
    return config


def _nearest_run(run: str) -> str:
    parent = Path(run).parent
    runs = [str(path.parent) for path in parent.glob("*/config.yaml")] if parent.is_dir() else []
    return nearest(run, runs) if runs else ""


# Information


def help_text(name: str) -> str:
    """Groups and their choices, one line each, from the first line of every YAML file."""
    lines = [
        f"usage: python {name}.py [-m] [group=choice ...] [key=value ...]",
        "",
        _first_comment(CONF / f"{name}.yaml"),
    ]
    if name == "train":
        for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
            names = component_names(folder.name)
            if names:
                width = max(map(len, names))
                lines += ["", f"{folder.name}="]
                lines += [f"  {choice:<{width}}  {_first_comment(folder / f'{choice}.yaml')}" for choice in names]
    lines += [
        "",
        "-m, --multirun     run every combination of comma-separated values, each in a process of its own",
        "--cfg job          print the resolved configuration and stop",
        '-sc install=bash   print shell completion:  eval "$(python train.py -sc install=bash)"',
        "PERMLAB_DEBUG=1    show the traceback of an error",
    ]
    return "\n".join(lines)


def _first_comment(path: Path) -> str:
    """The first comment line that is no package directive of Hydra's, which has to come first."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("# @"))
    first = next(lines, "")
    return first.lstrip("# ") if first.startswith("#") else ""


def _print_config(name: str, parsed: Arguments) -> int:
    if parsed.flags["--cfg"] != "job":
        raise ConfigError(f"--cfg {parsed.flags['--cfg']}: expected job (Hydra's own settings are not used)")
    config: Any = resolve(name, parsed.overrides)[0]
    for key in str(parsed.flags.get("--package", "")).split(".") if "--package" in parsed.flags else []:
        if not isinstance(config, dict) or key not in config:
            raise ConfigError(f"--package {parsed.flags['--package']}: no such part of the configuration")
        config = config[key]
    print(OmegaConf.to_yaml(OmegaConf.create(config)) if isinstance(config, dict) else config, end="")
    return 0


def _hand_to_hydra(name: str) -> int:
    """Version, completion and the like are Hydra's own; it reads sys.argv."""
    import hydra

    @hydra.main(config_path=str(CONF), config_name=name, version_base="1.3")
    def nothing(_: Any) -> None: ...

    nothing()
    return 0
