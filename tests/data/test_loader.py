import itertools
import os
import signal

import numpy as np
import pytest
import torch

from permlab.data.loader import ArrayDataset, Loader
from permlab.errors import ConfigError, RunError


class Indices:
    """Hands out the indices themselves, with the epoch they were fetched in."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices):
        return torch.tensor(indices), torch.full((len(indices),), self.epoch)


class Broken(Indices):
    def __getitems__(self, indices):
        raise ValueError("images/7.png: not a readable image")


def loader(size: int = 23, dataset=None, **options) -> Loader:
    return Loader(dataset or Indices(size), **{"batch_size": 5, "shuffle": True, "seed": 3} | options)


def read(loader: Loader, count: int | None = None) -> list[tuple[list[int], int]]:
    """Indices and epoch of up to `count` batches; the iterator is then abandoned, as Lightning does."""
    return [(index.tolist(), int(epoch[0])) for index, epoch in itertools.islice(loader, count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_is_a_function_of_seed_and_epoch(num_workers: int) -> None:
    first, second = loader(num_workers=num_workers), loader()
    epochs = [read(first) for _ in range(3)]
    assert epochs == [read(second) for _ in range(3)]
    assert [batch[1] for epoch in epochs for batch in epoch] == [0] * 4 + [1] * 4 + [2] * 4
    orders = [[i for indices, _ in epoch for i in indices] for epoch in epochs]
    assert all(len(set(order)) == 20 for order in orders)  # 23 samples, the incomplete batch dropped
    assert len({tuple(order) for order in orders}) == 3
    assert read(loader(seed=4)) != epochs[0]


def test_length_counts_the_batches() -> None:
    for size, shuffle, rank in itertools.product((3, 10, 11, 20, 23), (True, False), (0, 1)):
        subject = loader(size, shuffle=shuffle, rank=rank, num_ranks=2)
        assert len(subject) == len(read(subject)), (size, shuffle, rank)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_read", [1, 3, 4, 5, 8, 10])
def test_resuming_continues_exactly(num_workers: int, num_read: int) -> None:
    """Four batches make an epoch: resumed in the middle of one, and at the end of the first and second."""
    whole = loader()
    expected = [batch for _ in range(4) for batch in read(whole)]
    interrupted, seen = loader(num_workers=num_workers), []
    while len(seen) < num_read:
        seen += read(interrupted, min(4, num_read - len(seen)))
    resumed = loader(num_workers=num_workers)
    resumed.load_state_dict(interrupted.state_dict())
    while len(seen) < 16:
        seen += read(resumed)
    assert seen == expected


def test_an_epoch_ends_with_its_last_batch_not_with_the_next_request() -> None:
    """Lightning never asks for the batch after the last one; every epoch must still be a full one."""
    subject = loader()
    epochs = [read(subject, 4) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [4, 4, 4]
    assert subject.state_dict() == {"epoch": 3, "num_consumed": 0}


def test_state_counts_batches_handed_out_not_prefetched() -> None:
    subject = loader(num_workers=2)
    iterator = iter(subject)
    next(iterator)
    assert subject.state_dict() == {"epoch": 0, "num_consumed": 1}


def test_iterators_that_are_never_read_change_nothing() -> None:
    subject, fresh = loader(), loader()
    subject.load_state_dict({"epoch": 1, "num_consumed": 2})
    iter(subject), iter(subject)
    read(fresh)
    assert read(subject) == read(fresh)[2:]


def test_an_abandoned_iteration_is_followed_by_a_new_epoch() -> None:
    subject = loader()
    read(subject, 2)
    assert [epoch for _, epoch in read(subject)] == [1] * 4
    validation = loader(shuffle=False)
    assert read(validation, 2) == [(list(range(5)), 0), (list(range(5, 10)), 0)]
    assert [i for indices, _ in read(validation) for i in indices] == list(range(23))


def test_a_position_beyond_the_epoch_is_the_next_epoch() -> None:
    small = loader(batch_size=2)
    read(small, 9)
    large = loader()
    large.load_state_dict(small.state_dict())
    assert [epoch for _, epoch in read(large)] == [1] * 4


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("size", [4, 12, 23, 60])
def test_ranks_partition_every_global_batch(num_ranks: int, size: int) -> None:
    together = [indices for indices, _ in read(loader(size, batch_size=4 * num_ranks))]
    ranks = [read(loader(size, batch_size=4, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
    assert len({len(batches) for batches in ranks}) == 1  # or one rank waits for ever
    joined = [[i for indices, _ in parts for i in indices] for parts in zip(*ranks, strict=True)]
    assert joined == together


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 8, 9, 13, 24])
def test_evaluation_keeps_every_sample_once(num_ranks: int, size: int) -> None:
    ranks = [
        read(loader(size, batch_size=4, shuffle=False, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)
    ]
    assert sorted(i for batches in ranks for indices, _ in batches for i in indices) == list(range(size))
    assert all(indices for batches in ranks for indices, _ in batches)


def test_a_rank_may_get_nothing_of_the_last_evaluation_batch() -> None:
    ranks = [read(loader(9, batch_size=4, shuffle=False, rank=rank, num_ranks=2)) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [2, 1]


def test_a_dataset_smaller_than_a_batch_is_one_batch() -> None:
    assert [sorted(indices) for indices, _ in read(loader(3))] == [[0, 1, 2]]
    assert [indices for indices, _ in read(loader(3, shuffle=False))] == [[0, 1, 2]]


@pytest.mark.parametrize(("size", "num_ranks"), [(0, 1), (2, 3)])
def test_too_few_samples_for_the_ranks_are_refused(size: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{size} samples"):
        loader(size, num_ranks=num_ranks)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generators_are_left_alone(num_workers: int) -> None:
    np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    read(loader(num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_dataset_says_of_its_files_ends_the_run_with_one_line(num_workers: int) -> None:
    with pytest.raises(ConfigError) as caught:
        read(loader(dataset=Broken(23), num_workers=num_workers))
    assert str(caught.value) == "data: images/7.png: not a readable image"


class Deadly(ArrayDataset):
    """Kills the process that fetches its eighth sample."""

    def __getitems__(self, indices):
        if 7 in indices:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(indices)


def test_a_worker_that_dies_is_one_line() -> None:
    dataset = Deadly(np.zeros((23, 1), dtype=np.float32), np.zeros(23, dtype=np.int64))
    with pytest.raises(RunError, match=r"a worker process died .*data\.num_workers") as caught:
        read(loader(dataset=dataset, num_workers=2))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_array_dataset_hands_out_rows_and_labels() -> None:
    dataset = ArrayDataset(np.arange(12, dtype=np.float32).reshape(4, 3), np.array([3, 2, 1, 0]))
    inputs, labels = dataset.__getitems__([2, 0])
    assert len(dataset) == 4
    assert inputs.tolist() == [[6, 7, 8], [0, 1, 2]]
    assert labels.tolist() == [1, 3]
    assert torch.equal(dataset[2][0], inputs[0])
