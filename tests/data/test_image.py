import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from permlab.data.image import (
    PixelDataset,
    normalise,
    read_image,
    shift_and_flip,
    stratified_number,
    stratified_part,
)

COLOUR = (204, 102, 51)  # of the palette that conversion to mode P uses


def pixel_dataset(augment: str, seed: int = 0, size: int = 400) -> PixelDataset:
    pixels = np.random.default_rng(1).integers(1, 256, (size, 3, 6, 5), dtype=np.uint8)
    labels = np.arange(size) % 7
    return PixelDataset(pixels, labels, mean=(0.5, 0.4, 0.3), sd=(0.2, 0.3, 0.4), augment=augment, seed=seed)


def restored(dataset: PixelDataset, indices) -> torch.Tensor:
    """Pixels 0..255 as augmented."""
    images = dataset.__getitems__(indices)[0]
    return ((images * torch.tensor(dataset.sd).view(3, 1, 1) + torch.tensor(dataset.mean).view(3, 1, 1)) * 255).round()


def test_stratified_part_takes_its_share_of_every_class() -> None:
    counts = [100, 40, 7, 1]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))
    picked = stratified_part(labels, 0.25, seed=0)
    assert np.bincount(labels[picked], minlength=4).tolist() == [25, 10, 2, 0]
    assert np.array_equal(picked, stratified_part(labels, 0.25, seed=0))
    assert not np.array_equal(picked, stratified_part(labels, 0.25, seed=1))


@pytest.mark.parametrize("number", [1, 17, 100])
def test_stratified_number_is_exact_and_gives_every_class_its_share(number: int) -> None:
    counts = np.array([100, 40, 7, 1])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))
    picked = stratified_number(labels, number, seed=0)
    assert picked.sum() == number
    share = number * counts / counts.sum()
    assert (np.abs(np.bincount(labels[picked], minlength=4) - share) <= 1).all()
    assert not np.array_equal(picked, stratified_number(labels, number, seed=1))


@pytest.mark.parametrize("number", [0, 10, 11])
def test_a_number_without_images_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"{number} of 10 images"):
        stratified_number(np.zeros(10, dtype=np.int64), number, seed=0)


def test_stratified_part_is_uniform_within_a_class() -> None:
    labels = np.array([0] * 8 + [1] * 4)
    hits = sum(stratified_part(labels, 0.25, seed).astype(int) for seed in range(800))
    assert np.abs(hits / 800 - 0.25).max() < 0.07  # about four and a half standard errors


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], []])
def test_a_part_without_images_is_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"val_fraction 0\.1"):
        stratified_part(np.array(labels, dtype=np.int64), 0.1, seed=0)


def test_normalise_agrees_with_torchvision() -> None:
    pixels = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, sd = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = tv.normalize(tv.to_dtype(pixels, torch.float32, scale=True), list(mean), list(sd))
    torch.testing.assert_close(normalise(pixels, mean, sd), expected)


def test_shift_and_flip_agrees_with_pixel_by_pixel_copying() -> None:
    pixels = torch.randint(1, 256, (20, 3, 6, 5), dtype=torch.uint8)
    shift, is_flipped = torch.randint(-4, 5, (20, 2)), torch.rand(20) < 0.5
    expected = torch.zeros_like(pixels)
    for b in range(20):
        down, right = shift[b].tolist()
        for i in range(6):
            for j in range(5):
                column = 4 - j if is_flipped[b] else j
                source_row, source_column = i - down, column - right
                if 0 <= source_row < 6 and 0 <= source_column < 5:
                    expected[b, :, i, j] = pixels[b, :, source_row, source_column]
    assert torch.equal(shift_and_flip(pixels, shift, is_flipped), expected)


def test_images_are_as_stored_without_augmentation() -> None:
    dataset = pixel_dataset("none")
    dataset.set_epoch(3)
    assert torch.equal(restored(dataset, [5, 2]), dataset.pixels[[5, 2]].float())
    assert dataset.__getitems__([5, 2])[1].tolist() == [5, 2]


def test_flip_mirrors_about_half() -> None:
    dataset = pixel_dataset("flip")
    images, originals = restored(dataset, range(400)), dataset.pixels.float()
    same = (images == originals).flatten(1).all(1)
    mirrored = (images == originals.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250  # five standard errors


def test_crop_moves_by_up_to_four_pixels() -> None:
    dataset = pixel_dataset("crop_flip", size=2000)
    assert sorted(set(dataset.shift.flatten().tolist())) == list(range(-4, 5))
    borders = (restored(dataset, range(2000)) == 0).flatten(1).any(1)
    assert borders.float().mean() > 0.9  # all but one image in 81


@pytest.mark.parametrize("augment", ["flip", "crop_flip"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(augment: str) -> None:
    def images(seed: int, epoch: int, indices) -> torch.Tensor:
        dataset = pixel_dataset(augment, seed)
        dataset.set_epoch(epoch)
        return dataset.__getitems__(indices)[0]

    state = torch.get_rng_state()
    whole = images(0, 1, range(60))
    assert torch.equal(images(0, 1, [40, 7]), whole[[40, 7]])
    assert not torch.equal(images(0, 2, range(60)), whole)
    assert not torch.equal(images(1, 1, range(60)), whole)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_a_batch_travels_as_bytes_and_is_finished_to_the_same_floats(augment: str) -> None:
    dataset = pixel_dataset(augment)
    batch = dataset.unfinished([5, 3, 9])
    assert batch.pixels.dtype == torch.uint8
    assert torch.equal(batch.pixels, dataset.pixels[[5, 3, 9]])
    for one, other in zip(batch.finished(), dataset.__getitems__([5, 3, 9]), strict=True):
        assert torch.equal(one, other)


def test_augmentation_is_not_tied_to_the_order_of_batches() -> None:
    """Both are drawn from seed and epoch; the same stream would mirror the same places of every epoch."""
    order = np.random.default_rng([0, 0]).permutation(400)
    flipped = pixel_dataset("flip").is_flipped.numpy()[order]
    assert abs(np.corrcoef(flipped, np.arange(400))[0, 1]) < 0.2


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK"])
def test_eight_bit_images_are_converted(tmp_path, mode: str) -> None:
    image = Image.new("RGB", (3, 2), COLOUR).convert(mode)
    path = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(path)
    red, green, blue = read_image(path, "RGB").getpixel((0, 0))
    grey = read_image(path, "L").getpixel((2, 1))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    assert abs(grey - luma) <= 1
    if mode != "L":
        assert np.abs(np.subtract((red, green, blue), COLOUR)).max() <= 1


def test_deeper_pixels_are_refused(tmp_path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((2, 2), 40000, dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"deep\.png.*8 bits"):
        read_image(path, "L")


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp", "tif"])
def test_broken_files_are_named(tmp_path, extension: str) -> None:
    path = tmp_path / f"broken.{extension}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    for part in (content[: len(content) // 2], content[:20], b"no image", b""):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=rf"broken\.{extension}: not a readable image"):
            read_image(path, "RGB")
