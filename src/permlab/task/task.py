"""What every task says of itself before torch is imported."""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from permlab.config.effect import Idle
from permlab.config.plan import Plan
from permlab.data.spec import DataSpec
from permlab.task.metric import Metric, Row

if TYPE_CHECKING:
    from permlab.task.learner import Learner


@dataclass(frozen=True)
class Companion:
    """Another run that a run needs before it, or is compared with beside it; shared by all that need it.

    Its configuration is composed from words; then keys are taken over from the run's own; then values are
    put in. Without words the run's own configuration is the start.

    Args:
        words: of a command line, as in `task=lm`.
        take: keys taken over, dotted: groups (`model`), or keys of a group where the run has them.
        change: values by dotted key.
        run: a run directory that stands for it; then nothing is composed or trained.
        label: what is announced when the run is found or trained; empty for nothing.
        shorten: key by which its training gets shorter, where that of the run's own does not do it, or a setting
            that leaves the run out.
    """

    words: tuple[str, ...] = ()
    take: tuple[str, ...] = ()
    change: Mapping[str, Any] = field(default_factory=dict)
    run: Path | None = None
    label: str = ""
    shorten: str = ""


class Task:
    """What is asked of a model and its method: kinds of data, rules between keys, runs before and beside.

    How it is trained is its learner's, in `learner.py` of the same folder. The constructor's keyword-only
    arguments are the task's options; they are kept as attributes of the same names.

    Attributes:
        takes: kinds of data, a literal.
        permutes: what the method permutes, a literal: `items` of the input, channels of the model's `weights`,
            or `nothing`.
        exports: whether a trained model can be written in a form of its own, see `Learner.export`; a literal.
        metric: what runs are judged by.
        rows: what the report of a run and the tables over runs show.
        effort: of a step, in steps of plain training of the same model, for forecasts; roughly, a literal.
        trains_model: whether the backbone's weights learn; a literal.
        num_tests: how often a run goes over the test split; a literal.
        panels: curves of the figure `training`, in order: title, and metric by label of its line.
        pictures: figures that show what a run is about; the first that it has is the one to open.
        compared_within: settings of the task that runs share if tables compare them.
        clock: seconds in a run's summary over which a study's figure shows it, and what they are; a literal.
        weight_dtype: torch's name of the precision in which the model is built.
    Args:
        spec: shape of the data.
    """

    takes: ClassVar[tuple[str, ...]] = ("image",)
    permutes: ClassVar[str] = "items"
    exports: ClassVar[bool] = False
    effort: ClassVar[float] = 1.0
    trains_model: ClassVar[bool] = True
    num_tests: ClassVar[float] = 1.0
    panels: ClassVar[tuple[tuple[str, Mapping[str, str]], ...]] = ()
    pictures: ClassVar[tuple[str, ...]] = ("comparison", "order", "training")
    compared_within: ClassVar[tuple[str, ...]] = ()
    clock: ClassVar[tuple[str, str]] = ("train/seconds", "time of training")
    weight_dtype: str = "float32"
    metric: Metric

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    @property
    def rows(self) -> tuple[Row, ...]:
        return (Row("{order}", self.metric.key, self.metric.name),)

    @property
    def monitor(self) -> Metric:
        """What the checkpoints of a training are picked by, on the validation split."""
        return self.metric

    @classmethod
    def learner(cls) -> "type[Learner]":
        """Class that trains it. Imports torch."""
        module = importlib.import_module(f"{cls.__module__.rpartition('.')[0]}.learner")
        return getattr(module, f"{cls.__name__}Learner")

    # Rules between keys

    def problems(self, plan: Plan) -> list[str]:
        """What is wrong with settings that only together are wrong, as `key=value: what`."""
        return []

    def idle(self, plan: Plan) -> Iterator[Idle]:
        """Settings without effect in this composition, beside those of the class constants `no_effect`."""
        return iter(())

    def passes(self, plan: Plan) -> Mapping[str, float]:
        """Samples that go through the model beside steps, validations and tests, by what for; as far as it is known.

        One for which a gradient is asked counts as three.
        """
        return {}

    def complete(self, config: dict[str, Any]) -> None:
        """Fill in what follows from other keys."""

    def learns(self, plan: Plan) -> bool:
        """Whether there is anything to train, as far as the configuration tells."""
        return True

    # Other runs

    def data_seed(self, plan: Plan) -> int:
        """Seed of the data's split."""
        return plan.config["seed"]

    def before(self, plan: Plan) -> dict[str, Companion]:
        """Runs that have to be finished before this one starts, by the name under which the learner gets them."""
        return {}

    def beside(self, plan: Plan, arrays: Mapping[str, Any]) -> dict[str, Companion]:
        """Runs that this one is compared with.

        Each adds its metric to the summary, under the metric's key and its own name.

        Args:
            arrays: of `arrays/order.npz`.
        """
        return {}

    # Tables over runs

    def section(self, plan: Plan) -> str:
        """What joins the section's title, beside task, data and model."""
        return ""

    def label(self, plan: Plan) -> str:
        """Name of a row; settings that distinguish it from others of the same name are added to it."""
        return plan.config["method"]["name"]

    def baseline(self, plan: Plan, summary: Mapping[str, float]) -> float | None:
        """What a run tells of the metric of the plain row, which others of its seed are compared with."""
        return summary.get(self.metric.key) if plan.config["method"]["name"] == "fixed" else None
