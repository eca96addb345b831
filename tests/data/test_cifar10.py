import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from permlab.data.cifar10 import Cifar10

NUM_PER_FILE = 40
MEAN, SD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])


def write_files(root: Path) -> Path:
    """Forty random images a file, four of every class, the first pixel of each holding its number."""
    rng = np.random.default_rng(0)
    for number, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        records = rng.integers(0, 256, (NUM_PER_FILE, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(NUM_PER_FILE) % 10
        records[:, 1] = number * NUM_PER_FILE + np.arange(NUM_PER_FILE)
        records.tofile(root / name)
    return root


def make_files(root: Path) -> dict[str, Any]:
    """What the battery of every data set reads; settings that go with it."""
    write_files(root)
    return {"val_fraction": 0.25}


def cifar(root: Path, **options) -> Cifar10:
    return Cifar10(**{"root": str(root), "val_fraction": 0.25, "augment": "none"} | options)


def numbers(images: torch.Tensor) -> list[int]:
    return ((images[:, 0, 0, 0] * SD[0] + MEAN[0]) * 255).round().int().tolist()


def test_shape_is_known_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from permlab.data.cifar10 import Cifar10;"
        f"print(Cifar10(root={str(write_files(tmp_path))!r}, val_fraction=0.1, augment='none').spec());"
        "assert 'torch' not in sys.modules"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "num_classes=10, channels=3, height=32, width=32, patch_size=4" in output


def test_parts_are_disjoint_complete_and_stratified(tmp_path: Path) -> None:
    data = cifar(write_files(tmp_path))
    parts = {split: data.dataset(split, 0) for split in ("train", "val", "test")}
    found = {split: numbers(part.__getitems__(range(len(part)))[0]) for split, part in parts.items()}
    assert sorted(found["train"] + found["val"]) == list(range(200))
    assert found["test"] == list(range(200, 240))
    assert np.bincount(parts["val"].labels).tolist() == [5] * 10
    assert found["val"] != numbers(data.dataset("val", 1).__getitems__(range(50))[0])


def test_pixels_are_planes_in_rows_and_labels_belong_to_them(tmp_path: Path) -> None:
    record = np.fromfile(write_files(tmp_path) / "test_batch.bin", dtype=np.uint8).reshape(-1, 3073)[7]
    images, labels = cifar(tmp_path).dataset("test", 0).__getitems__([7, 3])
    assert labels.tolist() == [7, 3]
    assert labels.dtype == torch.int64
    for channel, row, column in [(0, 0, 0), (1, 0, 5), (2, 31, 30), (0, 12, 1)]:
        value = record[1 + channel * 1024 + row * 32 + column] / 255
        expected = (value - MEAN[channel]) / SD[channel]
        assert images[0, channel, row, column] == pytest.approx(float(expected), abs=1e-5)


def test_only_training_images_are_augmented(tmp_path: Path) -> None:
    plain, moved = cifar(write_files(tmp_path)), cifar(tmp_path, augment="crop_flip")
    for split, same in (("train", False), ("val", True), ("test", True)):
        first, second = (data.dataset(split, 0).__getitems__(range(30)) for data in (plain, moved))
        assert torch.equal(first[0], second[0]) is same
        assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", ["data_batch_4.bin", "test_batch.bin"])
def test_missing_and_truncated_files_are_named(tmp_path: Path, name: str) -> None:
    path = write_files(tmp_path) / name
    content = path.read_bytes()
    for part in (content[:-1], content[:100], b""):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=rf"{name}: truncated"):
            cifar(tmp_path).spec()
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name}: no such file.*data_batch_1\.bin"):
        cifar(tmp_path).spec()


def test_files_that_hold_something_else_are_named(tmp_path: Path) -> None:
    path = write_files(tmp_path) / "data_batch_2.bin"
    path.write_bytes(bytes([11]) * 3073)
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: holds the label 11"):
        cifar(tmp_path).dataset("train", 0)


@pytest.mark.parametrize("fraction", [0.0, 0.6])
def test_a_part_that_cannot_be_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"val_fraction {fraction}"):
        cifar(tmp_path, val_fraction=fraction)
