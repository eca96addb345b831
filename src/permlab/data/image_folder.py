"""Images in one folder per class: ImageNet, Functional Map of the World, or your own."""

import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from permlab.data.spec import DataSpec
from permlab.option import Fraction, PositiveInt, Verbatim

if TYPE_CHECKING:
    from torchvision.transforms import v2

    from permlab.data.image import FileDataset

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LAYOUT = "images lie in {train,val}/<class>/, a folder test/ being optional"
# Of ImageNet's training images; greyscale takes the average over the channels.
MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolder:
    """Images under `root/train/<class>/`, `root/val/<class>/` and perhaps `root/test/<class>/`.

    Classes are the sorted names of the folders; images may lie in subfolders of their class.
    Without a `test` folder, `val` is the test split and a stratified part of `train`, drawn by
    seed, is validation, so that models are not picked on what they are tested on.

    Validation and test images are resized and cropped at the centre. Training images are
    augmented by (seed, epoch, index); see `permlab.data.image`.

    Args:
        root: folder that holds `train` and `val`.
        image_size: height and width of the crop, in pixels.
        resize: length of the shorter side before the crop at the centre, in pixels.
        channels: 3 for RGB, 1 for greyscale; files are converted.
        patch_size: side of a patch, in pixels, where the model's configuration names none.
        augment: `none`; `flip` mirrors half of the training images; `crop_flip` cuts a random
            part (8 to 100 % of the area, 3:4 to 4:3) instead of the centre, and mirrors.
        normalise: take off ImageNet's mean and divide by its deviation; otherwise pixels are 0..1.
        val_fraction: part of `train` that is validation; without effect where there is `test`.
        on_corrupt: `stop` at the first image that cannot be read, when it is fetched; `skip` decodes
            every image once before training, leaves out those that cannot be read, says how many
            and which is the first, and counts them. Each process does so, with a thread per CPU.
    Raises:
        ValueError: if `resize` is less than `image_size`, or `val_fraction` is not in (0, 0.5].
    Source: crop and flip of `flip`: REOrder, arXiv:2505.23751; `crop_flip`: Szegedy et al. 2014, arXiv:1409.4842.
    Differs from source: REOrder has no validation split besides the one it reports.
    """

    kind: ClassVar[str] = "image"
    known_by_place: ClassVar[bool] = True

    def __init__(
        self,
        *,
        root: Verbatim,
        image_size: PositiveInt,
        resize: PositiveInt,
        channels: Literal[1, 3],
        patch_size: PositiveInt,
        augment: Literal["none", "flip", "crop_flip"],
        normalise: bool,
        val_fraction: Fraction,
        on_corrupt: Literal["stop", "skip"] = "stop",
    ) -> None:
        if resize < image_size:
            raise ValueError(f"resize {resize} is less than image_size {image_size}: the crop would have a border")
        if not 0 < val_fraction <= 0.5:
            raise ValueError(f"val_fraction {val_fraction}: expected more than 0 and at most 0.5")
        self.root, self.image_size, self.resize, self.channels = Path(root), image_size, resize, channels
        self.patch_size, self.augment, self.normalise, self.val_fraction = patch_size, augment, normalise, val_fraction
        self.on_corrupt = on_corrupt
        # Files left out so far, by folder; the order of the others, and so every batch, is the same on all ranks.
        self._skipped: dict[str, int] = {}

    @property
    def num_skipped(self) -> int:
        """Unreadable images left out of the splits that were asked for."""
        return sum(self._skipped.values())

    def idle(self) -> Iterator[tuple[str, str]]:
        """Options without effect, with the reason."""
        if (self.root / "test").is_dir():
            yield "val_fraction", f"the folder {self.root / 'test'}"

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
        from permlab.data.image import FileDataset, stratified_part

        has_test = "test" in self._splits()
        folder = split if has_test else {"train": "train", "val": "train", "test": "val"}[split]
        names, labels = _scan(self.root / folder, self._classes())
        if self.on_corrupt == "skip":
            readable = _readable(self.root / folder, self._classes(), self.channels)
            self._skipped[folder] = int((~readable).sum())
            names, labels = names[readable], labels[readable]
        if folder == "train" and not has_test:
            is_val = stratified_part(labels, self.val_fraction, seed)
            chosen = is_val if split == "val" else ~is_val
            names, labels = names[chosen], labels[chosen]
        mean, sd = self._statistics()
        return FileDataset(
            self.root / folder,
            names,
            labels,
            transform=self._transform(self.augment if split == "train" else "none"),
            channels=self.channels,
            mean=mean,
            sd=sd,
            seed=seed,
        )

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

    def _splits(self) -> list[str]:
        return ["train", "val", *(["test"] if (self.root / "test").is_dir() else [])]

    def _classes(self) -> tuple[str, ...]:
        """Names of the classes, once every split is known to have an image of each."""
        found = {split: _class_folders(self.root / split) for split in self._splits()}
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

    with ThreadPool(os.cpu_count()) as pool:
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
