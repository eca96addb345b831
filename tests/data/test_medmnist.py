import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from permlab.data.medmnist import Medmnist

NUM = {"train": 12, "val": 6, "test": 9}


def arrays(shape: tuple[int, ...] = (28, 28), num_classes: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for split, num in NUM.items():
        found[f"{split}_images"] = rng.integers(0, 256, (num, *shape), dtype=np.uint8)
        found[f"{split}_labels"] = (np.arange(num) % num_classes)[:, None]
    return found


def write(root: Path, *, flag: str = "somemnist", without: str = "", **changes) -> Medmnist:
    content = arrays() | changes
    content.pop(without, None)
    np.savez_compressed(root / f"{flag}.npz", **content)
    return Medmnist(root=str(root), flag=flag)


def make_files(root: Path) -> dict[str, Any]:
    """What the battery of every data set reads; settings that go with it."""
    write(root)
    return {"flag": "somemnist"}


def test_shape_is_known_before_torch_is_imported(tmp_path: Path) -> None:
    write(tmp_path)
    code = (
        "import sys; from permlab.data.medmnist import Medmnist;"
        f"print(Medmnist(root={str(tmp_path)!r}, flag='somemnist').spec()); assert 'torch' not in sys.modules"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "num_classes=3, channels=1, height=28, width=28, patch_size=4" in output


@pytest.mark.parametrize(
    ("shape", "channels", "patch_size"),
    [
        ((28, 28), 1, 4),
        ((28, 28, 3), 3, 4),
        ((64, 64, 1), 1, 8),
        ((128, 128, 3), 3, 16),
        ((224, 224), 1, 16),
        ((9, 9), 1, 1),
    ],
)
def test_shape_comes_from_the_arrays(tmp_path: Path, shape, channels: int, patch_size: int) -> None:
    spec = write(tmp_path, **arrays(shape, num_classes=5)).spec()
    assert (spec.channels, spec.height, spec.width, spec.num_classes) == (channels, *shape[:2], 5)
    assert spec.patch_size == patch_size
    assert spec.grid(patch_size)


def test_images_are_not_decompressed_for_the_shape(tmp_path: Path) -> None:
    """A file whose pixels are damaged still has headers and labels that can be read."""
    subject = write(tmp_path, **arrays((64, 64, 3)))
    content = bytearray(subject.path.read_bytes())
    start = content.index(b"train_images.npy")
    content[start + 5000 : start + 5100] = bytes(100)
    subject.path.write_bytes(content)
    assert subject.spec().height == 64
    with pytest.raises(ValueError, match=r"somemnist\.npz: train_images cannot be read"):
        subject.dataset("train", 0)


@pytest.mark.parametrize("shape", [(10, 8), (10, 8, 3), (10, 8, 1)])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pixels_and_labels_are_those_of_the_file(tmp_path: Path, shape, split: str) -> None:
    content = arrays(shape)
    images, labels = write(tmp_path, **content).dataset(split, 0).__getitems__([4, 1])
    expected = content[f"{split}_images"].reshape(NUM[split], 10, 8, -1)[[4, 1]].transpose(0, 3, 1, 2) / 127.5 - 1
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    assert labels.tolist() == [1, 1]
    assert labels.dtype == torch.int64


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    cases = [
        ({"train_labels": np.zeros((12, 14), dtype=int)}, "14 labels per image"),
        ({"train_images": np.zeros((12, 28, 28, 28), dtype=np.uint8)}, r"train_images is uint8 \[12, 28, 28, 28\]"),
        ({"val_images": np.zeros((6, 28, 28))}, "val_images is float64"),
        ({"val_images": np.zeros((6, 14, 14), dtype=np.uint8)}, "val and train differ"),
        ({"test_labels": np.zeros((8, 1), dtype=int)}, "test has 9 images and 8 labels"),
        ({"test_labels": np.full((9, 1), -1)}, "test_labels is not made of whole numbers"),
        ({"test_labels": np.full((9, 1), 0.5)}, "test_labels is not made of whole numbers"),
        ({f"{split}_labels": np.zeros((num, 1), dtype=int) for split, num in NUM.items()}, "at least 2 classes"),
        ({"without": "val_images"}, "no array val_images"),
        ({"without": "test_labels"}, "no array test_labels"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=rf"somemnist\.npz: .*{message}"):
            write(tmp_path, **changes).spec()


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_labels cannot be read"):
        write(tmp_path, train_labels=np.array([[print]] * 12, dtype=object)).spec()
    with pytest.raises(ValueError, match="train_images is object"):
        write(tmp_path, train_images=np.full((12, 28, 28), None)).spec()


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, flag="bloodmnist")
    with pytest.raises(ValueError, match=r"pathmnist\.npz: no such file; npz files there: bloodmnist\.npz"):
        Medmnist(root=str(tmp_path), flag="pathmnist").spec()
    with pytest.raises(ValueError, match="npz files there: none"):
        Medmnist(root=str(tmp_path / "elsewhere"), flag="pathmnist").spec()
    path = tmp_path / "bloodmnist.npz"
    content = path.read_bytes()
    for part in (content[: len(content) // 2], b"<html>not found</html>", b""):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"bloodmnist\.npz: train_images cannot be read"):
            Medmnist(root=str(tmp_path), flag="bloodmnist").spec()
