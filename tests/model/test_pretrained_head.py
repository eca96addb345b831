"""Number of classes of a published head, without torch: against files as their libraries write them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from permlab.model.pretrained_head import num_head_classes


def test_a_file_tells_by_the_rows_of_its_head(tmp_path: Path) -> None:
    for name, tensors, expected in (
        ("with", {"head.weight": torch.rand(7, 3), "norm.bias": torch.rand(3)}, 7),
        ("without", {"norm.weight": torch.rand(3)}, 0),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        assert num_head_classes(str(tmp_path / f"{name}.safetensors")) == expected


def test_a_folder_tells_by_its_configuration_or_its_weights(tmp_path: Path) -> None:
    save_file({"head.weight": torch.rand(5, 3)}, tmp_path / "model.safetensors")
    assert num_head_classes(str(tmp_path)) == 5
    for config, expected in (
        ({"num_classes": 3}, 3),
        ({"pretrained_cfg": {"num_classes": 0}}, 0),
        ({"model_type": "llama"}, 5),
        ([1], 5),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert num_head_classes(str(tmp_path)) == expected


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x08" + bytes(7) + b"no json!", b"\x02" + bytes(7) + b"{}"])
def test_a_broken_file_has_no_head(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert num_head_classes(str(tmp_path)) == num_head_classes(str(tmp_path / "model.safetensors")) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch16_224", 1000),
        ("timm/vit_small_patch14_dinov2.lvd142m", 0),
        ("vit_tiny_patch16_224.augreg_in21k", 0),
    ],
)
def test_a_name_tells_by_its_last_word(name: str, expected: int) -> None:
    assert num_head_classes(name) == expected
