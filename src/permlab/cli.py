"""The command line: compose, validate, hand over.

Nothing here imports torch until the configuration is known to be good and the run is known
not to be finished. Bad input of any kind is one line on stderr.
"""

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from permlab.compose import compose_config, parse_overrides, resolve_train
from permlab.config import run_directory
from permlab.errors import ConfigError, Interrupted, RunError
from permlab.schema import CONF, component_names, nearest
from permlab.secret import redact

# Of a multirun; more are a slip of the pen.
MAX_JOBS = 10_000
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
    except (RunError, Interrupted) as error:
        if os.environ.get("PERMLAB_DEBUG") == "1":
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        # Of a file or folder of the run: full, read-only, gone, or something else in its place.
        if error.filename is None or os.environ.get("PERMLAB_DEBUG") == "1":
            raise
        print(redact(f"error: {error.filename2 or error.filename}: {error.strerror}"), file=sys.stderr)
        return RunError.exit_code
    except RuntimeError as error:
        # torch raises this wherever the main thread happens to be when a worker process is gone.
        if "DataLoader worker" not in str(error) or os.environ.get("PERMLAB_DEBUG") == "1":
            raise
        from permlab.data.loader import worker_died

        print(f"error: {worker_died(error)}", file=sys.stderr)
        return RunError.exit_code
    except KeyboardInterrupt:
        print("error: interrupted by signal 2", file=sys.stderr)
        return 130


def _one_line(error: BaseException) -> str:
    return redact(" ".join(str(error).split()))


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
        print(redact(f"warning: {warning}"), file=sys.stderr)
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


def expand(words: Sequence[str]) -> list[list[str]]:
    """Jobs of a multirun: the Cartesian product of every swept key, the last one varying fastest.

    Raises:
        ConfigError: if there are more than `MAX_JOBS`, or a sweep cannot be expanded.
    """
    axes, num_jobs = [], 1
    for override in parse_overrides(words):
        key = override.input_line.split("=", 1)[0] if override.input_line else override.key_or_group
        if override.is_sweep_override():
            axes.append([f"{key}={value}" for value in _sweep_values(override)])
        else:
            axes.append([override.input_line or ""])
        num_jobs *= len(axes[-1])
        if num_jobs > MAX_JOBS:
            raise ConfigError(f"{override.input_line}: more than {MAX_JOBS} jobs")
    if num_jobs == 0:
        raise ConfigError("-m: a sweep over no values has no jobs")
    return [list(job) for job in itertools.product(*axes)]


def _sweep_values(override: Override) -> list[str]:
    """Values of a swept key, one more than `MAX_JOBS` at most."""
    try:
        value = override.value()
        if isinstance(value, RangeSweep):  # which may be longer than memory
            assert value.start is not None
            assert value.stop is not None
            steps = (float(value.stop) - float(value.start)) / float(value.step)
            if not steps <= MAX_JOBS:
                raise ConfigError(f"{override.input_line}: more than {MAX_JOBS} jobs")
        return list(itertools.islice(override.sweep_string_iterator(), MAX_JOBS + 1))
    except (HydraException, ValueError, ArithmeticError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{override.input_line}: cannot be swept, {reason}") from error


def resolve(name: str, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Complete, validated configuration of one run, and warnings about settings without effect.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        if name == "train":
            return resolve_train(words)
        composed, problems = compose_config(name, words)
        if problems:
            raise ConfigError(problems)
        return _check_eval(composed), []
    except OSError as error:  # of a path that cannot even be asked for: too long, or not allowed
        raise ConfigError(f"{error.filename}: {error.strerror}") from error


def _check_eval(config: dict[str, Any]) -> dict[str, Any]:
    valid = ("run", "split", "upload", "export", "sparse")
    problems = [f"{key}={config[key]}: unknown key{nearest(key, [*valid])}" for key in config if key not in valid]
    run, split, upload, export, sparse = (config.get(key) for key in valid)
    if run == "???":
        problems.append("run: missing, expected a run directory")
    elif not Path(str(run), "config.yaml").is_file():
        problems.append(f"run={run}: not a run directory (no config.yaml){_nearest_run(str(run))}")
    elif not Path(str(run), "checkpoints", "best.ckpt").is_file():
        problems.append(f"run={run}: no checkpoints/best.ckpt; the run has not validated yet")
    if split not in ("val", "test"):
        problems.append(f"split={split}: expected val or test{nearest(split, ['val', 'test'])}")
    for key, value in (("upload", upload), ("sparse", sparse)):
        if not isinstance(value, bool):
            problems.append(f"{key}={value}: expected true or false")
    if sparse is True and export is None:
        problems.append("sparse=true: needs export=<folder>")
    if export is not None and Path(str(export)).exists() and (not Path(export).is_dir() or any(Path(export).iterdir())):
        problems.append(f"export={export}: exists and is not an empty folder; nothing is written over")
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
