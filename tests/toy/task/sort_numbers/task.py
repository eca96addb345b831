"""Sort numbers, the least first: what is asked."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from permlab.config.plan import Plan
from permlab.data.spec import DataSpec
from permlab.option import NonNegativeFloat
from permlab.task.metric import Metric, Row
from permlab.task.task import Companion, Idle, Task


class SortNumbers(Task):
    """Learns an order of every sample's numbers under which they rise.

    Args:
        spec: shape of the data.
        pair_weight: of the squared error of what the model reads.
        unsorted: also train on the numbers as they come.
    """

    takes: ClassVar[tuple[str, ...]] = ("numbers",)
    permutes: ClassVar[str] = "items"
    metric: Metric = Metric("displacement", "min", unit="slots", format=".3f")
    panels: ClassVar[tuple[tuple[str, Mapping[str, str]], ...]] = (
        ("displacement", {"validation": "val/displacement"}),
    )

    def __init__(self, spec: DataSpec, *, pair_weight: NonNegativeFloat, unsorted: bool) -> None:
        super().__init__(spec)
        self.pair_weight, self.unsorted = pair_weight, unsorted

    @property
    def rows(self) -> tuple[Row, ...]:
        return (
            Row("as they come", f"{self.metric.key}_unsorted", "unsorted"),
            Row("{order}", self.metric.key, "sorted"),
            Row("samples in order", "test/in_order", "in order", ".3f"),
        )

    def problems(self, plan: Plan) -> list[str]:
        method = plan.config["method"]
        if method.get("scorer", "mlp") == "vector":
            return ["method.scorer=vector: has one order for all samples; expected linear or mlp"]
        return []

    def idle(self, plan: Plan) -> Iterator[Idle]:
        if plan.config["method"]["component"] == "fixed":
            yield "task.unsorted", "method=fixed, which leaves the numbers as they come"

    def complete(self, config: dict[str, Any]) -> None:
        if config["method"]["component"] == "fixed":
            config["task"]["unsorted"] = False

    def beside(self, plan: Plan, arrays: Mapping[str, Any]) -> dict[str, Companion]:
        if not plan.config["task"]["unsorted"]:
            return {}
        fixed = {"name": "fixed", "component": "fixed", "order": "row"}
        change = {"method": fixed, "task.unsorted": False, "force": False, "ckpt_path": None}
        return {"unsorted": Companion(take=tuple(plan.config), change=change)}
