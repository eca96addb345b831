"""Classify images whose patches are read in a learned order: what is asked."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from permlab.config.check import count_items
from permlab.config.plan import Plan
from permlab.config.schema import component_options
from permlab.data.spec import DataSpec
from permlab.option import AddedLater, Fraction, NonNegativeFloat, PositiveFloat, Verbatim
from permlab.task.metric import ACCURACY, Metric, Row
from permlab.task.task import Companion, Idle, Task

# Numbers of a run whose data set hides an order.
TRUTH = (
    Row("|Kendall| to the true order", "truth/kendall", "Kendall to the truth", ".3f"),
    Row("neighbours that truly are", "truth/adjacency", "true neighbours", ".3f"),
)


class Classify(Task):
    """Cross-entropy on labelled images, through the learned order.

    A run is compared with two more trainings under the same schedule, both with a fixed order:
    `control` reads in the starting order; `refit` is a fresh model that reads in the learned order.
    A method whose order depends on the image has no single order to refit.

    With `data.shuffle_labels` the order is learned from labels that say nothing, while both comparisons are
    trained on the true ones: what `refit` then gains over `control` does not come from learning.

    Where the data set hides an order (`data.hidden_seed`) the summary has, of the learned one, `truth/kendall`, the
    Kendall correlation with the true raster or its reverse, whichever is larger, and `truth/adjacency`, the share
    of neighbouring slots whose patches are neighbours in the true image, as they are along any scan. Many orders
    are good, so both may be low where much is found; what was found is worth the share of the gap closed,
    (refit - control) / (control on the same images unshuffled - control).

    Args:
        spec: shape of the data.
        control: also train the starting order held fixed, and a fresh model under the learned order.
        label_smoothing: of the cross-entropy that is minimised, not of the reward.
        policy_weight: weight of the policy term.
        teacher: a run directory or `timm/<name>`; null for none.
        distill_weight, distill_temperature: soft-target KL times the squared temperature
            (Hinton et al. 2015, arXiv:1503.02531).
        feature_weight: mean squared error between the student's pooled features, through a
            learned linear map, and the teacher's.
        control_schedule: learning rate of the control: `matched` to that of the learned order; or `without_hold`,
            a defect of REOrder's released code (arXiv:2505.23751), in which the rate of fixed orders falls from the
            end of the warm-up and that of learned ones stays at its peak (`optim.hold_fraction`) until the freeze.
        warmup_position: where the position table is added while the starting order is kept: to the item, the
            `same` as later, or to the `slot`, a defect of that code: there the table jumps when the policy starts,
            and stays with the slot under a fixed order. So it does in the control, and not in the refit.
    """

    takes: ClassVar[tuple[str, ...]] = ("image",)
    permutes: ClassVar[str] = "items"
    metric: Metric = ACCURACY
    panels: ClassVar[tuple[tuple[str, Mapping[str, str]], ...]] = (
        ("accuracy", {"train (batch)": "train/accuracy", "validation": "val/accuracy"}),
    )

    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "distill_temperature": ("distill_weight", [0]),
        "control_schedule": ("control", [False]),
    }

    def __init__(
        self,
        spec: DataSpec,
        *,
        control: bool,
        label_smoothing: Fraction,
        policy_weight: NonNegativeFloat,
        teacher: Verbatim | None,
        distill_weight: NonNegativeFloat,
        distill_temperature: PositiveFloat,
        feature_weight: NonNegativeFloat,
        control_schedule: Annotated[Literal["matched", "without_hold"], AddedLater("matched")] = "matched",
        warmup_position: Annotated[Literal["same", "slot"], AddedLater("same")] = "same",
    ) -> None:
        super().__init__(spec)
        self.control = control
        self.label_smoothing, self.policy_weight = label_smoothing, policy_weight
        self.teacher = teacher
        self.distill_weight, self.distill_temperature = distill_weight, distill_temperature
        self.feature_weight = feature_weight
        self.control_schedule, self.warmup_position = control_schedule, warmup_position

    @property
    def rows(self) -> tuple[Row, ...]:
        key = self.metric.key
        return (
            Row("starting order, fixed (control)", f"{key}_control", "control"),
            Row("learned order, co-trained", key, "learned"),
            Row("learned order, fresh model (refit)", f"{key}_refit", "refit"),
            *(TRUTH if self.spec.hides_order else ()),
        )

    def problems(self, plan: Plan) -> list[str]:
        return [*self._problems_of_teacher(), *self._problems_of_labels(plan), *self._problems_of_truth(plan)]

    def _problems_of_truth(self, plan: Plan) -> list[str]:
        config, side = plan.config, self.spec.patch_size
        if not self.spec.hides_order or count_items(plan) == math.prod(self.spec.grid(side)):
            return []
        given = config["model"].get("patch_size")
        other = f", or data.patch_size={given}" if "patch_size" in config["data"] else ""
        return [
            f"model.patch_size={given}: data={config['data']['name']} has patches of {side}x{side} pixels in a hidden "
            f"order, which is none of other patches; expected {side}{other}"
        ]

    def _problems_of_labels(self, plan: Plan) -> list[str]:
        config = plan.config
        if not config["data"].get("shuffle_labels"):
            return []
        if config["method"]["component"] == "fixed":
            return [f"data.shuffle_labels=true: method={config['method']['name']} learns no order from labels"]
        if self.teacher is not None:
            return [f"data.shuffle_labels=true: task.teacher={self.teacher} tells what the labels no longer do"]
        return []

    def _problems_of_teacher(self) -> list[str]:
        if self.teacher is None:
            weights = {"distill_weight": self.distill_weight, "feature_weight": self.feature_weight}
            return [f"task.{key}={weight}: needs task.teacher" for key, weight in weights.items() if weight]
        if self.teacher.startswith("timm/") or Path(self.teacher, "config.yaml").is_file():
            return []
        return [f"task.teacher={self.teacher}: neither a run directory with a config.yaml nor timm/<model name>"]

    def idle(self, plan: Plan) -> Iterator[Idle]:
        method = plan.config["method"]
        if "baseline" not in component_options("method", method["component"]):
            yield "task.policy_weight", f"method={method['name']}, which does not sample"
        if method["component"] == "fixed":
            yield "task.control", f"method={method['name']}, which is its own control"
            yield "task.warmup_position", f"method={method['name']}, which has no warm-up"
        elif not method.get("warmup_fraction"):
            yield "task.warmup_position", f"method.warmup_fraction={method.get('warmup_fraction', 0)}"
        if not plan.config["optim"]["hold_fraction"]:
            yield "task.control_schedule", f"optim.hold_fraction={plan.config['optim']['hold_fraction']}"

    def complete(self, config: dict[str, Any]) -> None:
        if config["method"]["component"] == "fixed":
            config["task"]["control"] = False  # a fixed order is its own control

    def beside(self, plan: Plan, arrays: Mapping[str, Any]) -> dict[str, Companion]:
        if not plan.config["task"]["control"]:
            return {}
        found = {"control": _at_order(plan, plan.config["method"]["order"])}
        if "order" in arrays:
            found["refit"] = _at_order(plan, arrays["order"].tolist())
        return {name: replace(each, change={**each.change, **self._unlike(name)}) for name, each in found.items()}

    def _unlike(self, name: str) -> dict[str, Any]:
        """In what a companion differs by the defects that are chosen, which it does not have itself."""
        change: dict[str, Any] = {"task.control_schedule": "matched", "task.warmup_position": "same"}
        if name == "control" and self.control_schedule == "without_hold":
            change["optim.hold_fraction"] = 0.0
        if name == "control" and self.warmup_position == "slot":
            change["model.position"] = "slot"
        return change


def _at_order(plan: Plan, order: str | list[int]) -> Companion:
    """The same training with an order that is held fixed, on true labels."""
    fixed = {"name": "fixed", "component": "fixed", "order": order}
    labels = {"data.shuffle_labels": False} if plan.config["data"].get("shuffle_labels") else {}
    return Companion(
        take=tuple(plan.config),
        change={"method": fixed, "task.control": False, "force": False, "ckpt_path": None, **labels},
        shorten="task.control=false",
    )
