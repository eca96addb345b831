"""The three loaders of a run."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor

from permlab.data.cores import count_cores
from permlab.data.loader import Batchable, Loader, data_errors

SPLITS = ("train", "val", "test")


class Unfinished:
    """A data set whose batches are finished later, on the device: they are small, and the rest is quick there."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self.dataset.unfinished(indices)

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)


class Part:
    """Some samples of a data set, by their places in it."""

    def __init__(self, dataset: Any, index: np.ndarray) -> None:
        self.dataset, self.index = dataset, index

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self.dataset.__getitems__(self.index[np.asarray(indices)].tolist())

    def __len__(self) -> int:
        return len(self.index)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class DataModule(L.LightningDataModule):
    """Train, validation and test loaders of the configured dataset, split and shuffled by seed.

    Where a data set has `unfinished(indices)`, its batches come as bytes and are finished on the device.

    Args:
        component: the data set.
        settings: the `data` group of a complete configuration, for the size of batches and the workers.
        seed: of the split and of the order of batches.
    """

    def __init__(self, component: Any, settings: Mapping[str, Any], seed: int) -> None:
        super().__init__()
        self.component, self.settings, self.seed = component, settings, seed
        self._kept: dict[str, Batchable] = {}

    def dataset(self, split: str) -> Batchable:
        """Samples of a split."""
        with data_errors():
            return self.component.dataset(split, self.seed)

    def _read(self, split: str) -> Batchable:
        return self._kept[split] if split in self._kept else self.dataset(split)

    @property
    def augments(self) -> bool:
        """Whether training samples differ from epoch to epoch."""
        return getattr(self.component, "augment", "none") != "none"

    def keep(self, split: str, dataset: Batchable) -> None:
        """Let the loader of a split read another data set from now on: a part of it, or what was computed of it."""
        self._kept[split] = dataset

    def drawn(self, split: str, count: int | None) -> Batchable:
        """A split, or so many samples of it in its order, drawn by the seed."""
        dataset = self.dataset(split)
        if count is None or count >= len(dataset):
            return dataset
        return Part(dataset, np.sort(self._shuffled(len(dataset))[:count]))

    def in_order(self, split: str) -> Loader:
        """Batches of all that is read of a split, as they are without augmentation and in the order of the data set."""
        with data_errors():
            return Loader(self._read(split), batch_size=self.settings["batch_size"], num_workers=self._num_workers())

    def _shuffled(self, count: int) -> np.ndarray:
        return np.random.default_rng([self.seed, count]).permutation(count)

    def _loader(self, split: str) -> Loader:
        trainer: Any = self.trainer
        dataset = self._read(split)
        with data_errors():
            return Loader(
                Unfinished(dataset) if hasattr(dataset, "unfinished") else dataset,
                batch_size=self.settings["batch_size"],
                seed=self.seed,
                shuffle=split == "train",
                repeat=bool(trainer and trainer.overfit_batches),
                num_workers=self._num_workers(),
                rank=trainer.global_rank if trainer else 0,
                num_ranks=trainer.world_size if trainer else 1,
            )

    def _num_workers(self) -> int:
        """As many as asked for, and no more than cores of this rank: beyond those they only decode too far ahead."""
        num_ranks = self.trainer.num_devices if self.trainer else 1  # on this machine
        return min(self.settings["num_workers"], max(1, count_cores() // num_ranks))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.finished() if hasattr(batch, "finished") else batch

    def train_dataloader(self) -> Loader:
        return self._loader("train")

    def val_dataloader(self) -> Loader:
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        return self._loader("test")

    def describe(self) -> str:
        """How many samples every split has, and where they are from, for the first lines of a run."""
        where = getattr(self.component, "where", lambda split: "")
        parts: dict[str, list[str]] = {}
        for split in SPLITS:
            parts.setdefault(where(split), []).append(f"{len(self.dataset(split)):,} {split}")
        return "; ".join(", ".join(counts) + (f" from {place}" if place else "") for place, counts in parts.items())

    def load_tokenizer(self) -> Any:
        """What gave the tokens of a text, as transformers' own tokenizer; None where the data has none.

        Raises:
            ValueError: if it cannot be loaded.
        """
        load = getattr(self.component, "load_tokenizer", None)
        return load(self.seed) if load else None

    def truth(self) -> np.ndarray | None:
        """Order of the items, int64 `[n]`, that the data set knows to be the true one; None where it knows of none."""
        tell = getattr(self.component, "truth", None)
        return tell() if tell else None

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
        dataset = self.dataset(split)
        if len(dataset) == 0:
            raise ValueError(f"the {split} split has no samples to calibrate on")
        index = self._shuffled(len(dataset))[:count]
        size = self.settings["batch_size"]
        with data_errors():
            return [dataset.__getitems__(index[i : i + size].tolist()) for i in range(0, len(index), size)]

    def normalisation(self) -> dict[str, list[float]] | None:
        """Mean and deviation, `mean` and `std`, by channel that images are normalised with; None where by none."""
        dataset: Any = self.dataset("test")
        mean, sd = (getattr(dataset, name, None) for name in ("mean", "sd"))
        return None if mean is None or sd is None else {"mean": list(mean), "std": list(sd)}

    def mean_image(self, limit: int = 256) -> np.ndarray | None:
        """Mean over up to `limit` training images and their channels, `[height, width]`; None where there are none.

        The images are spread evenly over the dataset, which may be sorted by class. A quarter of them, coarsely
        decoded, does where each is a file.
        """
        spec = self.component.spec()
        if spec.is_sequence:
            return None
        dataset: Any = self.dataset("train")
        fetch = dataset.__getitems__
        if hasattr(dataset, "sketch"):
            limit, fetch = min(limit, 64), partial(dataset.sketch, size=min(spec.height, spec.width))
        index = np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).round().astype(int)
        parts = [index[i : i + 64].tolist() for i in range(0, len(index), 64)]
        with data_errors():
            sums = [fetch(part)[0].float().sum(dim=0).mean(dim=0).numpy() for part in parts]
        return np.sum(sums, axis=0) / len(index)
