"""Handwritten digits that ship with scikit-learn: 1797 real 8x8 images, nothing to download."""

from functools import cache
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np

from permlab.data.hidden import hidden_order, rearranged, true_order
from permlab.data.spec import DataSpec
from permlab.option import AddedLater, Fraction, NonNegativeInt

if TYPE_CHECKING:
    from permlab.data.loader import ArrayDataset


class Digits:
    """UCI handwritten digits, split by seed so that every class has its share in every part.

    Pixels are scaled from 0..16 to 0..1.

    Args:
        val_fraction: part of the images on which models are picked.
        test_fraction: part of the images that is looked at once, at the end.
        shuffle_labels: permute the labels of the training split, by seed: a null experiment, in which nothing can be
            learned from them. Validation and test keep theirs.
        hidden_seed: draws one order in which the pixels of all images lie, for methods to find; null: as they are.
    Raises:
        ValueError: if a fraction is below 0.01, or both leave less than 0.05 to train on.
    Source: scikit-learn `load_digits`; Alpaydin and Kaynak 1998, UCI repository.
    """

    kind: ClassVar[str] = "image"

    def __init__(
        self,
        *,
        val_fraction: Fraction,
        test_fraction: Fraction,
        shuffle_labels: Annotated[bool, AddedLater(False)] = False,
        hidden_seed: Annotated[NonNegativeInt | None, AddedLater(None)] = None,
    ) -> None:
        if min(val_fraction, test_fraction) < 0.01 or val_fraction + test_fraction > 0.95:
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} must each be at least 0.01 "
                "and leave 0.05 for training"
            )
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.shuffle_labels, self.hidden_seed = shuffle_labels, hidden_seed

    def spec(self) -> DataSpec:
        hides = self.hidden_seed is not None
        return DataSpec("image", num_classes=10, channels=1, height=8, width=8, patch_size=1, hides_order=hides)

    def truth(self) -> np.ndarray | None:
        """Order of the pixels, int64 `[64]`, under which images are as they were; None where they are."""
        return None if self.hidden_seed is None else true_order(hidden_order(self.hidden_seed, self.spec()))

    def dataset(self, split: str, seed: int) -> "ArrayDataset":
        """Images float32 [1, 8, 8] and labels of `train`, `val` or `test` under this seed's split."""
        from permlab.data.image import training_labels
        from permlab.data.loader import ArrayDataset

        images, labels = _load()
        index = self._indices(labels, seed)[split]
        images = images[index]
        if self.hidden_seed is not None:
            images = rearranged(images, hidden_order(self.hidden_seed, self.spec()), 1)
        shuffle = self.shuffle_labels and split == "train"
        return ArrayDataset(images, training_labels(labels[index], seed, shuffle=shuffle))

    def _indices(self, labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        from sklearn.model_selection import train_test_split

        everything = np.arange(len(labels))
        rest, test = train_test_split(everything, test_size=self.test_fraction, stratify=labels, random_state=seed)
        share = self.val_fraction / (1 - self.test_fraction)
        train, val = train_test_split(rest, test_size=share, stratify=labels[rest], random_state=seed)
        return {"train": train, "val": val, "test": test}


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images[:, None] / 16).astype(np.float32), digits.target.astype(np.int64)
