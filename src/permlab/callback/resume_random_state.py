"""Random number generators in checkpoints, so that a resumed run draws what it would have drawn."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch


class ResumeRandomState(L.Callback):
    """Saves the generators of Python, NumPy and torch, for every rank, and restores them on resuming.

    Lightning saves none of them. The states are plain containers and tensors, which
    `torch.load(weights_only=True)` reads.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [random_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get("random_states")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A run that is measured in epochs has made its loader, to count the steps, before there was a state for it.
        trainer.fit_loop._load_combined_loader_states()
        if self._restored is None:
            return
        # After a change of the number of ranks, surplus ranks keep their fresh generators.
        if trainer.global_rank < len(self._restored):
            set_random_state(self._restored[trainer.global_rank])
        self._restored = None


def random_state() -> dict[str, Any]:
    """States of all global generators of this process, as lists, numbers and tensors."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr, attr-defined]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # type: ignore[arg-type]
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
