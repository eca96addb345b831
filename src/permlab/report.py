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
    """The table as text."""
    control = summary.get("test/accuracy_control")
    lines = [f"{'test accuracy, 1 seed':<36}{'%':>6}{'difference':>12}"]
    for label, key in ROWS:
        if key not in summary:
            continue
        if control is None:
            label = f"order {_short(config['method']['order'])}, {config['method']['name']}"
        line = f"{label:<36}{100 * summary[key]:>6.1f}"
        if control is not None and key != "test/accuracy_control":
            line += f"{100 * (summary[key] - control):>+12.1f}"
        lines.append(line)
    return "\n".join(lines)


def _short(order: str | list[int]) -> str:
    return order if isinstance(order, str) else "given"
