"""What a dataset looks like, known before torch is imported."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataSpec:
    """Shape of a dataset's samples, from which models and sites derive theirs.

    Args:
        kind: `image` (samples [channels, height, width]) or `text` (token ids [length]).
        num_classes: number of labels; for text the vocabulary size.
        channels, height, width: of an image, in channels and pixels; for text 1, 1, sequence length.
        patch_size: side of a square patch in pixels where the model's configuration names none.
    """

    kind: Literal["image", "text"]
    num_classes: int
    channels: int
    height: int
    width: int
    patch_size: int = 1

    def grid(self, patch_size: int) -> tuple[int, int]:
        """Rows and columns of the patch grid.

        Raises:
            ValueError: if the patch size does not divide the image, naming the sizes which do.
        """
        sizes = divisors(self.height, self.width)
        if patch_size not in sizes:
            raise ValueError(
                f"{patch_size} does not divide a {self.height}x{self.width} image; "
                f"sizes which do: {', '.join(map(str, sizes))}"
            )
        return self.height // patch_size, self.width // patch_size


def divisors(height: int, width: int) -> list[int]:
    """Patch sizes that divide both sides of an image.

    Example:
        >>> divisors(8, 12)
        [1, 2, 4]
    """
    return [size for size in range(1, min(height, width) + 1) if height % size == 0 == width % size]
