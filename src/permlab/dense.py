"""The model that a pruning starts from: which run trained it, and how it is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from permlab.assembly import UNREADABLE_ARRAYS
from permlab.compose import resolve_train
from permlab.config import data_spec, derive, run_directory, validate
from permlab.errors import ConfigError
from permlab.permutation import check_order

Config = Mapping[str, Any]
# What a dense run takes over from the pruning's trainer: where it computes, not how long.
MACHINE = (
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "enable_progress_bar"),
    *("on_nonfinite", "max_skips"),
)

# Keys of the trainer that runs of earlier versions do not have.
ADDED_LATER = {"on_nonfinite": "stop", "max_skips": 10}


def dense_config(config: Config) -> dict[str, Any]:
    """Configuration of the dense run of a pruning: same model, data, seed and machine, its task's own schedule."""
    name = "lm" if data_spec(config["data"]).kind == "text" else "classify"
    words = [f"task={name}", "method=fixed", f"model={config['model']['name']}", f"data={config['data']['name']}"]
    dense = resolve_train(words)[0]
    dense["model"] = dict(config["model"])
    dense["optim"]["lr"] = dense["model"]["lr"]
    own = ("batch_size", "num_workers")
    dense["data"] |= {key: value for key, value in config["data"].items() if key not in own}
    dense["trainer"] |= {key: config["trainer"][key] for key in MACHINE if key in config["trainer"]}
    if config["task"]["dense_steps"]:
        dense["trainer"] |= {"max_steps": config["task"]["dense_steps"], "val_check_interval": None}
    dense |= {key: config[key] for key in ("seed", "paths", "checkpoint", "num_threads", "logger")}
    derive(dense)
    return dense


def dense_directory(config: Config) -> Path | None:
    """Directory of the run whose model is pruned; None where nothing is, or the model comes pretrained."""
    task = config["task"]
    if "dense" not in task or (task["dense"] is None and config["model"].get("pretrained")):
        return None
    return Path(task["dense"]) if task["dense"] else run_directory(dense_config(config))


def data_seed(config: Config) -> int:
    """Seed of the data's split: that of the dense run, or its training samples would be tested on.

    Raises:
        ConfigError: if the dense run is gone.
    """
    given = config["task"].get("dense")
    return read_config(Path(given))["seed"] if given else config["seed"]


def read_config(run_dir: Path) -> dict[str, Any]:
    """Configuration of a run, validated: the file may have been changed since.

    Raises:
        ConfigError: if there is none that can be read, or it is no configuration of a run.
    """
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{run_dir}: no readable config.yaml ({type(error).__name__})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{run_dir}: config.yaml holds no keys")
    if isinstance(config.get("trainer"), dict):
        config["trainer"] = ADDED_LATER | config["trainer"]
    # Where the run resumed from may be gone, and matters no more.
    problems = validate(config | {"ckpt_path": None})
    if problems:
        raise ConfigError([f"{run_dir / 'config.yaml'}: {problem}" for problem in problems])
    return config


def read_item_order(run_dir: Path) -> Tensor:
    """The order in which a run's model reads its items.

    Raises:
        ConfigError: if the run has none, or one for each image.
    """
    path = run_dir / "arrays" / "order.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "order" in arrays:
                order = torch.from_numpy(arrays["order"])
                check_order(order)
                return order
    except UNREADABLE_ARRAYS as error:
        raise ConfigError(f"task.dense={run_dir}: no readable arrays/order.npz ({error})") from error
    raise ConfigError(f"task.dense={run_dir}: its order depends on the image; prune a run with one order for all")
