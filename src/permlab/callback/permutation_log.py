"""What a run records of its permutation: statistics, and snapshots that figures are drawn from."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from permlab.record.rundir import write_npz

# Of the orders of a batch, where each image has its own.
MAX_ORDERS = 8
# Above this a soft matrix is too large to keep twenty of, and too large to look at.
MAX_SOFT_ITEMS = 1024


class PermutationLog(L.Callback):
    """Logs `permutation/{entropy,temperature,kendall,displacement}` and writes `arrays/`.

    `arrays/grid.npz` holds the patch grid, the mean image and the starting order;
    `arrays/step=<steps behind it>.npz` the order, and scores and soft matrix where the method
    has them: at the start, at evenly spaced steps and at the end. Where every image has its own
    order, a snapshot holds the first orders of a batch and the batch's mean scores and soft
    matrix (and a training that stops before its last step has none of the end).

    Nothing here draws random numbers, so a run is the same with and without it.

    Args:
        run_dir: of the run.
        grid: rows and columns of the patch grid; None to log statistics alone.
        mean_image: of the training data, `[height, width]` in pixels, as background of pictures.
        num_snapshots: how many, besides the first and the last.
    """

    def __init__(
        self, run_dir: Path, *, grid: tuple[int, int] | None, mean_image: np.ndarray | None, num_snapshots: int = 20
    ) -> None:
        self.folder = run_dir / "arrays"
        self.grid, self.mean_image, self.num_snapshots = grid, mean_image, num_snapshots
        self._last_step = 0
        self._num_steps = math.inf

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._last_step, self._num_steps = trainer.global_step, trainer.estimated_stepping_batches
        if self.grid is not None:
            self._write_grid(pl_module.method.start_order)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and batch_idx == 0 and self.grid is not None:
            self._write_snapshot(pl_module, 0, _items(pl_module, batch))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return  # gradients are being accumulated
        self._last_step = step
        wants_statistics = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        wants_snapshot = self.grid is not None and (step == self._num_steps or step % self._interval() == 0)
        if not (wants_statistics or wants_snapshot):
            return
        items = _items(pl_module, batch)
        if wants_statistics:
            self._log_statistics(trainer, pl_module.method.statistics(items))
        if wants_snapshot:
            self._write_snapshot(pl_module, step, items)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        stopped_early = self.grid is not None and not self._path(trainer.global_step).is_file()
        if stopped_early and not _needs_items(pl_module):
            self._write_snapshot(pl_module, trainer.global_step, None)

    def _interval(self) -> int:
        """Steps between snapshots; a run of unknown length gets one every thousand."""
        return max(1, int(self._num_steps) // self.num_snapshots) if math.isfinite(self._num_steps) else 1000

    def _path(self, step: int) -> Path:
        return self.folder / f"step={step:07d}.npz"

    def _log_statistics(self, trainer: L.Trainer, statistics: dict[str, Tensor]) -> None:
        if trainer.logger is not None:
            named = {f"permutation/{name}": float(value) for name, value in statistics.items()}
            trainer.logger.log_metrics(named, step=trainer.global_step)

    @rank_zero_only
    def _write_grid(self, start_order: Tensor) -> None:
        arrays = {"grid": np.array(self.grid), "start_order": start_order.cpu().numpy()}
        if self.mean_image is not None:
            arrays["mean_image"] = np.asarray(self.mean_image, dtype=np.float32)
        write_npz(self.folder / "grid.npz", **arrays)

    @rank_zero_only
    @torch.no_grad()
    def _write_snapshot(self, pl_module: Any, step: int, items: Tensor | None) -> None:
        method = pl_module.method
        order = method.best(items)
        arrays = {"step": np.array(step), "order": order.flatten(0, -2)[:MAX_ORDERS] if order.ndim > 1 else order}
        scores = method.scores(items)
        if scores is not None:
            arrays["scores"] = scores.mean(0) if scores.ndim == 2 else scores
        soft = method.soft_matrix(items) if order.shape[-1] <= MAX_SOFT_ITEMS else None
        if soft is not None:
            arrays["soft"] = soft.flatten(0, -3).mean(0) if soft.ndim > 2 else soft
        write_npz(self._path(step), **{name: _numpy(value) for name, value in arrays.items()})


def _needs_items(pl_module: Any) -> bool:
    return pl_module.method.needs_items


@torch.no_grad()
def _items(pl_module: Any, batch: Any) -> Tensor | None:
    """Items of the batch where the order depends on them, embedded without dropout."""
    if not _needs_items(pl_module):
        return None
    model = pl_module.model
    training = model.training
    model.eval()
    try:
        return pl_module.items(batch[0])
    finally:
        model.train(training)


def _numpy(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().float() if value.is_floating_point() else value.detach()
        return value.cpu().numpy()
    return np.asarray(value)
