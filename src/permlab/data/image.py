"""What image datasets share: a part of every class, reading, normalising, and augmentation that can be replayed.

An augmented image is a function of (seed, epoch, index) alone: not of the process that fetches
it, nor of what was fetched before. So a resumed run sees what it would have seen, with any
number of workers or ranks, and fetching leaves the global random state as it was.
"""

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

Augment = Literal["none", "flip", "crop_flip"]

# What Pillow raises for a broken file; zlib and struct errors come from its decoders unchanged.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error, Image.DecompressionBombError)
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
# Black border, in pixels, inside which a small image is cropped at random.
PADDING = 4


def stratified_part(labels: np.ndarray, fraction: float, seed: int, asked: str = "") -> np.ndarray:
    """Boolean mask that picks a fraction of every class, rounded to whole samples.

    Args:
        asked: what was asked for, in the message; empty for `val_fraction`.
    Raises:
        ValueError: if nothing is picked, or nothing is left.
    """
    by_class, place, counts = _shuffled_by_class(labels, seed)
    picked = np.zeros(len(labels), dtype=bool)
    picked[by_class[place < np.rint(fraction * counts)]] = True
    if not picked.any() or picked.all():
        raise ValueError(f"{asked or f'val_fraction {fraction}'} of {len(labels)} images leaves a split empty")
    return picked


def stratified_number(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Boolean mask that picks so many samples, of every class its share, rounded up or down.

    Raises:
        ValueError: if nothing is picked, or nothing is left.
    Example:
        >>> labels = np.array([0, 0, 0, 0, 1, 1])
        >>> np.bincount(labels[stratified_number(labels, 3, seed=0)])
        array([2, 1])
    """
    if not 0 < number < len(labels):
        raise ValueError(f"{number} of {len(labels)} images leaves training or validation empty")
    by_class, place, counts = _shuffled_by_class(labels, seed)
    picked = np.zeros(len(labels), dtype=bool)
    picked[by_class[np.argsort((place + 0.5) / counts, kind="stable")[:number]]] = True
    return picked


def training_labels(labels: np.ndarray, seed: int, *, shuffle: bool) -> np.ndarray:
    """Labels of a training split, or a permutation of them that the seed draws.

    Shapes:
        labels: int64 `[num_images]`.
    Example:
        >>> training_labels(np.arange(4), 0, shuffle=True).tolist()
        [1, 2, 3, 0]
    """
    # The third number keeps this draw apart from those of batches and of augmentation.
    return np.random.default_rng([seed, 0, 2]).permutation(labels) if shuffle else labels


def _shuffled_by_class(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples sorted by class and drawn at random within; of each its place in its class, and the size of that."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_class, place, np.repeat(counts, counts)


def normalise(pixels: Tensor, mean: Sequence[float], sd: Sequence[float]) -> Tensor:
    """Images as float32: scaled from 0..255 to 0..1, the mean taken off, divided by the deviation.

    Shapes:
        pixels: uint8 `[b, c, h, w]`.  mean, sd: one number per channel, on the scale 0..1.
    Example:
        >>> normalise(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), [0.5], [0.5]).flatten()
        tensor([-1.,  1.])
    """
    shift, scale = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (mean, sd))
    return (pixels.float() / 255 - shift) / scale


@dataclass
class PixelBatch:
    """A batch as bytes, a quarter of its floats: so it travels between processes and to the device.

    Shapes:
        pixels: uint8 `[b, c, h, w]`.  labels: int64 `[b]`.
        shift, is_flipped: see `shift_and_flip`; None for images as they are.
        size: height and width to which images are stretched at last; None for their own.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    shift: Tensor | None = None
    is_flipped: Tensor | None = None
    size: tuple[int, int] | None = None

    def finished(self) -> tuple[Tensor, Tensor]:
        """Images moved, mirrored, normalised and stretched, and labels, wherever the batch has been brought."""
        pixels = self.pixels
        if self.shift is not None and self.is_flipped is not None:
            pixels = shift_and_flip(pixels, self.shift, self.is_flipped)
        images = normalise(pixels, self.mean, self.sd)
        if self.size is not None:
            images = F.interpolate(images, size=self.size, mode="bicubic", antialias=True)
        return images, self.labels


class PixelDataset(Dataset):
    """Small images held in memory as bytes; normalised, and perhaps augmented, as they are fetched.

    Shapes:
        pixels: uint8 `[num_images, c, h, w]`.  labels: int64 `[num_images]`.
    Args:
        mean, sd: see `normalise`.
        augment: `flip` mirrors half of the images; `crop_flip` also moves them by up to four
            pixels each way, over a black border.
        seed: of the augmentation.
        size: height and width to which images are stretched, bicubically; None for their own.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray,
        *,
        mean: Sequence[float],
        sd: Sequence[float],
        augment: Augment = "none",
        seed: int = 0,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.pixels, self.labels, self.size = torch.from_numpy(pixels), torch.from_numpy(labels), size
        self.mean, self.sd, self.augment, self.seed = tuple(mean), tuple(sd), augment, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the epoch's augmentation for every image at once."""
        if self.augment == "none":
            return
        # The third number keeps these draws apart from the order of batches, drawn from (seed, epoch).
        rng = np.random.default_rng([self.seed, epoch, 1])
        self.is_flipped = torch.from_numpy(rng.random(len(self)) < 0.5)
        furthest = PADDING if self.augment == "crop_flip" else 0
        self.shift = torch.from_numpy(rng.integers(-furthest, furthest, (len(self), 2), endpoint=True))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.unfinished(indices).finished()

    def unfinished(self, indices: Sequence[int]) -> PixelBatch:
        """A batch as bytes, for whoever finishes it on the device."""
        index = torch.as_tensor(indices)
        batch = PixelBatch(self.pixels[index], self.labels[index], self.mean, self.sd, size=self.size)
        if self.augment != "none":
            batch.shift, batch.is_flipped = self.shift[index], self.is_flipped[index]
        return batch


def shift_and_flip(pixels: Tensor, shift: Tensor, is_flipped: Tensor) -> Tensor:
    """Images moved by whole pixels over black, then mirrored where asked.

    Shapes:
        pixels: `[b, c, h, w]`.  shift: int64 `[b, 2]`, down and right, at most `PADDING` each way.
        is_flipped: bool `[b]`.
    Example:
        >>> shift_and_flip(torch.tensor([[[[1, 2, 3]]]]), torch.tensor([[0, 1]]), torch.tensor([True])).flatten()
        tensor([2, 1, 0])
    """
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (PADDING,) * 4)
    batch, channels, rows, columns = (
        torch.arange(count, device=pixels.device) for count in (*pixels.shape[:2], height, width)
    )
    columns = columns.expand(len(pixels), -1)
    columns = torch.where(is_flipped[:, None], width - 1 - columns, columns) + PADDING - shift[:, 1:]
    rows = rows + PADDING - shift[:, :1]
    return padded[batch[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None]]


class FileDataset(Dataset):
    """Images read from their files as they are fetched.

    Args:
        root: folder that the names are relative to.
        names: of the files, as bytes: one array, where a million Python strings would be copied
            into every worker process bit by bit, by counting references to them.
        labels: int64 `[num_images]`.
        transform: from a Pillow image to uint8 `[c, h, w]`; may draw from torch's CPU generator.
        channels: 1 for greyscale, 3 for RGB.
        mean, sd: see `normalise`.
        seed: of what the transform draws.
        coarse: see `read_image`.
    """

    def __init__(
        self,
        root: Path,
        names: np.ndarray,
        labels: np.ndarray,
        *,
        transform: Callable[[Any], Tensor],
        channels: int,
        mean: Sequence[float],
        sd: Sequence[float],
        seed: int,
        coarse: int | None = None,
    ) -> None:
        self.root, self.names, self.labels = root, names, torch.from_numpy(labels)
        self.transform, self.mode = transform, "L" if channels == 1 else "RGB"
        self.mean, self.sd, self.seed = tuple(mean), tuple(sd), seed
        self.coarse, self.epoch = coarse, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.unfinished(indices).finished()

    def unfinished(self, indices: Sequence[int]) -> PixelBatch:
        """A batch as bytes, for whoever finishes it on the device."""
        return self._batch(indices)

    def sketch(self, indices: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
        """The same as `__getitems__` by JPEG's own coarse steps, several times faster: for a picture, not for a model.

        Args:
            size: shorter side, in pixels, that must be left of a photo.
        """
        return self._batch(indices, size).finished()

    def _batch(self, indices: Sequence[int], coarse: int | None = None) -> PixelBatch:
        pixels = torch.stack([self._fetch(int(index), coarse) for index in indices])
        return PixelBatch(pixels, self.labels[torch.as_tensor(indices)], self.mean, self.sd)

    def _fetch(self, index: int, coarse: int | None) -> Tensor:
        image = read_image(self.root / os.fsdecode(self.names[index]), self.mode, coarse or self.coarse)
        key = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would also reseed an accelerator.
            torch.default_generator.manual_seed(int(key[0]))
            return self.transform(image)


def read_image(path: Path, mode: str, coarse: int | None = None) -> Image.Image:
    """Decoded image, greyscale (mode `L`) or `RGB`.

    Args:
        coarse: a JPEG may be decoded at a half, a quarter or an eighth, no side below so many pixels; None: whole.
    Raises:
        ValueError: naming the file, if it is broken or has more than 8 bits per channel, which
            conversion would clip without a word.
    """
    try:
        with Image.open(path) as image:
            found = image.mode
            if coarse is not None:
                image.draft(None, (coarse, coarse))
            if found in EIGHT_BIT_MODES:
                return image.convert(mode)
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error
    raise ValueError(f"{path}: pixels of type {found}; images need 8 bits per channel")
