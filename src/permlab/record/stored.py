"""What a run's files hold, read back: its plan and its arrays. Nothing here imports torch."""

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from permlab.config.check import plan_of
from permlab.config.plan import Plan
from permlab.config.schema import COMPONENT_GROUPS, GROUPS, added_later, is_component
from permlab.errors import ConfigError
from permlab.record.rundir import read_metrics

if TYPE_CHECKING:
    import numpy as np

# What NumPy raises for a file that is no .npz, or one that is cut short, garbled, or holds pickled objects.
UNREADABLE_ARRAYS = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)

# Validation curves of the runs that one is compared with, by their names, in its directory.
BESIDE = Path("arrays", "beside.npz")


def read_plan(run_dir: Path) -> Plan:
    """Plan of a run from its files, checked: they may have been changed since.

    Args:
        run_dir: of the run, wherever it has been moved to.
    Raises:
        ConfigError: if there is no configuration that can be read, or it is none of a run.
    """
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{run_dir}: no readable config.yaml ({type(error).__name__})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{run_dir}: config.yaml holds no keys")
    _add_later_options(config)
    try:
        # Where the run resumed from may be gone, and matters no more.
        return plan_of(config | {"ckpt_path": None}, run_dir)
    except ConfigError as error:
        raise ConfigError([f"{run_dir / 'config.yaml'}: {problem}" for problem in error.problems]) from error


def _add_later_options(config: dict[str, Any]) -> None:
    """Fill in the options that the version which wrote a configuration did not have."""
    for group in ("", *GROUPS):
        settings = config.get(group) if group else config
        component = settings.get("component") if isinstance(settings, dict) else None
        if isinstance(settings, dict) and (group not in COMPONENT_GROUPS or is_component(group, component)):
            for key, value in added_later(group, component).items():
                settings.setdefault(key, value)


def read_arrays(path: Path) -> "dict[str, np.ndarray]":
    """Arrays of an `.npz` file by name, none where there is no file; nothing is unpickled.

    Raises:
        UNREADABLE_ARRAYS: if it cannot be read.
    """
    import numpy as np  # a plan is read without it

    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def read_snapshots(run_dir: Path) -> "list[dict[str, np.ndarray]]":
    """Snapshots of the permutation, by ascending step."""
    return [read_arrays(path) for path in sorted((run_dir / "arrays").glob("step=*.npz"))]


def read_curve(run_dir: Path, key: str) -> "np.ndarray":
    """Steps of a run and a metric that it logged at them, `[k, 2]`.

    Raises:
        ValueError: if `metrics.jsonl` cannot be read.
    """
    import numpy as np

    points = [(record["step"], record[key]) for record in read_metrics(run_dir) if key in record]
    return np.array(points, dtype=float).reshape(-1, 2)
