"""Which numbers a run may take over from others: what they depend on, as far as a configuration tells it."""

import lightning as L
import torch

from permlab.config.plan import Plan
from permlab.record.known import Known
from permlab.record.provenance import device_name


def known_numbers(plan: Plan, trainer: L.Trainer) -> Known | None:
    """Numbers of other runs on the same data, computed alike; none for several ranks, and where all is to be new."""
    if plan.is_forced or trainer.world_size > 1:
        return None
    settings = {key: value for key, value in plan.config["trainer"].items() if key.startswith("limit_")}
    model = {key: value for key, value in plan.config["model"].items() if key not in ("name", "lr", "pretrained")}
    facts = {
        "data": {key: value for key, value in plan.config["data"].items() if key != "num_workers"},
        "model": model,
        "seed": plan.task.data_seed(plan),
        "precision": trainer.precision,
        "limits": settings,
        "device": device_name(plan.config["trainer"]["accelerator"]),
        "torch": torch.__version__,
    }
    return Known(plan.cache_folder, facts)
