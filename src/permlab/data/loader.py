"""Batches whose order is a function of seed and epoch, so that a resumed run sees what it would have seen."""

import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from permlab.errors import ConfigError, RunError

# Those by which a run is asked to stop.
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Batchable(Protocol):
    """A map-style dataset that fetches a whole batch at once.

    One that augments also has `set_epoch(epoch)`, which the loader calls before the epoch's
    first batch: what it draws is then a function of seed, epoch and index, whoever fetches.
    """

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...


class ArrayDataset(Dataset):
    """Samples and labels held in memory.

    Shapes:
        inputs: `[num_samples, ...]`.  labels: int64 `[num_samples]`.
    """

    def __init__(self, inputs: np.ndarray, labels: np.ndarray) -> None:
        self.inputs, self.labels = torch.from_numpy(inputs), torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices)
        return self.inputs[index], self.labels[index]


def _as_is(batch: Any) -> Any:
    return batch


def worker_died(error: RuntimeError) -> str:
    """One line about a worker process that is gone; what it was doing went with it."""
    reason = " ".join(str(error).split()).rstrip(".")
    return (
        f"data: a worker process died ({reason}): out of memory, or a file that crashes its decoder; "
        "lower data.num_workers, or set data.num_workers=0 to see it happen; "
        "the same command goes on from the last checkpoint"
    )


@contextmanager
def data_errors() -> Iterator[None]:
    """Turn what a dataset says of its files into an error of the configuration, which ends a run with one line."""
    try:
        yield
    except ValueError as error:
        # From a worker process the message is that process's traceback, which ends in the error.
        lines = str(error).strip().splitlines() or [repr(error)]
        raise ConfigError(f"data: {lines[-1].removeprefix('ValueError: ')}") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(worker_died(error)) from error


def _leave_signals_to_the_run(worker: int) -> None:
    """Schedulers and Ctrl-C signal every process of a job; the run still needs its workers until it has saved."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def obey_the_run() -> None:
        while True:
            received = signal.sigwaitinfo(SIGNALS)
            if received.si_pid == os.getppid() and received.si_signo == signal.SIGTERM:
                os._exit(0)

    threading.Thread(target=obey_the_run, daemon=True, name="worker-signals").start()


class Loader:
    """Batches of a dataset for one rank, resumable in the middle of an epoch.

    Every epoch's order is drawn from (seed, epoch) alone and shared by all ranks, which take
    consecutive slices of every global batch. The position is part of Lightning's checkpoints
    through `state_dict`; it counts the batches that were handed out, not those that workers
    have prefetched. After `load_state_dict` the next iteration continues from there; every
    other iteration is a new epoch, also when the one before it was abandoned.

    Args:
        dataset: fetches batches by `__getitems__`.
        batch_size: samples per batch and rank.
        seed: of the order of every epoch.
        shuffle: draw an order per epoch and drop the incomplete last batch; otherwise keep the
            dataset's order and every sample (ranks may then differ by one batch).
        repeat: give every epoch the order of the first, to learn a few batches by heart.
        num_workers: processes that fetch ahead; 0 fetches in this one.
        rank, num_ranks: this process's place among those that share the data.
    Raises:
        ValueError: if there is not at least one sample for every rank.
    """

    def __init__(
        self,
        dataset: Batchable,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        repeat: bool = False,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if len(dataset) < num_ranks:
            raise ValueError(f"{len(dataset)} samples are too few for {num_ranks} processes")
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.repeat, self.num_workers, self.rank, self.num_ranks = repeat, num_workers, rank, num_ranks
        self.epoch = 0
        self.num_consumed = 0
        self._resumed = False
        # A data set smaller than a global batch is one batch, shared out.
        self.global_batch = min(batch_size * num_ranks, len(dataset))

    def __len__(self) -> int:
        if self.shuffle:
            return len(self.dataset) // self.global_batch
        return len(self._slices(np.arange(len(self.dataset))))

    def _slices(self, order: np.ndarray) -> list[list[int]]:
        """This rank's part of every global batch, leaving out parts that are empty."""
        count = len(order) // self.global_batch if self.shuffle else math.ceil(len(order) / self.global_batch)
        batches = (order[i * self.global_batch : (i + 1) * self.global_batch] for i in range(count))
        parts = (np.array_split(batch, self.num_ranks)[self.rank] for batch in batches)
        return [part.tolist() for part in parts if len(part)]

    def batches(self, epoch: int) -> list[list[int]]:
        """Indices of every batch of an epoch, for this rank."""
        if not self.shuffle:
            return self._slices(np.arange(len(self.dataset)))
        return self._slices(
            np.random.default_rng([self.seed, 0 if self.repeat else epoch]).permutation(len(self.dataset))
        )

    def __iter__(self) -> Iterator[Any]:
        # Lightning makes iterators that it never reads, so nothing may change before the first batch.
        if self.num_consumed and not self._resumed:
            self._next_epoch()
        self._resumed = False
        batches = self.batches(self.epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        for batch in self._fetch(batches[self.num_consumed :]):
            self.num_consumed += 1
            # Before the last batch is handed out, as nobody need ask for one more to end the epoch.
            if self.num_consumed == len(batches):
                self._next_epoch()
            yield batch

    def _next_epoch(self) -> None:
        self.epoch, self.num_consumed = self.epoch + 1, 0

    def _fetch(self, batches: list[list[int]]) -> Iterator[Any]:
        with data_errors():
            yield from self._fetch_here(batches) if self.num_workers == 0 else self._fetch_ahead(batches)

    def _fetch_here(self, batches: list[list[int]]) -> Iterator[Any]:
        return (self.dataset.__getitems__(batch) for batch in batches)

    def _fetch_ahead(self, batches: list[list[int]]) -> Iterator[Any]:
        # A private generator: starting workers must not draw from the global one, or runs with
        # and without workers would differ.
        generator = torch.Generator().manual_seed(self.seed)
        loader: DataLoader = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            generator=generator,
            worker_init_fn=_leave_signals_to_the_run,
        )
        # Workers are born with the signals blocked: a library may start a thread in them before we can.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "num_consumed": self.num_consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.num_consumed, self._resumed = state["epoch"], state["num_consumed"], True
        if self.num_consumed >= len(self):  # saved with smaller batches, so this epoch is over
            self._next_epoch()
