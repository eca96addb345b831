import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from permlab.config.compose import resolve_train
from permlab.config.identity import digest
from permlab.data.image_folder import ImageFolder
from permlab.data.loader import Loader

CLASSES, SPLITS = ("ant", "bee", "cat"), ("train", "val", "test")
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)


def write_image(path: Path, seed: int, size: tuple[int, int] = (24, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def write_folder(root: Path, splits: tuple[str, ...] = ("train", "val"), num: int = 8) -> Path:
    """Noise images whose files carry every extension in turn; `num` per class to train on, half to validate."""
    extensions = ("png", "JPEG", "bmp", "tif", "webp", "jpg")
    for split in splits:
        for label, name in enumerate(CLASSES):
            for i in range(num if split == "train" else num // 2):
                write_image(
                    root / split / name / f"{i}.{extensions[i % 6]}", 1000 * label + 100 * SPLITS.index(split) + i
                )
    return root


def make_files(root: Path) -> dict[str, Any]:
    """What the battery of every data set reads; settings that go with it."""
    write_folder(root, num=6)
    return {"image_size": 16, "resize": 20, "patch_size": 4, "val_fraction": 0.25}


def folder(root: Path, **options) -> ImageFolder:
    defaults = {
        "root": str(root),
        "image_size": 16,
        "resize": 20,
        "channels": 3,
        "patch_size": 4,
        "augment": "none",
        "normalise": False,
        "val_fraction": 0.25,
    }
    return ImageFolder(**defaults | options)


def names(dataset) -> set[str]:
    return {os.path.join(dataset.root.name, os.fsdecode(name)) for name in dataset.names}


def test_shape_is_known_before_torch_is_imported(tmp_path: Path) -> None:
    write_folder(tmp_path)
    code = (
        "import sys; from permlab.data.image_folder import ImageFolder;"
        f"print(ImageFolder(root={str(tmp_path)!r}, image_size=16, resize=20, channels=1, patch_size=8,"
        "augment='none', normalise=True, val_fraction=0.25).spec());"
        "assert not {'torch', 'PIL', 'torchvision'} & set(sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "num_classes=3, channels=1, height=16, width=16, patch_size=8" in output


def test_without_a_test_folder_validation_is_a_part_of_train(tmp_path: Path) -> None:
    data = folder(write_folder(tmp_path))
    parts = {split: data.dataset(split, 0) for split in ("train", "val", "test")}
    assert np.bincount(parts["train"].labels).tolist() == [6, 6, 6]
    assert np.bincount(parts["val"].labels).tolist() == [2, 2, 2]
    assert names(parts["train"]) | names(parts["val"]) == {
        str(path.relative_to(tmp_path)) for path in (tmp_path / "train").rglob("*.*")
    }
    assert names(parts["test"]) == {str(path.relative_to(tmp_path)) for path in (tmp_path / "val").rglob("*.*")}
    assert names(data.dataset("val", 1)) != names(parts["val"])


def test_with_a_test_folder_every_split_is_its_folder(tmp_path: Path) -> None:
    data = folder(write_folder(tmp_path, ("train", "val", "test")))
    for split, num in (("train", 24), ("val", 12), ("test", 12)):
        dataset = data.dataset(split, 0)
        assert len(dataset) == num
        assert dataset.root == tmp_path / split


@pytest.mark.parametrize(
    ("folders", "places", "sizes"),
    [
        (("train",), ("train", "train", "train"), (36, 12, 12)),
        (("train", "val"), ("train", "val", "train"), (48, 30, 12)),
        (("train", "test"), ("train", "train", "test"), (48, 12, 30)),
        (("train", "val", "test"), SPLITS, (60, 30, 30)),
    ],
)
def test_folders_of_ones_own_are_what_they_are_called(tmp_path: Path, folders, places, sizes) -> None:
    """And what has no folder is a part of train, of every class the same number, apart from the others."""
    data = folder(write_folder(tmp_path, folders, num=20), val_is_test=False, val_fraction=0.2, test_fraction=0.2)
    parts = {split: data.dataset(split, 3) for split in SPLITS}
    assert tuple(len(parts[split]) for split in SPLITS) == sizes
    assert tuple(parts[split].root.name for split in SPLITS) == places
    assert [data.where(split) for split in SPLITS] == [str(tmp_path / place) for place in places]
    whole = [name for part in parts.values() for name in names(part)]
    assert len(whole) == len(set(whole)) == sum(sizes)
    for split, place in zip(SPLITS, places, strict=True):
        assert len(set(np.bincount(parts[split].labels).tolist())) == 1
        same = names(data.dataset(split, 4)) == names(parts[split])
        assert same == (place == split and (split != "train" or len(folders) == 3)), split


def test_what_has_no_effect_because_of_folders_is_said(tmp_path: Path) -> None:
    own = {"val_is_test": False}
    assert [option for option, _ in folder(write_folder(tmp_path, ("train",)), **own).idle()] == []
    assert [option for option, _ in folder(write_folder(tmp_path, ("val",)), **own).idle()] == ["val_fraction"]
    write_folder(tmp_path, ("test",))
    assert [option for option, _ in folder(tmp_path, **own).idle()] == ["test_fraction", "val_fraction", "val_is_test"]


@pytest.mark.parametrize(("image_size", "resize"), [(224, 256), (112, 128), (16, 18)])
def test_the_shorter_side_follows_the_crop(tmp_path: Path, image_size: int, resize: int) -> None:
    data = folder(tmp_path, image_size=image_size, resize=None)
    assert data.complete() == {"resize": resize}
    assert folder(tmp_path, resize=20).complete() == {"resize": 20}


@pytest.mark.parametrize("preset", ["imagenet", "fmow"])
def test_published_data_keep_their_splits_and_the_names_of_their_runs(tmp_path: Path, preset: str) -> None:
    """Without test/ their val/ is the test split, and a configuration of an earlier version has the same digest."""
    write_folder(tmp_path, num=50)
    plan = resolve_train([f"data={preset}", f"data.root={tmp_path}"])[0]
    assert [plan.data.where(split) for split in SPLITS] == [str(tmp_path / name) for name in ("train", "train", "val")]
    earlier = copy.deepcopy(dict(plan.config))
    for option in ("val_is_test", "test_fraction", "draft"):
        del earlier["data"][option]
    assert earlier["data"]["resize"] == 256
    assert digest(earlier) == plan.digest


def test_labels_follow_the_sorted_class_names(tmp_path: Path) -> None:
    dataset = folder(write_folder(tmp_path)).dataset("train", 0)
    _, labels = dataset.__getitems__(range(len(dataset)))
    assert labels.dtype == torch.int64
    assert [CLASSES[label] for label in labels] == [os.fsdecode(name).split("/")[0] for name in dataset.names]


def test_images_may_lie_in_subfolders_and_other_files_are_left_out(tmp_path: Path) -> None:
    write_image(write_folder(tmp_path) / "val" / "bee" / "bee_0" / "bee_0_0_rgb.jpg", 5)
    (tmp_path / "val" / "bee" / "bee_0" / "bee_0_0_rgb.json").write_text("{}")
    (tmp_path / "val" / "bee" / "._1.png").write_text("")
    (tmp_path / "val" / ".cache").mkdir()
    (tmp_path / "val" / "list.txt").write_text("")
    assert np.bincount(folder(tmp_path).dataset("test", 0).labels).tolist() == [4, 5, 4]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("normalise", [False, True])
def test_pixels_are_those_of_the_centre(tmp_path: Path, channels: int, normalise: bool) -> None:
    """Images whose shorter side already has the wanted length are cropped and not resampled."""
    write_folder(tmp_path)
    dataset = folder(tmp_path, channels=channels, normalise=normalise).dataset("test", 0)
    images, _ = dataset.__getitems__([3, 0])
    assert images.shape == (2, channels, 16, 16)
    assert images.dtype == torch.float32
    picture = Image.open(dataset.root / os.fsdecode(dataset.names[3])).convert("RGB" if channels == 3 else "L")
    expected = torch.from_numpy(np.array(picture).reshape(20, 24, channels)[2:18, 4:20].copy()).movedim(-1, 0) / 255
    if normalise:
        mean, sd = IMAGENET if channels == 3 else IMAGENET.mean(1, keepdim=True)
        expected = (expected - mean) / sd
    torch.testing.assert_close(images[0], expected)


def test_resizing_keeps_the_aspect_and_what_is_shown(tmp_path: Path) -> None:
    """A picture twice as large, left half black and right half white, still has its edge in the middle."""
    write_folder(tmp_path)
    wide = np.zeros((40, 60, 3), dtype=np.uint8)
    wide[:, 30:] = 255
    Image.fromarray(wide).save(tmp_path / "val" / "ant" / "0.png")
    image = folder(tmp_path).dataset("test", 0).__getitems__([0])[0][0]
    assert image[:, :, :7].max() == 0
    assert image[:, :, 9:].min() == 1
    whole = folder(tmp_path, resize=16).dataset("test", 0).__getitems__([0])[0][0]
    assert not torch.equal(whole, image)  # less is cut off


def sizes_and_images(root: Path, split: str, **options) -> tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]:
    """Sizes as decoded of a smooth photo of 800 x 640 pixels, its image and its sketch."""
    write_folder(root)
    rows, columns = np.mgrid[:640, :800]
    smooth = np.stack([rows / 3, columns / 4, (rows + columns) / 8], axis=2).astype(np.uint8)
    Image.fromarray(smooth).save(root / "train" / "ant" / "0.jpg", quality=95)
    Image.fromarray(smooth).save(root / "val" / "ant" / "0.jpg", quality=95)
    dataset = folder(root, image_size=64, resize=64, **options).dataset(split, 0)
    sizes, transform = [], dataset.transform
    dataset.transform = lambda image: sizes.append(image.size) or transform(image)
    index = [[os.fsdecode(name) for name in dataset.names].index("ant/0.jpg")]
    images = dataset.__getitems__(index)[0], dataset.sketch(index, 64)[0]
    return sizes, *images


def test_a_sketch_is_nearly_the_picture_and_decodes_less(tmp_path: Path) -> None:
    sizes, whole, sketch = sizes_and_images(tmp_path, "test")
    assert sizes == [(800, 640), (100, 80)]
    assert (whole - sketch).abs().max() < 0.03


@pytest.mark.parametrize(
    ("split", "augment", "size"),
    [("test", "none", (200, 160)), ("train", "flip", (200, 160)), ("train", "crop_flip", (800, 640))],
)
def test_a_draft_leaves_twice_the_wanted_side(tmp_path: Path, split: str, augment: str, size: tuple[int, int]) -> None:
    sizes, draft, _ = sizes_and_images(tmp_path, split, draft=True, augment=augment)
    assert sizes[0] == size
    if augment == "none":
        whole = sizes_and_images(tmp_path, split)[1]
        assert (whole - draft).abs().max() < 0.02


def test_flip_mirrors_about_half_of_the_training_images(tmp_path: Path) -> None:
    write_folder(tmp_path, num=20)
    plain, flipped = folder(tmp_path).dataset("train", 0), folder(tmp_path, augment="flip").dataset("train", 0)
    originals = plain.__getitems__(range(45))[0]
    num_mirrored = 0
    for epoch in range(6):
        flipped.set_epoch(epoch)
        images = flipped.__getitems__(range(45))[0]
        same, mirrored = ((images == other).flatten(1).all(1) for other in (originals, originals.flip(-1)))
        assert (same ^ mirrored).all()
        num_mirrored += int(mirrored.sum())
    assert 94 < num_mirrored < 176  # five standard errors of 270 draws


def test_random_crops_show_parts_of_the_picture(tmp_path: Path) -> None:
    """The picture is a horizontal ramp: a crop shows a stretch of it that rises, or falls when mirrored."""
    write_folder(tmp_path)
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3))
    Image.fromarray(ramp.copy()).save(tmp_path / "train" / "ant" / "0.png")
    dataset = folder(tmp_path, augment="crop_flip", val_fraction=0.1).dataset("train", 0)
    index = [os.fsdecode(name) for name in dataset.names].index("ant/0.png")
    slopes = []
    for epoch in range(40):
        dataset.set_epoch(epoch)
        row = dataset.__getitems__([index])[0][0, 0, 8]
        slopes.append(float(row[-1] - row[0]))
    assert len(set(slopes)) > 20
    assert min(slopes) < -0.25
    assert max(slopes) > 0.25


@pytest.mark.parametrize("augment", ["flip", "crop_flip"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path: Path, augment: str) -> None:
    data = folder(write_folder(tmp_path), augment=augment)
    dataset = data.dataset("train", 0)
    whole = dataset.__getitems__(range(18))[0]
    torch.rand(3)
    before = torch.get_rng_state()
    assert torch.equal(dataset.__getitems__([11, 2])[0], whole[[11, 2]])
    assert torch.equal(torch.get_rng_state(), before)
    dataset.set_epoch(1)
    assert not torch.equal(dataset.__getitems__(range(18))[0], whole)
    dataset.set_epoch(0)
    dataset.seed = 1  # set here, as another seed would also divide the images otherwise
    assert not torch.equal(dataset.__getitems__(range(18))[0], whole)


def test_only_training_images_are_augmented(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for split in ("val", "test"):
        plain, other = (folder(tmp_path, augment=augment).dataset(split, 0) for augment in ("none", "crop_flip"))
        assert torch.equal(plain.__getitems__([0, 3])[0], other.__getitems__([0, 3])[0])


def test_workers_and_resuming_do_not_change_a_single_pixel(tmp_path: Path) -> None:
    data = folder(write_folder(tmp_path), augment="crop_flip")

    def loader(num_workers: int) -> Loader:
        return Loader(data.dataset("train", 0), batch_size=5, seed=0, shuffle=True, num_workers=num_workers)

    here = loader(0)
    expected = [images for _ in range(2) for images, _ in here]
    assert not torch.equal(expected[0].sort(0).values, expected[3].sort(0).values)
    ahead = loader(2)
    seen = [images for images, _ in ahead]
    seen.append(next(iter(ahead))[0])
    resumed = loader(2)
    resumed.load_state_dict(ahead.state_dict())
    seen += [images for images, _ in resumed]
    assert len(seen) == len(expected) == 6
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


def test_missing_folders_and_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train: no such folder; images lie in train/<class>/"):
        folder(tmp_path / "nowhere").spec()
    write_folder(tmp_path, ("train",))
    with pytest.raises(ValueError, match="val: no such folder"):
        folder(tmp_path).spec()
    write_folder(tmp_path, ("val",))
    write_image(tmp_path / "train" / "dog" / "0.png", 0)
    with pytest.raises(ValueError, match="class dog is in train/ but not in val/"):
        folder(tmp_path).spec()
    write_image(tmp_path / "val" / "dog" / "0.png", 0)
    write_image(tmp_path / "val" / "eel" / "0.png", 0)
    with pytest.raises(ValueError, match="class eel is in val/ but not in train/"):
        folder(tmp_path).spec()


def test_folders_without_classes_or_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match="train: holds 1 class folders"):
        folder(tmp_path).spec()
    write_folder(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "dog").mkdir()
    (tmp_path / "train" / "dog" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="train/dog: holds no image"):
        folder(tmp_path).spec()


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    path = write_folder(tmp_path) / "val" / "bee" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    dataset = folder(tmp_path).dataset("test", 0)
    with pytest.raises(ValueError, match=r"val/bee/1\.JPEG: not a readable image"):
        dataset.__getitems__(range(len(dataset)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 15}, "resize 15 is less than image_size 16"),
        ({"val_fraction": 0.0}, "val_fraction 0.0"),
        ({"test_fraction": 0.6}, "test_fraction 0.6"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, **options)
