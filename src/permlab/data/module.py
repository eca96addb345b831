"""The three loaders of a run."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor

from permlab.data.loader import Batchable, Loader, data_errors


class DataModule(L.LightningDataModule):
    """Train, validation and test loaders of the configured dataset, split and shuffled by seed.

    Args:
        component: the data set.
        settings: the `data` group of a complete configuration, for the size of batches and the workers.
        seed: of the split and of the order of batches.
    """

    def __init__(self, component: Any, settings: Mapping[str, Any], seed: int) -> None:
        super().__init__()
        self.component, self.settings, self.seed = component, settings, seed

    def _dataset(self, split: str) -> Batchable:
        with data_errors():
            return self.component.dataset(split, self.seed)

    def _loader(self, split: str) -> Loader:
        trainer = self.trainer
        dataset = self._dataset(split)
        with data_errors():
            return Loader(
                dataset,
                batch_size=self.settings["batch_size"],
                seed=self.seed,
                shuffle=split == "train",
                repeat=bool(trainer and trainer.overfit_batches),
                num_workers=self.settings["num_workers"],
                rank=trainer.global_rank if trainer else 0,
                num_ranks=trainer.world_size if trainer else 1,
            )

    def train_dataloader(self) -> Loader:
        return self._loader("train")

    def val_dataloader(self) -> Loader:
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        return self._loader("test")

    def statistics(self) -> dict[str, float]:
        """Numbers of the data for a run's summary: how much was left out as unreadable, where that is allowed."""
        if getattr(self.component, "on_corrupt", "stop") != "skip":
            return {}
        return {"data/num_skipped": float(self.component.num_skipped)}

    def sample(self, split: str, count: int) -> list[tuple[Tensor, Tensor]]:
        """Up to `count` samples of a split, the same ones for the same seed, in batches.

        Raises:
            ValueError: if the split is empty.
        """
        dataset = self._dataset(split)
        if len(dataset) == 0:
            raise ValueError(f"the {split} split has no samples to calibrate on")
        index = np.random.default_rng([self.seed, len(dataset)]).permutation(len(dataset))[:count]
        size = self.settings["batch_size"]
        with data_errors():
            return [dataset.__getitems__(index[i : i + size].tolist()) for i in range(0, len(index), size)]

    def mean_image(self, limit: int = 256) -> np.ndarray | None:
        """Mean over up to `limit` training images and their channels, `[height, width]`; None where there are none.

        The images are spread evenly over the dataset, which may be sorted by class.
        """
        if self.component.spec().is_sequence:
            return None
        dataset = self._dataset("train")
        index = np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).round().astype(int)
        parts = [index[i : i + 64].tolist() for i in range(0, len(index), 64)]
        with data_errors():
            sums = [dataset.__getitems__(part)[0].float().sum(dim=0).mean(dim=0).numpy() for part in parts]
        return np.sum(sums, axis=0) / len(index)
