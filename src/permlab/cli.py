"""The command line: compose, validate, hand over.

Nothing here imports torch until the configuration is known to be good and the run is known
not to be finished. Bad input of any kind is one line on stderr.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from permlab.config.compose import resolve, resolve_evaluation, resolve_train
from permlab.config.machine import check_machine
from permlab.config.plan import Plan
from permlab.config.reference import overview
from permlab.config.schema import CONF, component_names
from permlab.config.secret import redact
from permlab.errors import ConfigError, Interrupted, RunError, nearest
from permlab.record.rundir import check_place, is_done, is_rank_zero, read_summary
from permlab.run.outlook import Outlook, announce_jobs

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
    except Exception as error:
        dead = _dead_worker(error)
        if dead is None or os.environ.get("PERMLAB_DEBUG") == "1":
            raise
        from permlab.data.loader import worker_died

        print(f"error: {worker_died(dead)}", file=sys.stderr)
        return RunError.exit_code
    except KeyboardInterrupt:
        print("error: interrupted by signal 2", file=sys.stderr)
        return 130


def _dead_worker(error: BaseException | None) -> RuntimeError | None:
    """What torch raises, wherever the main thread happens to be, when a worker process is gone; some code wraps it."""
    while error is not None:
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _one_line(error: BaseException) -> str:
    return redact(" ".join(str(error).split()))


def _dispatch(name: str, arguments: list[str]) -> int:
    if any(argument.split("=")[0] in HYDRA_FLAGS for argument in arguments):
        return _hand_to_hydra(name, arguments)
    parsed = split_arguments(arguments)
    if "--help" in parsed.flags:
        print(help_text(name))
        return 0
    if "--cfg" in parsed.flags:
        return _print_config(name, parsed)
    if "--multirun" in parsed.flags:
        return _multirun(name, parsed.overrides)
    if name == "eval":
        return _evaluate(resolve_evaluation(parsed.overrides))
    plan, warnings = resolve_train(parsed.overrides)
    for warning in warnings:
        print(redact(f"warning: {warning}"), file=sys.stderr)
    return _train(plan)


def _multirun(name: str, words: Sequence[str]) -> int:
    """Run every combination of swept values, one after the other, and show them in a table."""
    from permlab.study.grid import expand
    from permlab.study.jobs import resolve_jobs, run_jobs, worst_code

    jobs = expand(words)
    plans = resolve_jobs(name, jobs)
    if name == "train":
        print(announce_jobs(plans), flush=True)
    codes = run_jobs(main, name, jobs, plans)
    if name == "train" and len(codes) == len(jobs):
        from permlab.study.table import job_table

        print(job_table(jobs, plans, codes))
    return worst_code(codes)


def _train(plan: Plan) -> int:
    if plan.config["plan"]:
        return _project(plan)
    check_machine(plan.config)
    if is_done(plan.directory) and not plan.is_forced:
        from permlab.study.report import print_report

        print("this run is finished; force=true repeats it")
        print_report(plan, read_summary(plan.directory))
        return 0
    check_place(plan.directory)
    if is_rank_zero():
        print(Outlook(plan).announce(), flush=True)
    from permlab.run.story import train

    train(plan)
    return 0


def _project(plan: Plan) -> int:
    """Print what the command takes, and run nothing."""
    outlook, began = Outlook(plan), time.monotonic()
    from permlab.run.projection import project
    from permlab.run.projection_table import as_json, table

    imports = time.monotonic() - began
    show = as_json if plan.config["plan"] == "json" else table
    print(show(plan, outlook, project(outlook.trainings, imports=imports), imports))
    return 0


def _evaluate(config: Mapping[str, Any]) -> int:
    from permlab.run.evaluation import evaluate

    evaluate(config)
    return 0


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


# Information


def help_text(name: str) -> str:
    """Groups and their choices, and the general keys, one line each, from the comments of the YAML files."""
    usage = "[group=choice ...] [key=value ...]" if name == "train" else "run=<run directory> [key=value ...]"
    lines = [f"usage: python {name}.py [-m] {usage}", "", _first_comment(CONF / f"{name}.yaml")]
    if name == "train":
        for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
            choices = {choice: _first_comment(folder / f"{choice}.yaml") for choice in component_names(folder.name)}
            lines += ["", f"{folder.name}=", *_columns(choices)] if choices else []
    lines += ["", "keys:" if name == "eval" else "general keys (all keys, with their ranges: docs/options.md):"]
    lines += [
        *_columns(overview(name)),
        "",
        "-m, --multirun     run every combination of comma-separated values, each in a process of its own",
        "--cfg job          print the resolved configuration and stop",
        '-sc install=bash   print shell completion:  eval "$(python train.py -sc install=bash)"',
        "PERMLAB_DEBUG=1    show the traceback of an error",
    ]
    return "\n".join(lines)


def _columns(meanings: Mapping[str, str]) -> list[str]:
    width = max(map(len, meanings))
    return [f"  {name:<{width}}  {meaning}".rstrip() for name, meaning in meanings.items()]


def _first_comment(path: Path) -> str:
    """The first comment line that is no package directive of Hydra's, which has to come first."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("# @"))
    first = next(lines, "")
    return first.lstrip("# ") if first.startswith("#") else ""


def _print_config(name: str, parsed: Arguments) -> int:
    if parsed.flags["--cfg"] != "job":
        raise ConfigError(f"--cfg {parsed.flags['--cfg']}: expected job (Hydra's own settings are not used)")
    config: Any = resolve(name, parsed.overrides)
    config = config.config if name == "train" else config
    for key in str(parsed.flags.get("--package", "")).split(".") if "--package" in parsed.flags else []:
        if not isinstance(config, dict) or key not in config:
            raise ConfigError(f"--package {parsed.flags['--package']}: no such part of the configuration")
        config = config[key]
    print(OmegaConf.to_yaml(OmegaConf.create(config)) if isinstance(config, dict) else config, end="")
    return 0


def _hand_to_hydra(name: str, arguments: Sequence[str]) -> int:
    """Version, completion and the like are Hydra's own; it reads sys.argv."""
    import hydra

    sys.argv = [f"{name}.py", *arguments]

    @hydra.main(config_path=str(CONF), config_name=name, version_base="1.3")
    def nothing(_: Any) -> None: ...

    nothing()
    return 0
