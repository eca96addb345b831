"""What a run asks of the machine it is started on, looked at before torch is imported.

No part of a configuration's validity: a run may be composed here for another machine, and evaluated elsewhere.
"""

import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from permlab.data.cores import count_cores
from permlab.errors import ConfigError

# What copies of the metrics need that is no dependency, each the package and its extra.
NEEDED_BY_COPIES = {"tensorboard": ("tensorboard", "tensorboardX")}


def check_machine(config: Mapping[str, Any]) -> None:
    """Refuse more processes than the machine has cores or devices for, and files that no package here writes.

    Args:
        config: complete and valid.
    Raises:
        ConfigError: with every problem found.
    """
    problems = [*_check_devices(config["trainer"]), *_check_packages(config["logger"])]
    if problems:
        raise ConfigError(problems)


def _check_devices(trainer: Mapping[str, Any]) -> Iterator[str]:
    accelerator, devices = trainer["accelerator"], trainer["devices"]
    num_gpus = count_gpus()
    if accelerator in ("gpu", "cuda") and num_gpus == 0:
        yield f"trainer.accelerator={accelerator}: there is no GPU here; nearest valid choice: cpu (trainer=cpu)"
        return
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and num_gpus == 0)
    available = count_cores() if on_cpu else num_gpus
    asked = _num_asked(devices, on_cpu)
    if available is not None and asked > available:
        what = (
            f"{available} CPU {_plural('core', available)}, one for each process"
            if on_cpu
            else f"{available} {_plural('GPU', available)}"
        )
        yield f"trainer.devices={devices}: there are {what}; nearest valid choice: {available}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _num_asked(devices: Any, on_cpu: bool) -> int:
    """Devices that have to be there for this value: a number, indices of GPUs, or `auto` and -1 for what there is."""
    if isinstance(devices, str) and "," in devices:
        devices = devices.split(",")
    if isinstance(devices, list):
        indices = [int(part) for part in map(str, devices) if part.strip().isdigit()]
        return len(indices) if on_cpu else max(indices, default=-1) + 1
    return int(devices) if str(devices).strip().isdigit() else 0


def count_gpus() -> int | None:
    """CUDA devices that this process may use, from the driver's files; None where these do not tell."""
    # Of AMD, of a GPU shared by Windows, of a Tegra board, whose devices have other names.
    others = [path for name in ("kfd", "dxg", "nvhost*") for path in Path("/dev").glob(name)]
    if not sys.platform.startswith("linux") or others:
        return None
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    # The driver stops reading at the first that is none.
    return min(present, len(list(itertools.takewhile(lambda name: name.strip() not in ("", "-1"), visible.split(",")))))


def _check_packages(logger: Mapping[str, Any]) -> Iterator[str]:
    for name in logger["copies"]:
        packages = NEEDED_BY_COPIES.get(name)
        if packages and not any(map(importlib.util.find_spec, packages)):
            how = f"`uv pip install {packages[0]}`, or logger=csv, which needs none"
            yield f"logger={name}: needs the package {packages[0]}: {how}"
