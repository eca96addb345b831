"""Other runs that a run needs before it, or is compared with beside it: from what a task says to their plans."""

import copy
import fcntl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from permlab.config.check import plan_of
from permlab.config.compose import compose_config
from permlab.config.plan import Plan
from permlab.errors import ConfigError
from permlab.figure.draw import draw_all
from permlab.record.pulse import duration, say
from permlab.record.rundir import is_done, is_rank_zero, write_json, write_npz
from permlab.record.stored import BESIDE, read_curve
from permlab.task.task import Companion


def companion_plan(plan: Plan, companion: Companion) -> Plan:
    """Plan of another run: composed from words, joined with the keys it takes over, and changed.

    A run for debugging has such companions, none of them longer than its preset says; that it is repeated or
    profiled holds for itself alone.
    """
    debug = (f"debug={plan.config['debug']}",) if plan.config.get("debug") else ()
    config = copy.deepcopy(_composed((*companion.words, *debug))) if companion.words else {}
    shortest = config["trainer"]["max_steps"] if config and debug else None
    for dotted in companion.take:
        if _has(plan.config, dotted):
            _put(config, dotted, copy.deepcopy(_get(plan.config, dotted)))
    for dotted, value in companion.change.items():
        _put(config, dotted, value)
    if shortest is not None and (shortest == -1 or shortest < config["trainer"]["max_steps"]):
        config["trainer"]["max_steps"] = shortest
    for dotted, value in {"force": False, "trainer.profiler": None}.items():
        _put(config, dotted, value)
    return plan_of(config)


@cache
def _composed(words: tuple[str, ...]) -> dict[str, Any]:
    """Once for all that ask: the files of the configuration do not change under a run.

    It is checked when it is whole: a data set's files are where the keys say that are taken over.

    Raises:
        ConfigError: if a choice does not exist.
    """
    config, problems = compose_config("train", words)
    if problems:
        raise ConfigError(problems)
    return config


def companion_directory(plan: Plan, companion: Companion) -> Path:
    return companion.run or companion_plan(plan, companion).directory


def keep_beside(plan: Plan, beside: Mapping[str, Plan], summary: Mapping[str, float]) -> None:
    """Keep the curves of finished runs in the directory of the one they are compared with, and draw the comparison."""
    if not beside or not is_rank_zero():
        return
    key = plan.task.metric.validation_key
    write_npz(plan.directory / BESIDE, **{name: read_curve(other.directory, key) for name, other in beside.items()})
    write_json(plan.directory / "summary.json", summary)
    if plan.config["figures"]:
        draw_all(plan.directory, ["comparison"])


def _has(config: Mapping[str, Any], dotted: str) -> bool:
    group, _, key = dotted.partition(".")
    return group in config and (not key or key in config[group])


def _get(config: Mapping[str, Any], dotted: str) -> Any:
    group, _, key = dotted.partition(".")
    return config[group][key] if key else config[group]


def _put(config: dict[str, Any], dotted: str, value: Any) -> None:
    group, _, key = dotted.partition(".")
    if key:
        config[group][key] = value
    else:
        config[group] = value


@contextmanager
def shared(directory: Path, label: str) -> Iterator[None]:
    """Of several runs that need this one, one trains it while the others wait.

    Args:
        label: what is announced, with whether the run is found or trained, and then how long that took; empty for
            nothing.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{directory.name}.lock").open("w") as lock:
        if is_rank_zero():
            fcntl.flock(lock, fcntl.LOCK_EX)
        found, began = is_done(directory), time.monotonic()
        if label:
            say(f"{label}: {'found' if found else 'trained once'}, {directory}")
        yield
        if label and not found:
            say(f"{label}: trained in {duration(time.monotonic() - began)}")
