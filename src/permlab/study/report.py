"""The report at the end of a run, from its files."""

from collections.abc import Mapping
from pathlib import Path

from permlab.config.plan import Plan
from permlab.task.metric import Row

WIDTH = 36


def print_report(plan: Plan, summary: Mapping[str, float]) -> None:
    """Print the tests of a run and of its controls, their differences, the picture to open, and the run directory."""
    print(report(plan, summary))
    figures = [Path(plan.directory, "figures", f"{name}.png") for name in plan.task.pictures]
    for figure in [path for path in figures if path.is_file()][:1]:
        print(f"picture: {figure}")
    print(f"run: {plan.directory}", flush=True)


def report(plan: Plan, summary: Mapping[str, float]) -> str:
    """The report as text; where there is nothing to compare with, the one line that there is."""
    metric, rows = plan.task.metric, plan.task.rows
    compared = [row for row in rows if row.format is None]
    first = summary.get(compared[0].key)
    if first is None or len(compared) == 1:
        shown = f"{metric.show(summary[metric.key])} {metric.unit}".rstrip()
        return f"test {metric.name}, 1 seed: {shown} ({_order(plan)})"
    lines = [f"{f'test {metric.name}, 1 seed':<{WIDTH}}{metric.unit:>8}{'difference':>12}"]
    for row in compared:
        value = summary.get(row.key)
        if value is not None:
            line = f"{row.label.format(order=_order(plan)):<{WIDTH}}{metric.show(value):>8}"
            lines.append(line if row is compared[0] else line + f"{metric.show(value - first, sign='+'):>12}")
    return "\n".join([*lines, *(_quantity(row, summary) for row in rows if _is_quantity(row, summary))])


def _is_quantity(row: Row, summary: Mapping[str, float]) -> bool:
    return row.format is not None and bool(row.label) and row.key in summary


def _quantity(row: Row, summary: Mapping[str, float]) -> str:
    return f"{row.label:<{WIDTH}}{summary[row.key]:>8.4g}"


def _order(plan: Plan) -> str:
    method = plan.config["method"]
    if method["component"] == "fixed":
        order = method["order"] if isinstance(method["order"], str) else "given"
        return f"order {order}, fixed"
    verb = "learned" if "lr" in method else "found"
    return f"order {verb} by {method['name']}"
