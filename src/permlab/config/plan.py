"""The plan of a run: its configuration, and what follows from that before torch is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permlab.config.build import build
from permlab.config.checkpoint import fill_in
from permlab.config.identity import digest, run_directory
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """One run, checked and complete; made once and handed on.

    Args:
        config: complete configuration, plain containers only.
        spec: shape of the data's samples.
        directory: of the run's files.
        digest: eight hex digits of what the run computes, the same for all seeds.
        data: the data set, a component of the group `data`.
        task: what is asked, a component of the group `task`; see `permlab.task.task.Task`.
    """

    config: Mapping[str, Any]
    spec: DataSpec
    directory: Path
    digest: str
    data: Any
    task: Any

    @property
    def is_forced(self) -> bool:
        """Whether the run is repeated where a finished one exists."""
        return bool(self.config["force"])

    @property
    def cache_folder(self) -> Path:
        """Where runs put what is large, and what others may use; it may be deleted at any time."""
        return Path(self.config["paths"]["runs"], "cache")


def make_plan(config: Mapping[str, Any], directory: Path | None = None) -> Plan:
    """Plan of a checked configuration.

    Args:
        config: valid; what follows from other keys is filled in, see `complete`.
        directory: where the run lies already; None for where its configuration puts it.
    Raises:
        ConfigError: if the data set's files are missing or not what they should be, or a component refuses
            its values.
    """
    config = fill_in(config)
    data, spec = open_data(config["data"])
    task = build("task", config["task"], spec)
    whole = complete(config, spec, task, data)
    return Plan(whole, spec, directory or run_directory(whole), digest(whole), data, task)


def open_data(settings: Mapping[str, Any]) -> tuple[Any, DataSpec]:
    """The configured data set and the shape of its samples, which its class knows without importing torch.

    Raises:
        ConfigError: if its files are missing or not what they should be.
    """
    data = build("data", settings)
    try:
        return data, data.spec()
    except ValueError as error:
        where = f"data.root={settings['root']}" if "root" in settings else f"data={settings.get('name')}"
        raise ConfigError(f"{where}: {error}") from error


def complete(config: Mapping[str, Any], spec: DataSpec, task: Any, data: Any) -> dict[str, Any]:
    """A copy in which what follows from other keys is filled in, so that a saved configuration is complete."""
    whole = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    left_open: Mapping[str, Any] = getattr(data, "complete", dict)()
    whole["data"] |= {key: value for key, value in left_open.items() if whole["data"].get(key) is None}
    model, trainer = whole["model"], whole["trainer"]
    if "patch_size" in model and (model["patch_size"] is None or spec.is_sequence):
        model["patch_size"] = spec.patch_size
    if trainer["val_check_interval"] is None:
        # About twenty validations, and for a very short run just one, at its end.
        steps = trainer["max_steps"] * trainer["accumulate_grad_batches"]
        trainer["val_check_interval"] = max(steps // 20, min(steps, 20)) if steps > 0 else 1.0
    task.complete(whole)
    return whole
