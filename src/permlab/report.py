"""The short table at the end of a run, from its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from permlab.config import run_directory

ROWS = (
    ("starting order, fixed (control)", "test/accuracy_control"),
    ("learned order, co-trained", "test/accuracy"),
    ("learned order, fresh model (refit)", "test/accuracy_refit"),
)


def print_report(config: Mapping[str, Any], summary: Mapping[str, float]) -> None:
    """Print test accuracy of control, learned and refit, their differences, and the run directory."""
    run_dir = run_directory(config)
    print(report(config, summary))
    figure = Path(run_dir, "figures", "order.png")
    if figure.is_file():
        print(f"picture: {figure}")
    print(f"run: {run_dir}", flush=True)


def report(config: Mapping[str, Any], summary: Mapping[str, float]) -> str:
    """The table as text; without a control, the one line that there is."""
    control = summary.get("test/accuracy_control")
    if control is None:
        return f"test accuracy, 1 seed: {100 * summary['test/accuracy']:.1f} % ({_order(config)})"
    lines = [f"{'test accuracy, 1 seed':<36}{'%':>6}{'difference':>12}"]
    for label, key in ROWS:
        if key in summary:
            line = f"{label:<36}{100 * summary[key]:>6.1f}"
            lines.append(line if key == ROWS[0][1] else line + f"{100 * (summary[key] - control):>+12.1f}")
    return "\n".join(lines)


def _order(config: Mapping[str, Any]) -> str:
    method = config["method"]
    order = method["order"] if isinstance(method["order"], str) else "given"
    return f"order {order}, fixed" if method["component"] == "fixed" else f"order learned by {method['name']}"
