import numpy as np
import pytest
import torch

from permlab.data.loader import Loader
from permlab.data.text import TokenWindows


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize(("num_tokens", "length"), [(20, 4), (24, 4), (25, 4), (7, 1), (5, 4), (13, 5)])
def test_windows_are_the_tokens_in_turn_and_targets_their_successors(num_tokens: int, length: int, dtype) -> None:
    tokens = np.random.default_rng(0).integers(0, 200, num_tokens).astype(dtype)
    windows = TokenWindows(tokens, sequence_length=length, where="here")
    inputs, targets = windows.__getitems__(range(len(windows)))
    assert inputs.dtype == targets.dtype == torch.int64
    seen = []
    for row, successors in zip(inputs.tolist(), targets.tolist(), strict=True):
        start = len(seen)
        assert row == [int(tokens[start + i]) for i in range(length)]
        assert successors == [int(tokens[start + i + 1]) for i in range(length)]
        seen += [*row, successors[-1]]
    assert 0 <= num_tokens - len(seen) <= length


def test_samples_come_in_the_order_asked_for_and_may_be_written_to() -> None:
    windows = TokenWindows(np.arange(30), sequence_length=2, where="here")
    inputs, targets = windows.__getitems__([7, 0, 7])
    assert inputs.tolist() == [[21, 22], [0, 1], [21, 22]]
    assert targets.tolist() == [[22, 23], [1, 2], [22, 23]]
    inputs.zero_()
    assert [part.tolist() for part in windows[7]] == [[21, 22], [22, 23]]


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="a/b: 4 tokens are less than the 5 that sequence_length 4 needs"):
        TokenWindows(np.arange(4), sequence_length=4, where="a/b")
    with pytest.raises(ValueError, match="0 tokens"):
        TokenWindows(np.zeros(0, dtype=np.uint8), sequence_length=1, where="a/b")


def test_workers_change_nothing() -> None:
    windows = TokenWindows(np.arange(60, dtype=np.int32), sequence_length=3, where="here")

    def batches(num_workers: int) -> list[list]:
        loader = Loader(windows, batch_size=4, seed=1, shuffle=True, num_workers=num_workers)
        return [[inputs.tolist(), targets.tolist()] for inputs, targets in loader]

    assert batches(2) == batches(0)
    assert sorted(row[0] for inputs, _ in batches(0) for row in inputs)[1] in (4, 8, 12, 16)
