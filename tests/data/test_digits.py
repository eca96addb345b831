import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from permlab.data.digits import Digits


def rows(dataset) -> set[bytes]:
    """Images as they lie in memory; the digits hold no two that are equal."""
    return {image.numpy().tobytes() for image in dataset.inputs}


def test_shape_is_known_before_torch_is_imported() -> None:
    code = (
        "import sys; from permlab.data.digits import Digits;"
        "print(Digits(val_fraction=0.2, test_fraction=0.2).spec()); assert 'torch' not in sys.modules"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "num_classes=10, channels=1, height=8, width=8" in output


def test_parts_are_disjoint_complete_and_as_large_as_asked() -> None:
    parts = {split: Digits(val_fraction=0.3, test_fraction=0.1).dataset(split, 0) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 1078, "val": 539, "test": 180}
    every = load_digits().images.astype(np.float32) / 16
    images = [rows(part) for part in parts.values()]
    assert set.union(*images) == {image.tobytes() for image in every}
    assert sum(map(len, images)) == len(every)


def test_every_class_has_its_share_in_every_part() -> None:
    whole = np.bincount(load_digits().target) / 1797
    for split in ("train", "val", "test"):
        labels = Digits(val_fraction=0.2, test_fraction=0.2).dataset(split, 1).labels.numpy()
        assert np.abs(np.bincount(labels) - whole * len(labels)).max() <= 1


def test_labels_belong_to_their_images() -> None:
    digits = load_digits()
    pairs = zip((digits.images / 16).astype(np.float32), digits.target, strict=True)
    label_of = {image.tobytes(): label for image, label in pairs}
    images, labels = Digits(val_fraction=0.2, test_fraction=0.2).dataset("val", 2).__getitems__(range(50))
    assert images.shape == (50, 1, 8, 8)
    assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_split_is_a_function_of_the_seed() -> None:
    digits = Digits(val_fraction=0.2, test_fraction=0.2)
    assert rows(digits.dataset("test", 4)) == rows(digits.dataset("test", 4))
    assert rows(digits.dataset("test", 4)) != rows(digits.dataset("test", 5))


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.46), (0.0, 0.2), (0.2, 0.005)])
def test_fractions_that_empty_a_part_are_refused(val: float, test: float) -> None:
    with pytest.raises(ValueError, match=f"{val} and test_fraction {test}"):
        Digits(val_fraction=val, test_fraction=test)


@pytest.mark.parametrize(("val", "test"), [(0.01, 0.01), (0.01, 0.94), (0.94, 0.01)])
def test_the_most_uneven_fractions_still_work(val: float, test: float) -> None:
    digits = Digits(val_fraction=val, test_fraction=test)
    assert all(len(set(digits.dataset(split, 0).labels.tolist())) == 10 for split in ("train", "val", "test"))


# Labels that say nothing


def test_shuffled_labels_are_those_of_the_training_split_in_another_order() -> None:
    plain, shuffled = (Digits(val_fraction=0.2, test_fraction=0.2, shuffle_labels=on) for on in (False, True))
    for split in ("train", "val", "test"):
        (images, labels), (same_images, others) = (data.dataset(split, 3)[:] for data in (plain, shuffled))
        assert np.array_equal(images, same_images)
        assert np.array_equal(labels, others) == (split != "train")
        assert np.array_equal(np.bincount(labels), np.bincount(others))
    (_, labels), (_, others) = (data.dataset("train", 3)[:] for data in (plain, shuffled))
    # By chance a tenth agrees: 108 of 1,078 with a deviation of 10.
    assert 60 < int((labels == others).sum()) < 160


def test_labels_are_shuffled_by_the_seed() -> None:
    def moved(seed: int) -> list[int]:
        plain, shuffled = (Digits(val_fraction=0.2, test_fraction=0.2, shuffle_labels=on) for on in (False, True))
        pairs = zip(plain.dataset("train", seed).labels, shuffled.dataset("train", seed).labels, strict=True)
        return [int(one != other) for one, other in pairs]

    assert moved(1) == moved(1) != moved(2)
