"""Other runs that a run needs before it, or is compared with beside it: from what a task says to their plans."""

import copy
import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from permlab.config.check import plan_of
from permlab.config.compose import resolve_train
from permlab.config.plan import Plan
from permlab.record.rundir import is_done, is_rank_zero
from permlab.task.task import Companion


def companion_plan(plan: Plan, companion: Companion) -> Plan:
    """Plan of another run: composed from words, joined with the keys it takes over, and changed.

    A run for debugging has such companions; that it is repeated or profiled holds for itself alone.
    """
    debug = [f"debug={plan.config['debug']}"] if plan.config.get("debug") else []
    config = dict(copy.deepcopy(resolve_train([*companion.words, *debug])[0].config)) if companion.words else {}
    for dotted in companion.take:
        if _has(plan.config, dotted):
            _put(config, dotted, copy.deepcopy(_get(plan.config, dotted)))
    for dotted, value in companion.change.items():
        _put(config, dotted, value)
    for dotted, value in {"force": False, "trainer.profiler": None}.items():
        _put(config, dotted, value)
    return plan_of(config)


def companion_directory(plan: Plan, companion: Companion) -> Path:
    return companion.run or companion_plan(plan, companion).directory


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
        label: what is announced, with whether the run is found or trained; empty for nothing.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{directory.name}.lock").open("w") as lock:
        if is_rank_zero():
            fcntl.flock(lock, fcntl.LOCK_EX)
            if label:
                print(f"{label}: {'found' if is_done(directory) else 'trained once'}, {directory}", flush=True)
        yield
