"""Images in the idx format of MNIST, and of the data sets that took its place: two files for each split."""

import gzip
import math
import zlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np

from permlab.data.hidden import hidden_order, rearranged, true_order
from permlab.data.spec import DataSpec
from permlab.option import AddedLater, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Verbatim

if TYPE_CHECKING:
    from permlab.data.image import PixelDataset

# How files name the two parts that data sets of this kind come with.
PARTS = {"train": ("train",), "test": ("t10k", "test")}
CONTENTS = {"images": 3, "labels": 1}  # and their axes
UNSIGNED_BYTE = 8


class IdxImages:
    """Greyscale images and labels in idx files, gzipped or not: MNIST, Fashion-MNIST, KMNIST, EMNIST.

    The files are called `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, with `t10k` or
    `test` in place of `train`, perhaps with `.gz` behind and a prefix in front. Validation is
    drawn from the training images by seed, of every class its share. Labels count from the
    smallest that occurs. Images are held in memory as bytes and normalised on the device.

    Args:
        root: folder of the files.
        prefix: what the names of the files begin with, such as `emnist-balanced-`.
        transpose: whether the images lie on their side, as EMNIST's do.
        mean, sd: of the training pixels, on the scale 0..1, with which images are normalised.
        num_val: number of training images that are validation.
        patch_size: side of a patch, in pixels, where the model's configuration names none.
        augment: of training images: `none`; `flip` mirrors half of them; `crop_flip` also moves
            them by up to four pixels over a black border.
        resize: height and width, in pixels, to which images are stretched on the device, bicubically; null leaves
            them as they are. For models with patches that are as large as a part of such an image.
        shuffle_labels: permute the labels of the training split, by seed: a null experiment, in which nothing can be
            learned from them. Validation and test keep theirs.
        hidden_seed: draws one order in which the patches of all images lie, for methods to find; null: as they are.
    Raises:
        ValueError: if `prefix` names a folder, or `hidden_seed` is given with what would move pixels across patches.
    Source: LeCun, Cortes and Burges 1998, the MNIST database.
    """

    kind: ClassVar[str] = "image"

    def __init__(
        self,
        *,
        root: Verbatim,
        prefix: str,
        transpose: bool,
        mean: Fraction,
        sd: PositiveFloat,
        num_val: PositiveInt,
        patch_size: PositiveInt,
        augment: Literal["none", "flip", "crop_flip"],
        resize: Annotated[PositiveInt | None, AddedLater(None)],
        shuffle_labels: Annotated[bool, AddedLater(False)] = False,
        hidden_seed: Annotated[NonNegativeInt | None, AddedLater(None)] = None,
    ) -> None:
        if "/" in prefix:
            raise ValueError(f"prefix {prefix}: expected the beginning of a file's name; root is the folder")
        if hidden_seed is not None and (augment != "none" or resize is not None):
            moved = f"augment {augment}" if augment != "none" else f"resize {resize}"
            raise ValueError(f"hidden_seed {hidden_seed}: {moved} moves pixels across patches; expected none of it")
        self.root, self.prefix, self.transpose = Path(root), prefix, transpose
        self.mean, self.sd, self.num_val = mean, sd, num_val
        self.patch_size, self.augment, self.resize = patch_size, augment, resize
        self.shuffle_labels, self.hidden_seed = shuffle_labels, hidden_seed

    def spec(self) -> DataSpec:
        """Shape of the images and number of classes, from the headers of the images and from the labels.

        Raises:
            ValueError: naming the file that is missing, broken or does not fit the others.
        """
        shapes = {part: _read_header(self._path(part, "images")) for part in PARTS}
        for part, (count, *sides) in shapes.items():
            path, labels = self._path(part, "labels"), self._labels(part)
            if len(labels) != count or count == 0:
                raise ValueError(
                    f"{path}: {len(labels)} labels for {count} images in {self._path(part, 'images').name}"
                )
            if tuple(sides) != shapes["train"][1:]:
                raise ValueError(f"{self._path(part, 'images')}: images of {sides}, and {shapes['train'][1:]} in train")
        if self.num_val >= shapes["train"][0]:
            raise ValueError(f"num_val {self.num_val}: there are {shapes['train'][0]} training images")
        _, *sides = shapes["train"]
        height, width = self._size() or (reversed(sides) if self.transpose else sides)
        hides = self.hidden_seed is not None
        spec = DataSpec("image", self._num_classes(), 1, height, width, self.patch_size, hides_order=hides)
        if hides:
            spec.grid(self.patch_size)  # refuses a patch that does not divide the image
        return spec

    def truth(self) -> np.ndarray | None:
        """Order of the patches, int64 `[n]`, under which images are as they were; None where they are."""
        return None if self.hidden_seed is None else true_order(hidden_order(self.hidden_seed, self.spec()))

    def dataset(self, split: str, seed: int) -> "PixelDataset":
        """Images float32 `[1, height, width]` and labels of `train`, `val` or `test`."""
        from permlab.data.image import PixelDataset, stratified_number, training_labels

        spec = self.spec()
        part = "test" if split == "test" else "train"
        labels = self._labels(part).astype(np.int64) - self._smallest()
        chosen = np.ones(len(labels), dtype=bool)
        if part == "train":
            is_val = stratified_number(labels, self.num_val, seed)
            chosen = is_val if split == "val" else ~is_val
        pixels = _read(self._path(part, "images"))[chosen]
        if self.transpose:
            pixels = np.ascontiguousarray(pixels.swapaxes(1, 2))
        augment = self.augment if split == "train" else "none"
        shuffle = self.shuffle_labels and split == "train"
        pixels, labels = pixels[:, None], training_labels(labels[chosen], seed, shuffle=shuffle)
        if self.hidden_seed is not None:
            pixels = rearranged(pixels, hidden_order(self.hidden_seed, spec), self.patch_size)
        return PixelDataset(
            pixels, labels, mean=(self.mean,), sd=(self.sd,), augment=augment, seed=seed, size=self._size()
        )

    def _size(self) -> tuple[int, int] | None:
        return None if self.resize is None else (self.resize, self.resize)

    def where(self, split: str) -> str:
        """Folder of a split, for messages."""
        return str(self.root)

    def _labels(self, part: str) -> np.ndarray:
        return _read(self._path(part, "labels"))

    def _smallest(self) -> int:
        return min(int(self._labels(part).min()) for part in PARTS)

    def _num_classes(self) -> int:
        """At least 2.

        Raises:
            ValueError: naming the file, if all its labels are the same.
        """
        count = 1 + max(int(self._labels(part).max()) for part in PARTS) - self._smallest()
        if count < 2:
            raise ValueError(f"{self._path('train', 'labels')}: all labels are the same; at least 2 classes are needed")
        return count

    def _path(self, part: str, content: str) -> Path:
        stems = [f"{self.prefix}{name}-{content}-idx{CONTENTS[content]}-ubyte" for name in PARTS[part]]
        paths = [self.root / f"{stem}{end}" for stem in stems for end in ("", ".gz")]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            raise ValueError(
                f"{self.root / stems[0]}: no such file, nor with .gz; `python -m permlab.data get --list` says how "
                "data sets can be had"
            )
        return found


def _read_header(path: Path) -> tuple[int, ...]:
    """Shape of an array."""
    return _shape(path, _read_bytes(path, 4 + 4 * _num_axes(path)))


def _read(path: Path) -> np.ndarray:
    """Array of a file, whole and of the shape that it says; kept, as every split and run asks for it."""
    return _read_version(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read_version(path: Path, modified: int) -> np.ndarray:
    content = _read_bytes(path, -1)
    shape = _shape(path, content)
    start = 4 + 4 * len(shape)
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path}: truncated or too long, {len(content) - start} bytes for {math.prod(shape)} values")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _read_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file, or all for -1."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            return file.read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error


def _num_axes(path: Path) -> int:
    return CONTENTS["images" if "-images-" in path.name else "labels"]


def _shape(path: Path, content: bytes) -> tuple[int, ...]:
    """Shape that a file's first bytes tell."""
    num_axes = _num_axes(path)
    if content[:4] != bytes([0, 0, UNSIGNED_BYTE, num_axes]) or len(content) < 4 + 4 * num_axes:
        raise ValueError(f"{path}: is no idx file of bytes with {num_axes} axes")
    return tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=num_axes, offset=4))
