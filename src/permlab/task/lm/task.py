"""Next-token prediction on text, in the text's own order: what is asked."""

from collections.abc import Mapping
from typing import ClassVar

from permlab.data.spec import DataSpec
from permlab.option import Fraction
from permlab.task.metric import PERPLEXITY, Metric
from permlab.task.task import Task


class Lm(Task):
    """Cross-entropy of the next token.

    There is no place in it for a method: tokens that were read in another order would have their
    targets among them.

    Args:
        spec: shape of the data.
        label_smoothing: of the cross-entropy that is minimised.
    """

    takes: ClassVar[tuple[str, ...]] = ("text",)
    permutes: ClassVar[str] = "nothing"
    metric: Metric = PERPLEXITY
    panels: ClassVar[tuple[tuple[str, Mapping[str, str]], ...]] = (
        ("accuracy", {"train (batch)": "train/accuracy", "validation": "val/accuracy"}),
        ("perplexity", {"validation": "val/perplexity"}),
    )

    def __init__(self, spec: DataSpec, *, label_smoothing: Fraction) -> None:
        super().__init__(spec)
        self.label_smoothing = label_smoothing
