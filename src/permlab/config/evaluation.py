"""Validation of what `eval.py` is asked for."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from permlab.config.schema import EvaluationKeys
from permlab.config.suite import harness_tasks
from permlab.errors import ConfigError, nearest


def check_evaluation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same configuration, if there is nothing wrong with it.

    Raises:
        ConfigError: with every problem found.
    """
    valid = [field.name for field in fields(EvaluationKeys)]
    problems = [f"{key}={config[key]}: unknown key{nearest(key, valid)}" for key in config if key not in valid]
    run, split, upload, figures, export, sparse, tasks, limit = (config.get(key) for key in valid)
    if run == "???":
        problems.append("run: missing, expected a run directory")
    elif not Path(str(run), "config.yaml").is_file():
        problems.append(f"run={run}: not a run directory (no config.yaml){_nearest_run(str(run))}")
    elif not Path(str(run), "checkpoints", "best.ckpt").is_file():
        problems.append(f"run={run}: no checkpoints/best.ckpt; the run has not validated yet")
    if split not in ("val", "test"):
        problems.append(f"split={split}: expected val or test{nearest(split, ['val', 'test'])}")
    for key, value in (("upload", upload), ("figures", figures), ("sparse", sparse)):
        if not isinstance(value, bool):
            problems.append(f"{key}={value}: expected true or false")
    if sparse is True and export is None:
        problems.append("sparse=true: needs export=<folder>")
    if export is not None and Path(str(export)).exists() and (not Path(export).is_dir() or any(Path(export).iterdir())):
        problems.append(f"export={export}: exists and is not an empty folder; nothing is written over")
    problems += _check_tasks(tasks, limit)
    if problems:
        raise ConfigError(problems)
    return config


def _check_tasks(tasks: Any, limit: Any) -> list[str]:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        return [f"limit={limit}: expected an integer >= 1 or null"]
    if tasks is None:
        return [] if limit is None else ["limit: needs tasks=[...]"]
    try:
        harness_tasks(tasks)
    except ValueError as error:
        return [f"tasks: {error}"]
    return []


def _nearest_run(run: str) -> str:
    parent = Path(run).parent
    runs = [str(path.parent) for path in parent.glob("*/config.yaml")] if parent.is_dir() else []
    return nearest(run, runs) if runs else ""
