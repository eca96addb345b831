"""Classify images by a linear head on frozen features: what is asked."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from permlab.config.plan import Plan
from permlab.data.spec import DataSpec
from permlab.option import Fraction, PositiveInt
from permlab.task.metric import ACCURACY, Metric
from permlab.task.task import Idle, Task


class Probe(Task):
    """Cross-entropy of a linear head; the backbone below it stays as it is, and reads in a fixed order.

    What pretrained weights without a head for the classes of the data become a classifier by, and a
    measure of how good their features are.

    Args:
        spec: shape of the data.
        num_samples: training images, drawn by seed; null for all. Validation and test are whole.
        label_smoothing: of the cross-entropy that is minimised.
    """

    takes: ClassVar[tuple[str, ...]] = ("image",)
    permutes: ClassVar[str] = "nothing"
    effort: ClassVar[float] = 0.01
    trains_model: ClassVar[bool] = False
    metric: Metric = ACCURACY
    panels: ClassVar[tuple[tuple[str, Mapping[str, str]], ...]] = (
        ("accuracy", {"train (batch)": "train/accuracy", "validation": "val/accuracy"}),
    )

    def __init__(self, spec: DataSpec, *, num_samples: PositiveInt | None, label_smoothing: Fraction) -> None:
        super().__init__(spec)
        self.num_samples, self.label_smoothing = num_samples, label_smoothing

    def problems(self, plan: Plan) -> list[str]:
        if plan.config["data"].get("shuffle_labels"):
            return ["data.shuffle_labels=true: task=probe learns no order from labels"]
        return []

    def idle(self, plan: Plan) -> Iterator[Idle]:
        yield "model.lr", "task=probe, whose head learns at optim.lr"
