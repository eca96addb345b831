"""For which classes pretrained weights come with a head, as far as their files tell without torch."""

import json
import struct
from pathlib import Path

# Of timm's weights whose name ends in no tag, or in one that says so.
IMAGENET = 1000
HEADS = ("head.weight", "fc.weight", "classifier.weight")


def num_head_classes(pretrained: str | bool) -> int:
    """Number of classes that the head of pretrained weights tells apart, 0 where there is none.

    Args:
        pretrained: a folder with a `config.json`, a `.safetensors` file or a folder with one, or anything else that
            `model.pretrained` may be, which is known by its name alone: timm's say with their last word what the
            head was trained on.
    Example:
        >>> num_head_classes(True), num_head_classes("vit_base_patch16_224.augreg_in21k_ft_in1k")
        (1000, 1000)
        >>> num_head_classes("vit_small_patch14_dinov2.lvd142m")
        0
    """
    path = Path(str(pretrained))
    if path.is_dir():
        told = _told_by(path / "config.json")
        files = sorted(path.glob("*.safetensors"))
        return told if told is not None else max([0, *map(_rows_of_head, files)])
    if path.is_file():
        return _rows_of_head(path) if path.suffix == ".safetensors" else IMAGENET
    _, _, tag = str(pretrained).rpartition("/")[2].partition(".")
    return IMAGENET if not tag or tag.endswith("in1k") else 0


def _told_by(path: Path) -> int | None:
    """What a configuration in timm's format says; None where there is none that can be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        count = config.get("num_classes", (config.get("pretrained_cfg") or {}).get("num_classes"))
    except (OSError, ValueError, AttributeError):
        return None
    return count if isinstance(count, int) else None


def _rows_of_head(path: Path) -> int:
    """Rows of the head's matrix by the header of a `.safetensors` file; 0 where it has none or cannot be read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        return max([0, *(header[name]["shape"][0] for name in HEADS if name in header)])
    except (OSError, ValueError, KeyError, TypeError, IndexError, struct.error, OverflowError, MemoryError):
        return 0
