"""CIFAR-10 from its binary files: 60000 colour images of 32x32 pixels in ten classes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np

from permlab.data.spec import DataSpec
from permlab.option import AddedLater, Fraction, Verbatim

if TYPE_CHECKING:
    from permlab.data.image import PixelDataset

TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)
NUM_CLASSES, SIZE = 10, 32
RECORD = 1 + 3 * SIZE * SIZE  # label, then the red, green and blue plane
# Of the 50000 training images.
MEAN, SD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Cifar10:
    """CIFAR-10, the binary version; the Python version is pickled and therefore not read.

    The five training batches are divided into train and validation by seed, class by class; the
    test batch is the test split. Channels are normalised with the mean and deviation of the
    training images.

    Args:
        root: folder that holds `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`.
        val_fraction: part of the training batches that is validation.
        augment: of training images: `none`; `flip` mirrors half of them; `crop_flip` also moves
            them by up to four pixels over a black border.
        shuffle_labels: permute the labels of the training split, by seed: a null experiment, in which nothing can be
            learned from them. Validation and test keep theirs.
    Raises:
        ValueError: if `val_fraction` is not in (0, 0.5].
    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".
    """

    kind: ClassVar[str] = "image"

    def __init__(
        self,
        *,
        root: Verbatim,
        val_fraction: Fraction,
        augment: Literal["none", "flip", "crop_flip"],
        shuffle_labels: Annotated[bool, AddedLater(False)] = False,
    ) -> None:
        if not 0 < val_fraction <= 0.5:
            raise ValueError(f"val_fraction {val_fraction}: expected more than 0 and at most 0.5")
        self.root, self.val_fraction, self.augment = Path(root), val_fraction, augment
        self.shuffle_labels = shuffle_labels

    def spec(self) -> DataSpec:
        """Shape of the images, once all files are there and whole.

        Raises:
            ValueError: naming the file that is missing or truncated.
        """
        for name in (*TRAIN_FILES, *TEST_FILES):
            path = self.root / name
            if not path.is_file():
                raise ValueError(f"{path}: no such file; needed are {', '.join((*TRAIN_FILES, *TEST_FILES))}")
            num_bytes = path.stat().st_size
            if num_bytes == 0 or num_bytes % RECORD:
                raise ValueError(f"{path}: truncated, {num_bytes} bytes are not a whole number of {RECORD}-byte images")
        return DataSpec("image", NUM_CLASSES, channels=3, height=SIZE, width=SIZE, patch_size=4)

    def dataset(self, split: str, seed: int) -> "PixelDataset":
        """Images float32 `[3, 32, 32]` and labels of `train`, `val` or `test`."""
        from permlab.data.image import PixelDataset, stratified_part, training_labels

        self.spec()
        files = {"train": TRAIN_FILES, "val": TRAIN_FILES, "test": TEST_FILES}[split]
        records = np.concatenate([_read(self.root / name) for name in files])
        labels = records[:, 0].astype(np.int64)
        if split != "test":
            is_val = stratified_part(labels, self.val_fraction, seed)
            chosen = is_val if split == "val" else ~is_val
            records, labels = records[chosen], labels[chosen]
        pixels = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, SIZE, SIZE)
        labels = training_labels(labels, seed, shuffle=self.shuffle_labels and split == "train")
        augment = self.augment if split == "train" else "none"
        return PixelDataset(pixels, labels, mean=MEAN, sd=SD, augment=augment, seed=seed)


def _read(path: Path) -> np.ndarray:
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, RECORD)
    if records[:, 0].max() >= NUM_CLASSES:
        raise ValueError(f"{path}: holds the label {records[:, 0].max()}; expected 0 to {NUM_CLASSES - 1}")
    return records
