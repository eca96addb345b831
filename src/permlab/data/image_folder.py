"""Images in one folder per class: ImageNet, Functional Map of the World, or your own."""

import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np

from permlab.data.cores import count_cores
from permlab.data.spec import DataSpec
from permlab.option import AddedLater, Fraction, PositiveInt, Verbatim

if TYPE_CHECKING:
    from torchvision.transforms import v2

    from permlab.data.image import FileDataset

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LAYOUT = "images lie in train/<class>/, folders val/ and test/ being optional"
# Of ImageNet's training images; greyscale takes the average over the channels.
MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolder:
    """Images under `root/train/<class>/`, and perhaps `root/val/<class>/` and `root/test/<class>/`.

    Classes are the sorted names of the folders; images may lie in subfolders of their class. A
    folder `val` is validation and a folder `test` is the test split. A split without a folder is a
    stratified part of `train`, drawn by seed. With `val_is_test`, and without a folder `test`, `val`
    is the test split, as is usual with published data, and a part of `train` is validation, so that
    models are not picked on what they are tested on.

    Validation and test images are resized and cropped at the centre. Training images are
    augmented by (seed, epoch, index); see `permlab.data.image`.

    Args:
        root: folder that holds `train`, and perhaps `val` and `test`.
        image_size: height and width of the crop, in pixels.
        resize: length of the shorter side before the crop at the centre, in pixels; null for 8/7 of `image_size`.
        channels: 3 for RGB, 1 for greyscale; files are converted.
        patch_size: side of a patch, in pixels, where the model's configuration names none.
        augment: `none`; `flip` mirrors half of the training images; `crop_flip` cuts a random
            part (8 to 100 % of the area, 3:4 to 4:3) instead of the centre, and mirrors.
        normalise: take off ImageNet's mean and divide by its deviation; otherwise pixels are 0..1.
        val_fraction: part of `train` that is validation, where no folder is.
        test_fraction: part of `train` that is the test split, where no folder is.
        on_corrupt: `stop` at the first image that cannot be read, when it is fetched; `skip` decodes
            every image once before training, leaves out those that cannot be read, says how many
            and which is the first, and counts them. Each process does so, with a thread per CPU.
        draft: decode a JPEG at a half, a quarter or an eighth where twice the wanted sides are left: nearly the same
            pixels, several times faster on photos. Without effect on training images with `crop_flip`, whose
            crops may be small.
        val_is_test: whether the folder `val` is the test split where there is no folder `test`.
        shuffle_labels: permute the labels of the training split, by seed: a null experiment, in which nothing can be
            learned from them. Validation and test keep theirs.
    Raises:
        ValueError: if `resize` is less than `image_size`, or a fraction is not in (0, 0.5].
    Source: crop and flip of `flip`: REOrder, arXiv:2505.23751; `crop_flip`: Szegedy et al. 2014, arXiv:1409.4842.
    Differs from source: REOrder has no validation split besides the one it reports.
    """

    kind: ClassVar[str] = "image"
    known_by_place: ClassVar[bool] = True
    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "test_fraction": ("val_is_test", [True]),
    }

    def __init__(
        self,
        *,
        root: Verbatim,
        image_size: PositiveInt,
        resize: PositiveInt | None,
        channels: Literal[1, 3],
        patch_size: PositiveInt,
        augment: Literal["none", "flip", "crop_flip"],
        normalise: bool,
        val_fraction: Fraction,
        on_corrupt: Literal["stop", "skip"] = "stop",
        test_fraction: Annotated[Fraction, AddedLater(0.1)] = 0.1,
        val_is_test: Annotated[bool, AddedLater(True)] = True,
        draft: Annotated[bool, AddedLater(False)] = False,
        shuffle_labels: Annotated[bool, AddedLater(False)] = False,
    ) -> None:
        resize = round(image_size * 8 / 7) if resize is None else resize
        if resize < image_size:
            raise ValueError(f"resize {resize} is less than image_size {image_size}: the crop would have a border")
        for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < fraction <= 0.5:
                raise ValueError(f"{name} {fraction}: expected more than 0 and at most 0.5")
        self.root, self.image_size, self.resize, self.channels = Path(root), image_size, resize, channels
        self.patch_size, self.augment, self.normalise = patch_size, augment, normalise
        self.fractions = {"test": test_fraction, "val": val_fraction}
        self.on_corrupt, self.val_is_test, self.draft = on_corrupt, val_is_test, draft
        self.shuffle_labels = shuffle_labels
        # Files left out so far, by folder; the order of the others, and so every batch, is the same on all ranks.
        self._skipped: dict[str, int] = {}

    @property
    def num_skipped(self) -> int:
        """Unreadable images left out of the splits that were asked for."""
        return sum(self._skipped.values())

    def idle(self) -> Iterator[tuple[str, str]]:
        """Options without effect, with the reason."""
        for split in self.fractions:
            if self.folder(split) == split:
                yield f"{split}_fraction", f"the folder {self.root / split}"
        if self.folder("test") == "test":
            yield "val_is_test", f"the folder {self.root / 'test'}"

    def complete(self) -> dict[str, int]:
        """Values of options that were left open."""
        return {"resize": self.resize}

    def folder(self, split: str) -> str:
        """Name of the folder that `train`, `val` or `test` is in, alone or with others."""
        has = {name for name in ("val", "test") if (self.root / name).is_dir()}
        if self.val_is_test and "test" not in has:
            return {"train": "train", "val": "train", "test": "val"}[split]
        return split if split in has else "train"

    def where(self, split: str) -> str:
        """Folder of a split, for messages."""
        return str(self.root / self.folder(split))

    def spec(self) -> DataSpec:
        """Shape of the images, and the number of class folders.

        Raises:
            ValueError: naming the folder that is missing or holds no image, or the class that
                one split has and another has not.
        """
        size = self.image_size
        return DataSpec("image", len(self._classes()), self.channels, size, size, self.patch_size)

    def dataset(self, split: str, seed: int) -> "FileDataset":
        """Images float32 `[channels, image_size, image_size]` and labels of `train`, `val` or `test`."""
        from permlab.data.image import FileDataset, training_labels

        folder = self.folder(split)
        names, labels = _scan(self.root / folder, self._classes())
        if self.on_corrupt == "skip":
            readable = _readable(self.root / folder, self._classes(), self.channels)
            self._skipped[folder] = int((~readable).sum())
            names, labels = names[readable], labels[readable]
        chosen = self._part(split, labels, seed)
        shuffle = self.shuffle_labels and split == "train"
        names, labels = names[chosen], training_labels(labels[chosen], seed, shuffle=shuffle)
        mean, sd = self._statistics()
        augment = self.augment if split == "train" else "none"
        return FileDataset(
            self.root / folder,
            names,
            labels,
            transform=self._transform(augment),
            channels=self.channels,
            mean=mean,
            sd=sd,
            seed=seed,
            coarse=2 * self.resize if self.draft and augment != "crop_flip" else None,
        )

    def _part(self, split: str, labels: np.ndarray, seed: int) -> np.ndarray:
        """Mask of the images in the split's folder that are the split's."""
        from permlab.data.image import stratified_part

        left = np.ones(len(labels), dtype=bool)
        if self.folder(split) != "train":
            return left
        whole = 1.0
        for other in (name for name in self.fractions if self.folder(name) == "train"):
            # A fraction is of all the images, not of what another split has left.
            picked = left.copy()
            asked = f"{other}_fraction {self.fractions[other]}"
            picked[left] = stratified_part(labels[left], self.fractions[other] / whole, seed, asked)
            if other == split:
                return picked
            left &= ~picked
            whole -= self.fractions[other]
        return left

    def _statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and deviation per channel that images are normalised with."""
        if not self.normalise:
            return (0.0,) * self.channels, (1.0,) * self.channels
        return (MEAN, SD) if self.channels == 3 else ((sum(MEAN) / 3,), (sum(SD) / 3,))

    def _transform(self, augment: str) -> "v2.Compose":
        from torchvision.transforms import v2

        cut = [v2.Resize(self.resize), v2.CenterCrop(self.image_size)]
        if augment == "crop_flip":
            cut = [v2.RandomResizedCrop(self.image_size)]
        flip = [] if augment == "none" else [v2.RandomHorizontalFlip()]
        return v2.Compose([*cut, *flip, v2.PILToTensor()])

    def _classes(self) -> tuple[str, ...]:
        """Names of the classes, once every folder is known to have an image of each."""
        folders = dict.fromkeys(["train", *map(self.folder, ("val", "test"))])
        found = {folder: _class_folders(self.root / folder) for folder in folders}
        for split, classes in found.items():
            for one, other in (("train", split), (split, "train")):
                missing = sorted(set(found[one]) - set(found[other]))
                if missing:
                    raise ValueError(f"{self.root}: class {missing[0]} is in {one}/ but not in {other}/")
            for name in classes:
                if next(_images(self.root / split / name), None) is None:
                    extensions = " ".join(EXTENSIONS)
                    raise ValueError(f"{self.root / split / name}: holds no image ({extensions})")
        return tuple(found["train"])


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; {LAYOUT}")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    if len(classes) < 2:
        raise ValueError(f"{folder}: holds {len(classes)} class folders, at least 2 are needed; {LAYOUT}")
    return classes


def _images(folder: Path) -> Iterator[str]:
    """Paths of the images in a folder and below it."""
    for path, _, files in os.walk(folder):
        yield from (os.path.join(path, f) for f in files if f.lower().endswith(EXTENSIONS) and f[0] != ".")


@cache
def _scan(folder: Path, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Names of all images, relative to the folder and sorted within each class, and their labels."""
    names, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(os.fsencode(os.path.relpath(path, folder)) for path in _images(folder / name))
        names += found
        labels += [label] * len(found)
    return np.array(names), np.array(labels, dtype=np.int64)


@cache
def _readable(folder: Path, classes: tuple[str, ...], channels: int) -> np.ndarray:
    """Mask of the images of `_scan` that can be decoded; a warning says what is left out.

    Raises:
        ValueError: naming the folder of a class of which nothing is left.
    """
    from permlab.data.image import read_image

    names, labels = _scan(folder, classes)
    mode = "L" if channels == 1 else "RGB"

    def problem(name: bytes) -> str | None:
        try:
            read_image(folder / os.fsdecode(name), mode)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPool(count_cores()) as pool:
        problems = pool.map(problem, names)
    readable = np.array([found is None for found in problems])
    empty = sorted(set(range(len(classes))) - set(labels[readable].tolist()))
    if empty:
        first = next(found for found, label in zip(problems, labels, strict=True) if label == empty[0])
        raise ValueError(f"{folder / classes[empty[0]]}: holds no readable image; the first: {first}")
    if not readable.all():
        first = next(found for found in problems if found is not None)
        warnings.warn(
            f"data.on_corrupt=skip: {(~readable).sum()} of {len(names)} images in {folder} left out; "
            f"the first: {first}",
            stacklevel=2,
        )
    return readable
