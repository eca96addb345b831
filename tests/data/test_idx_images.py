import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from permlab.data.idx_images import IdxImages

SPLITS = ("train", "val", "test")
COUNTS = {"train": 60, "t10k": 20}
OPTIONS = {"prefix": "", "transpose": False, "mean": 0.5, "sd": 0.25, "num_val": 15, "patch_size": 2, "augment": "none"}
OPTIONS["resize"] = None


def idx(array: np.ndarray) -> bytes:
    """The format, written from its description: two zeros, the type, the number of axes, their sizes, the values."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def images(part: str, shape: tuple[int, int] = (8, 6)) -> np.ndarray:
    return np.random.default_rng(len(part)).integers(0, 256, (COUNTS[part], *shape), dtype=np.uint8)


def labels(part: str) -> np.ndarray:
    return np.arange(COUNTS[part]) % 5


def write_files(root: Path, prefix: str = "", first_label: int = 0) -> Path:
    """Half of them gzipped."""
    for part in COUNTS:
        content = {f"{prefix}{part}-images-idx3-ubyte": images(part)}
        content |= {f"{prefix}{part}-labels-idx1-ubyte": labels(part) + first_label}
        for name, array in content.items():
            is_packed = ("images" in name) == (part == "train")
            (root / f"{name}{'.gz' if is_packed else ''}").write_bytes(
                gzip.compress(idx(array)) if is_packed else idx(array)
            )
    return root


def make_files(root: Path) -> dict[str, Any]:
    """What the battery of every data set reads; settings that go with it."""
    write_files(root)
    return {"prefix": "", "num_val": 15, "patch_size": 2}


def make(root: Path, **options: Any) -> IdxImages:
    return IdxImages(root=str(root), **OPTIONS | options)


def pixels(data: IdxImages, split: str, seed: int = 0) -> np.ndarray:
    """Bytes of a split's images."""
    dataset = data.dataset(split, seed)
    found = dataset.__getitems__(range(len(dataset)))[0]
    return ((found * 0.25 + 0.5) * 255).round().to(torch.uint8)[:, 0].numpy()


def test_pixels_and_labels_are_those_of_the_files(tmp_path: Path) -> None:
    data = make(write_files(tmp_path))
    np.testing.assert_array_equal(pixels(data, "test"), images("t10k"))
    np.testing.assert_array_equal(data.dataset("test", 0).labels, labels("t10k"))
    spec = data.spec()
    assert (spec.channels, spec.height, spec.width, spec.num_classes, spec.patch_size) == (1, 8, 6, 5, 2)


def test_validation_is_a_number_of_training_images_drawn_by_seed(tmp_path: Path) -> None:
    data = make(write_files(tmp_path))
    parts = {split: data.dataset(split, 0) for split in SPLITS}
    assert [len(parts[split]) for split in SPLITS] == [45, 15, 20]
    assert np.bincount(parts["val"].labels).tolist() == [3] * 5
    both = np.concatenate([pixels(data, "train"), pixels(data, "val")])
    assert sorted(map(bytes, both)) == sorted(map(bytes, images("train")))
    assert not np.array_equal(pixels(data, "val", 1), pixels(data, "val"))


def test_images_on_their_side_are_turned(tmp_path: Path) -> None:
    data = make(write_files(tmp_path), transpose=True)
    assert (data.spec().height, data.spec().width) == (6, 8)
    np.testing.assert_array_equal(pixels(data, "test"), images("t10k").transpose(0, 2, 1))


def test_names_may_have_a_prefix_and_labels_may_begin_at_one(tmp_path: Path) -> None:
    data = make(write_files(tmp_path, "emnist-letters-", first_label=1), prefix="emnist-letters-")
    assert data.spec().num_classes == 5
    np.testing.assert_array_equal(data.dataset("test", 0).labels, labels("t10k"))
    for path in tmp_path.glob("*t10k*"):
        path.rename(path.with_name(path.name.replace("t10k", "test")))
    np.testing.assert_array_equal(pixels(make(tmp_path, prefix="emnist-letters-"), "test"), images("t10k"))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("t10k-images-idx3-ubyte", images("t10k", (8, 8)), "images of"),
        ("t10k-labels-idx1-ubyte.gz", np.zeros(19), "19 labels for 20 images"),
        ("train-labels-idx1-ubyte", np.zeros((60, 1)), "is no idx file of bytes with 1 axes"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    path = write_files(tmp_path) / name
    assert path.is_file()
    path.write_bytes(gzip.compress(idx(array)) if path.suffix else idx(array))
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        make(tmp_path).spec()


def test_labels_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.full(60, 3)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(20, 3))))
    with pytest.raises(ValueError, match="all labels are the same"):
        make(tmp_path).spec()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_val": 60}, "num_val 60: there are 60 training images"), ({"prefix": "a/b"}, "prefix a/b: expected")],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(write_files(tmp_path), **options).spec()


def test_images_are_stretched_after_all_else_as_pillow_stretches_them(tmp_path: Path) -> None:
    root = write_files(tmp_path)
    plain, wide = (make(root, resize=side).dataset("test", 0) for side in (None, 21))
    spec = make(root, resize=21, patch_size=7).spec()
    assert (spec.height, spec.width, spec.grid(7)) == (21, 21, (3, 3))
    images = plain.__getitems__(range(4))[0][:, 0].numpy()
    expected = [np.asarray(Image.fromarray(image).resize((21, 21), Image.Resampling.BICUBIC)) for image in images]
    np.testing.assert_allclose(wide.__getitems__(range(4))[0][:, 0].numpy(), np.stack(expected), atol=1e-5)


def test_patches_of_all_images_lie_in_one_hidden_order(tmp_path: Path) -> None:
    root = write_files(tmp_path)
    plain, hidden = make(root), make(root, hidden_seed=2)
    truth = hidden.truth()
    assert truth is not None
    assert sorted(truth) == list(range(12))
    assert hidden.spec().hides_order
    for split in SPLITS:
        whole, shuffled = (pixels(data, split) for data in (plain, hidden))
        for place, block in enumerate(truth):  # of the true image, 4 rows of 3 patches
            y, x, v, u = 2 * (place // 3), 2 * (place % 3), 2 * (block // 3), 2 * (block % 3)
            np.testing.assert_array_equal(shuffled[:, v : v + 2, u : u + 2], whole[:, y : y + 2, x : x + 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "flip"}, "hidden_seed 2: augment flip moves pixels across patches"),
        ({"resize": 16}, "hidden_seed 2: resize 16 moves pixels"),
        ({"patch_size": 4}, "4 does not divide a 8x6 image"),
    ],
)
def test_what_would_undo_a_hidden_order_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(write_files(tmp_path), hidden_seed=2, **options).spec()
