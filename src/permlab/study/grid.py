"""Grids of jobs: those in `sweeps/`, and those that `-m` makes of swept keys.

A sweep file has the format of a W&B sweep, so `wandb sweep sweeps/<stem>.yaml` runs the same
grid on a server.
"""

import itertools
import re
from collections.abc import Sequence

import yaml
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException

from permlab.config.compose import parse_overrides
from permlab.config.schema import CONF
from permlab.config.words import as_json
from permlab.errors import ConfigError, nearest

SWEEPS = CONF.parent / "sweeps"
# A multirun may have at most this many jobs.
MAX_JOBS = 10_000
Job = list[str]


def sweep_names(prefix: str = "") -> list[str]:
    """Stems of the files in `sweeps/` that begin with a prefix."""
    return sorted(path.stem for path in SWEEPS.glob(f"{prefix}*.yaml"))


def studies() -> dict[str, list[str]]:
    """Sweeps of every study by its name: the words in front of a sweep's number, or the first of them.

    Of names that stand for the same sweeps the shortest is taken.
    """
    found: dict[str, list[str]] = {}
    for name in sweep_names():
        words = re.split(r"_(?=\d)", name)[0].split("_")
        for prefix in itertools.accumulate(words, "{}_{}".format):
            found.setdefault(prefix, []).append(name)
    return {prefix: names for prefix, names in found.items() if names not in [found[p] for p in found if p < prefix]}


def sweep_comments() -> dict[str, str]:
    """What the first line of every file in `sweeps/` says, by stem."""
    return {name: (SWEEPS / f"{name}.yaml").read_text().partition("\n")[0].lstrip("# ") for name in sweep_names()}


def read_sweep(name: str) -> list[Job]:
    """Jobs of `sweeps/<name>.yaml`, each a list of overrides; the last parameter varies fastest.

    Raises:
        ConfigError: if there is no such file, or it is no grid.
    """
    path = SWEEPS / f"{name}.yaml"
    if not re.fullmatch(r"\w[\w.-]*", name) or not path.is_file():
        raise ConfigError(f"NAME={name}: no such sweep{nearest(name, sweep_names(), count=3)}")
    try:
        sweep = dict(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if sweep.get("method") != "grid":
        raise ConfigError(f"{path.name}: method={sweep.get('method')}; only a grid is run here")
    axes = []
    for key, choice in sweep["parameters"].items():
        values = choice.get("values", [choice["value"]] if "value" in choice else [])
        if not values:
            raise ConfigError(f"{path.name}: parameters.{key}={choice}: expected value or values")
        axes.append([f"{key}={value if isinstance(value, str) else as_json(value)}" for value in values])
    return product(axes)


def expand(words: Sequence[str]) -> list[Job]:
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
    return product(axes)


def product(axes: Sequence[Sequence[str]]) -> list[Job]:
    """Every combination of one word of each axis, the last axis varying fastest."""
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
