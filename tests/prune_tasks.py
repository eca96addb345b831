"""Tasks of pruning by themselves: no trained model, no trainer's loop."""

import lightning as L
from runs import SHORT, assemble, configure, data_module
from torch import nn

from permlab.task.prune.learner import PruneLearner

PRUNE = ("task=prune", "task.dense_steps=60", "num_threads=1")
IMAGES = ("model.patch_size=4",)  # five tokens an image: fast, and learned to 80 % in these steps
TEXT = (
    "data=pydocs",
    "data.sequence_length=32",
    "data.val_fraction=0.02",
    "data.test_fraction=0.02",
    "model=llama_nano",
)
ONE = ("task.num_groups=1",)


def words_of(*overrides: str) -> list[str]:
    return [*SHORT, *PRUNE, *(() if "data=pydocs" in overrides else IMAGES), *overrides]


# A task by itself: no trained model, no trainer's loop


def task_of(*overrides: str) -> PruneLearner:
    """A task that has seen its calibration samples, on a backbone with weights large enough to tell losses apart."""
    config = configure(words_of("task.num_samples=24", *overrides))
    parts = assemble(config)
    for parameter in parts.model.parameters():
        nn.init.normal_(parameter, std=0.25)
    task = parts.learner
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(task)
    task.trainer = trainer
    task.train()
    task.prepare(data_module(config, config["seed"]), {})
    for site in task.method.sites:  # off the start, where straight-through orders are the identity
        for parameter in task.method[site.name].parameters():
            nn.init.normal_(parameter, std=0.5)
    return task
