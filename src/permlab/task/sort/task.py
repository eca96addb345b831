"""Sort images by the numbers that they show: what is asked."""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar

from permlab.config.plan import Plan
from permlab.data.spec import DataSpec
from permlab.option import Range
from permlab.task.metric import Metric, Row
from permlab.task.relaxed import needs_relaxation
from permlab.task.task import Idle, Task


class Sort(Task):
    """Learns to sort numbers that are shown as images, the largest first, from their true order alone.

    A sample is `num_numbers` numbers of `num_digits` images each, whose labels are its digits. One backbone encodes all
    images; the features of a number's digits, one behind the other, are an item, and the method relaxes the order of
    the items. The loss is the negative logarithm of the weight that each slot of the relaxed order gives to items of
    the right value, the cross-entropy between relaxed and true permutation where no two numbers are equal.

    A batch of images is cut into samples as it comes, so `data.batch_size` counts images and those that are left over
    at its end are not used.

    Args:
        spec: shape of the data.
        num_numbers: in a sample; the source has 3, 5, 7, 9 and 15.
        num_digits: images of a number; the source has 4.
    Source: Grover et al. 2019, NeuralSort, arXiv:1903.08850, section 6.1.
    Differs from source: the digits of a number are encoded one by one and not as one wide image, so the backbone need
        not find them; numbers may be equal, and any order of equal ones is right.
    """

    takes: ClassVar[tuple[str, ...]] = ("image",)
    permutes: ClassVar[str] = "items"
    metric: Metric = Metric("exact", "max", unit="%", scale=100, format=".1f", spread_format=".1f")
    panels: ClassVar[tuple[tuple[str, Mapping[str, str]], ...]] = (
        ("exact", {"train (batch)": "train/exact", "validation": "val/exact"}),
        ("elementwise", {"validation": "val/elementwise"}),
    )
    pictures: ClassVar[tuple[str, ...]] = ("comparison", "training")
    compared_within: ClassVar[tuple[str, ...]] = ("num_numbers", "num_digits")

    def __init__(
        self,
        spec: DataSpec,
        *,
        num_numbers: Annotated[int, Range(ge=2, le=100)],
        num_digits: Annotated[int, Range(ge=1, le=9)],
    ) -> None:
        super().__init__(spec)
        self.num_numbers, self.num_digits = num_numbers, num_digits

    @property
    def num_images(self) -> int:
        """Of a sample."""
        return self.num_numbers * self.num_digits

    @property
    def rows(self) -> tuple[Row, ...]:
        return (
            Row("a random order", f"{self.metric.key}_chance", "by chance"),
            Row("{order}", self.metric.key, "in order"),
            Row("numbers in their slots", "test/elementwise", "in their slots", ".3f"),
        )

    def problems(self, plan: Plan) -> list[str]:
        problems = needs_relaxation(plan)
        batch = plan.config["data"]["batch_size"]
        if batch < self.num_images:
            needed = f"{self.num_numbers} x {self.num_digits}"
            problems.append(f"data.batch_size={batch}: a sample of task=sort has {needed} images; expected more")
        if self.spec.num_classes**self.num_digits > 2**62:
            most = int(62 / math.log2(self.spec.num_classes))
            problems.append(
                f"task.num_digits={self.num_digits}: overflows with {self.spec.num_classes} classes; at most {most}"
            )
        return problems

    def idle(self, plan: Plan) -> Iterator[Idle]:
        yield "method.estimator", "task=sort, whose loss reads the relaxed order alone"

    def section(self, plan: Plan) -> str:
        return f", {self.num_numbers} numbers of {self.num_digits} digits"
