"""What a run is judged by, and the rows in which its numbers are shown."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A number that runs are compared by: the only source of its name, unit, direction and format.

    Args:
        name: without the split, as in `accuracy`.
        better: whether the `min` or the `max` of it is best.
        unit: after the number, as in `%`.
        scale: what the number is multiplied by where it is shown.
        format: of the number of one run.
        spread_format: of means and deviations over runs.
        is_ratio: differences between runs are shown in per cent of the number instead of in its unit.
    Example:
        >>> accuracy = Metric("accuracy", "max", unit="%", scale=100, format=".1f", spread_format=".1f")
        >>> accuracy.key, accuracy.show(0.5), accuracy.title
        ('test/accuracy', '50.0', 'accuracy, %')
    """

    name: str
    better: Literal["min", "max"]
    unit: str = ""
    scale: float = 1.0
    format: str = ".4g"
    spread_format: str = ".3f"
    is_ratio: bool = False

    @property
    def key(self) -> str:
        """Where a run's files have the metric of the test split."""
        return f"test/{self.name}"

    @property
    def validation_key(self) -> str:
        return f"val/{self.name}"

    @property
    def title(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def gain_unit(self) -> str:
        """What differences between runs are counted in."""
        return "%" if self.is_ratio else "points" if self.unit == "%" else self.unit

    def show(self, value: float, *, sign: str = "") -> str:
        """The number of one run; with sign `+` a difference."""
        return format(self.scale * value, f"{sign}{self.format}")

    def show_mean(self, value: float) -> str:
        """A mean or deviation over runs."""
        return format(self.scale * value, self.spread_format)

    def gain(self, ours: float, theirs: float) -> float:
        """Difference in `gain_unit`."""
        return 100 * (ours / theirs - 1) if self.is_ratio else self.scale * (ours - theirs)

    def worst(self, gains: list[float]) -> float:
        """The least favourable of several differences."""
        return max(gains) if self.better == "min" else min(gains)


ACCURACY = Metric("accuracy", "max", unit="%", scale=100, format=".1f", spread_format=".1f")
PERPLEXITY = Metric("perplexity", "min", is_ratio=True)


@dataclass(frozen=True)
class Row:
    """A number of a run's summary, and how it is called in the report and in tables: the one source of both.

    Args:
        label: in the report of one run; `{order}` stands for how its order came about. Empty: in tables only.
        key: in `summary.json`.
        heading: of a column in tables over runs.
        format: None for a value of the task's metric, which is shown as that is, with its difference to the
            first such row.
        once: for a value that is the same for all runs which share these settings of the task, and gets a
            line of its own in tables over runs, under the heading.
    """

    label: str
    key: str
    heading: str
    format: str | None = None
    once: tuple[str, ...] = ()
