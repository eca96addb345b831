"""That the processes of a run on several agree."""

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import torch

from permlab.callback.lifeline import watch_ranks
from permlab.errors import RankError

PARTS = ("orders", "temperature", "state of the method", "run directory", "decision to stop")


class RanksAgree(L.Callback):
    """Compares orders, temperature, the method's buffers (a baseline, say) and more over the ranks.

    By hash, at every step that is logged; a difference ends the run, as from there on its ranks
    would train different models. Also watches that the ranks of a machine are alive.

    Args:
        run_dir: of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._checked_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and stage == "fit":
            watch_ranks(trainer, self.run_dir)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._checked_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        if trainer.world_size == 1 or step == self._checked_step:
            return
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._checked_step = step
            self._compare(trainer, pl_module.method, step)

    def _compare(self, trainer: L.Trainer, method: Any, step: int) -> None:
        parts = [_orders(method), method.temperature, _buffers(method), str(self.run_dir), trainer.should_stop]
        mine = torch.tensor([_hash(part) for part in parts], device=trainer.strategy.root_device)
        everyone = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(everyone, mine)
        hashes = torch.stack(everyone)
        differ = (hashes != hashes[0]).any(dim=0).tolist()
        if any(differ):
            names = ", ".join(name for name, wrong in zip(PARTS, differ, strict=True) if wrong)
            ranks = (hashes != hashes[0]).any(dim=1).nonzero().flatten().tolist()
            raise RankError(f"step {step}: rank {', '.join(map(str, ranks))} differs from rank 0 in: {names}")


def _orders(method: Any) -> Any:
    return {name: order.tolist() for name, order in method.orders().items()}


def _buffers(method: Any) -> Any:
    return {name: buffer.tolist() for name, buffer in method.named_buffers()}


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big", signed=True)
