"""Rows of five numbers, drawn uniformly."""

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from permlab.data.spec import DataSpec
from permlab.option import PositiveInt

if TYPE_CHECKING:
    from permlab.data.loader import ArrayDataset


class FiveNumbers:
    """Five numbers between 0 and 1, and the rank of each.

    Args:
        num_samples: of each split.
    """

    kind: ClassVar[str] = "numbers"

    def __init__(self, *, num_samples: PositiveInt) -> None:
        self.num_samples = num_samples

    def spec(self) -> DataSpec:
        return DataSpec("numbers", num_classes=5, channels=1, height=1, width=5, labels="ranks", items="numbers")

    def dataset(self, split: str, seed: int) -> "ArrayDataset":
        """Numbers float32 [5] and their ranks, of `train`, `val` or `test` under this seed."""
        from permlab.data.loader import ArrayDataset

        generator = np.random.default_rng([seed, ("train", "val", "test").index(split)])
        numbers = generator.random((self.num_samples, 5), dtype=np.float32)
        return ArrayDataset(numbers, numbers.argsort(1).argsort(1))
