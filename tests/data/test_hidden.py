"""Images in a hidden order, against loops over their pixels."""

import itertools

import numpy as np
import pytest

from permlab.data.digits import Digits
from permlab.data.hidden import hidden_order, rearranged, true_order
from permlab.data.spec import DataSpec

SPLITS = ("train", "val", "test")


def digits(hidden_seed: int | None) -> Digits:
    return Digits(val_fraction=0.2, test_fraction=0.2, hidden_seed=hidden_seed)


@pytest.mark.parametrize(("height", "width", "side"), [(4, 6, 2), (4, 6, 1), (6, 6, 3), (4, 4, 4)])
def test_blocks_are_moved_whole(height: int, width: int, side: int) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, 2, height, width), dtype=np.uint8)
    rows, columns = height // side, width // side
    order = generator.permutation(rows * columns)
    expected = np.zeros_like(images)
    for place, block in enumerate(order):
        for y, x in itertools.product(range(side), repeat=2):
            there = (place // columns * side + y, place % columns * side + x)
            here = (block // columns * side + y, block % columns * side + x)
            expected[:, :, there[0], there[1]] = images[:, :, here[0], here[1]]
    moved = rearranged(images, order, side)
    assert moved.dtype == np.uint8
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(rearranged(moved, true_order(order), side), images)


def test_the_order_is_a_permutation_that_its_own_seed_draws() -> None:
    spec = DataSpec("image", 10, 1, 28, 28, patch_size=4)
    drawn = [hidden_order(seed, spec) for seed in range(5)]
    assert all(sorted(order) == list(range(49)) for order in drawn)
    assert len({tuple(order) for order in drawn}) == 5
    np.testing.assert_array_equal(hidden_order(3, spec), drawn[3])
    with pytest.raises(ValueError, match="5 does not divide a 28x28 image"):
        hidden_order(0, DataSpec("image", 10, 1, 28, 28, patch_size=5))


@pytest.mark.parametrize("split", SPLITS)
def test_all_digits_lie_in_one_order_whatever_the_seed_of_the_run(split: str) -> None:
    truth = digits(7).truth()
    for seed in (0, 1):
        (plain, labels), (hidden, same) = (digits(hides).dataset(split, seed)[:] for hides in (None, 7))
        assert np.array_equal(labels, same)
        pixels, others = (images.reshape(len(images), 64).numpy() for images in (plain, hidden))
        assert not np.array_equal(others, pixels)
        np.testing.assert_array_equal(others[:, truth], pixels)


def test_nothing_is_hidden_unless_it_is_asked_for() -> None:
    assert digits(None).truth() is None
    assert not digits(None).spec().hides_order
    assert digits(0).spec().hides_order, "zero is a seed"
