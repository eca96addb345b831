"""MedMNIST: medical images of 28, 64, 128 or 224 pixels, one npz file per dataset."""

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from numpy.lib import format as npy

from permlab.data.spec import DataSpec
from permlab.option import AddedLater, Verbatim

if TYPE_CHECKING:
    from permlab.data.image import PixelDataset

SPLITS = ("train", "val", "test")
UNREADABLE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)


class Medmnist:
    """One of the 2-D MedMNIST datasets, greyscale or RGB, with the splits that it comes with.

    Image size, channels and number of classes are read from the file. Pixels are scaled to
    -1..1. Nothing is unpickled.

    Args:
        root: folder that holds the files.
        flag: name of the file without `.npz`, such as `pathmnist` or `pathmnist_64`.
        shuffle_labels: permute the labels of the training split, by seed: a null experiment, in which nothing can be
            learned from them. Validation and test keep theirs.
    Source: Yang et al. 2023, Scientific Data 10:41, arXiv:2110.14795.
    Differs from source: multi-label sets (chestmnist) and volumes are refused.
    """

    kind: ClassVar[str] = "image"

    def __init__(
        self, *, root: Verbatim, flag: str, shuffle_labels: Annotated[bool, AddedLater(False)] = False
    ) -> None:
        self.path, self.shuffle_labels = Path(root, f"{flag}.npz"), shuffle_labels

    def spec(self) -> DataSpec:
        """Shape of the images, from the headers of the arrays, and number of classes, from the labels.

        Raises:
            ValueError: naming the file, if it is missing or broken or holds something else.
        """
        shapes = {split: self._image_shape(split) for split in SPLITS}
        labels = {split: self._labels(split) for split in SPLITS}
        for split in SPLITS:
            if len(labels[split]) != shapes[split][0] or len(labels[split]) == 0:
                raise ValueError(f"{self.path}: {split} has {shapes[split][0]} images and {len(labels[split])} labels")
            if shapes[split][1:] != shapes["train"][1:]:
                raise ValueError(f"{self.path}: images of {split} and train differ in shape")
        _, height, width, channels = shapes["train"]
        num_classes = 1 + max(int(part.max()) for part in labels.values())
        if num_classes < 2:
            raise ValueError(f"{self.path}: every label is 0; at least 2 classes are needed")
        return DataSpec("image", num_classes, channels, height, width, _patch_size(height, width))

    def dataset(self, split: str, seed: int) -> "PixelDataset":
        """Images float32 `[channels, height, width]` and labels of `train`, `val` or `test`.

        The seed has no say but in `shuffle_labels`.
        """
        from permlab.data.image import PixelDataset, training_labels

        pixels = self._read(f"{split}_images").reshape(self._image_shape(split))
        mean = sd = (0.5,) * pixels.shape[-1]
        pixels = np.ascontiguousarray(np.moveaxis(pixels, -1, 1))
        shuffle = self.shuffle_labels and split == "train"
        return PixelDataset(pixels, training_labels(self._labels(split), seed, shuffle=shuffle), mean=mean, sd=sd)

    def _image_shape(self, split: str) -> tuple[int, int, int, int]:
        """Number, height, width and channels of a split's images, without reading them."""
        shape, dtype = self._header(f"{split}_images")
        if len(shape) == 3:
            shape = (*shape, 1)
        if len(shape) != 4 or shape[-1] not in (1, 3) or dtype != np.uint8:
            raise ValueError(
                f"{self.path}: {split}_images is {dtype} {list(shape)}; "
                "expected uint8 [number, height, width], or a last axis of 3 for RGB"
            )
        return shape

    def _labels(self, split: str) -> np.ndarray:
        labels = self._read(f"{split}_labels")
        if labels.ndim == 2 and labels.shape[1] > 1:
            raise ValueError(f"{self.path}: {labels.shape[1]} labels per image; only one is supported")
        labels = labels.reshape(len(labels))
        if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
            raise ValueError(f"{self.path}: {split}_labels is not made of whole numbers from 0")
        return labels.astype(np.int64)

    def _header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        self._check_exists()
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
                read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = read(file)
        except KeyError:
            raise ValueError(f"{self.path}: has no array {name}") from None
        except UNREADABLE as error:
            raise ValueError(f"{self.path}: {name} cannot be read ({error})") from error
        return shape, dtype

    def _read(self, name: str) -> np.ndarray:
        self._check_exists()
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return arrays[name]
        except KeyError:
            raise ValueError(f"{self.path}: has no array {name}") from None
        except UNREADABLE as error:
            raise ValueError(f"{self.path}: {name} cannot be read ({error})") from error

    def _check_exists(self) -> None:
        if not self.path.is_file():
            present = sorted(path.name for path in self.path.parent.glob("*.npz"))
            raise ValueError(f"{self.path}: no such file; npz files there: {', '.join(present) or 'none'}")


def _patch_size(height: int, width: int) -> int:
    """Largest of 16, 8, 4, 2 and 1 that cuts the image into at least 7x7 patches: 4 at 28 pixels, 16 at 224."""
    sizes = (size for size in (16, 8, 4, 2) if height % size == 0 == width % size and min(height, width) // size >= 7)
    return next(sizes, 1)
