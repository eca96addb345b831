"""What a run is called: a function of its configuration, never of the clock."""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from permlab.config.schema import GROUPS, added_later, constant, schema
from permlab.option import KeptInData

# Where a run is made, not what it computes: left out of the hash that names the run.
MACHINE_KEYS = (
    "seed",
    "force",
    "num_threads",
    "ckpt_path",
    "figures",
    "plan",
    "paths",
    "checkpoint",
    "logger",
    "data.num_workers",
    "optim.name",
    "trainer.name",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.profiler",
    # Without effect until a number is not finite; then a stopped run goes on where it was, skipping.
    "trainer.on_nonfinite",
    "trainer.max_skips",
)


def digest(config: Mapping[str, Any]) -> str:
    """Eight hex digits of what the run computes: the configuration without seed and machine keys."""
    reduced = copy.deepcopy(dict(config))
    # A named dataset is the same wherever it lies; a folder of one's own is known by its place alone.
    own = constant("data", config["data"]["component"], "known_by_place")
    keys = MACHINE_KEYS if own else (*MACHINE_KEYS, "data.root")
    for dotted in keys:
        *parents, key = dotted.split(".")
        node = reduced
        for parent in parents:
            node = node[parent]
        node.pop(key, None)
    for group in ("", *GROUPS):
        settings = reduced.get(group, {}) if group else reduced
        settings |= _without_place(group, settings, Path(config["paths"]["data"], "models"))
        for key, value in added_later(group, settings.get("component")).items():
            if key in settings and settings[key] == value:
                del settings[key]
    return hashlib.sha256(json.dumps(reduced, sort_keys=True).encode()).hexdigest()[:8]


def _without_place(group: str, settings: Mapping[str, Any], models: Path) -> dict[str, str]:
    """Options that are folders of published models, by their names alone."""
    options = schema(group, settings.get("component")).items()
    names = {key: settings[key] for key, option in options if key in settings and option.marks(KeptInData)}
    places = {key: Path(name) for key, name in names.items() if isinstance(name, str)}
    return {key: f"models/{path.name}" for key, path in places.items() if path.parent == models}


def run_directory(config: Mapping[str, Any]) -> Path:
    """`<paths.runs>/<task>/<data>-<model>-<method>/seed=<seed>-<hash8>`."""
    names = "-".join(config[group]["name"].replace("/", "_") for group in ("data", "model", "method"))
    name = config["task"]["name"].replace("/", "_")
    return Path(config["paths"]["runs"], name, names, f"seed={config['seed']}-{digest(config)}")
