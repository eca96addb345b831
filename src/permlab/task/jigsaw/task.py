"""Put images together from their pieces: what is asked."""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar

from permlab.config.plan import Plan
from permlab.data.spec import DataSpec
from permlab.option import NonNegativeFloat, Range
from permlab.task.metric import Metric, Row
from permlab.task.relaxed import needs_relaxation
from permlab.task.task import Idle, Task


class Jigsaw(Task):
    """Learns where the pieces of an image belong, from whole images alone.

    Each image is cut into `num_sides` x `num_sides` pieces, which are shuffled; one whose sides that does not divide
    repeats its last row and column. One backbone encodes each piece, stretched to the size of an image; its features
    are an item, and the method relaxes the order of the items. The loss is the squared error of the pieces in that
    order from the image. A piece is in place if the image there looks like it, so that of equal pieces each will do.

    Args:
        spec: shape of the data.
        num_sides: pieces along a side; the source has 2 to 6 on MNIST.
        error_weight: of the squared error, mean over pixels.
        order_weight: of the negative logarithm of the weight that each slot gives to pieces that belong there, in nats.
    Source: Mena et al. 2018, arXiv:1802.08665, section 5.2.
    Differs from source: the backbone is a choice, and reads pieces at the size of images; the order is that of a
        method, with or without noise; the cross-entropy is ours.
    """

    takes: ClassVar[tuple[str, ...]] = ("image",)
    permutes: ClassVar[str] = "items"
    metric: Metric = Metric("placed", "max", unit="%", scale=100, format=".1f", spread_format=".1f")
    panels: ClassVar[tuple[tuple[str, Mapping[str, str]], ...]] = (
        ("placed", {"train (batch)": "train/placed", "validation": "val/placed"}),
        ("solved", {"validation": "val/solved"}),
    )
    pictures: ClassVar[tuple[str, ...]] = ("comparison", "training")
    compared_within: ClassVar[tuple[str, ...]] = ("num_sides",)

    def __init__(
        self,
        spec: DataSpec,
        *,
        num_sides: Annotated[int, Range(ge=2, le=16)],
        error_weight: NonNegativeFloat,
        order_weight: NonNegativeFloat,
    ) -> None:
        super().__init__(spec)
        self.num_sides, self.error_weight, self.order_weight = num_sides, error_weight, order_weight

    @property
    def rows(self) -> tuple[Row, ...]:
        return (
            Row("a random order", f"{self.metric.key}_chance", "by chance"),
            Row("{order}", self.metric.key, "in place"),
            Row("images solved", "test/solved", "solved", ".3f"),
            Row("Kendall to the true order", "test/kendall", "Kendall", ".3f"),
            Row("squared error of the images", "test/error", "squared error", ".4f"),
        )

    def problems(self, plan: Plan) -> list[str]:
        problems, shortest = needs_relaxation(plan), min(self.spec.height, self.spec.width)
        if self.num_sides > shortest:
            problems.append(f"task.num_sides={self.num_sides}: the images have {shortest} pixels; expected no more")
        if not self.error_weight and not self.order_weight:
            problems.append(f"task.error_weight={self.error_weight}: there is no loss; needs task.order_weight above 0")
        return problems

    def idle(self, plan: Plan) -> Iterator[Idle]:
        yield "data.shuffle_labels", "task=jigsaw, which reads no labels"
        if not self.error_weight:
            yield "method.estimator", f"task.error_weight={self.error_weight}"

    def section(self, plan: Plan) -> str:
        return f", {self.num_sides}x{self.num_sides} pieces"
