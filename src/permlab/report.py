"""The short table at the end of a run, from its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from permlab.config import run_directory

# Label and suffix of the metric; what follows the first is compared with it.
ORDER_ROWS = (
    ("starting order, fixed (control)", "_control"),
    ("learned order, co-trained", ""),
    ("learned order, fresh model (refit)", "_refit"),
)
PRUNING_ROWS = (("pruned, channels as they are", "_unpermuted"), ("pruned, {order}", ""), ("dense", "_dense"))


def print_report(config: Mapping[str, Any], summary: Mapping[str, float]) -> None:
    """Print the tests of a run and of its controls, their differences, and the run directory."""
    run_dir = run_directory(config)
    print(report(config, summary))
    figure = Path(run_dir, "figures", "order.png")
    if figure.is_file():
        print(f"picture: {figure}")
    print(f"run: {run_dir}", flush=True)


def headline(summary: Mapping[str, float]) -> str:
    """The metric a run is judged by: perplexity of text, accuracy of images."""
    return "test/perplexity" if "test/perplexity" in summary else "test/accuracy"


def report(config: Mapping[str, Any], summary: Mapping[str, float]) -> str:
    """The table as text; without a control, the one line that there is."""
    metric = headline(summary)
    percent = metric == "test/accuracy"
    name, unit = metric.removeprefix("test/"), "%" if percent else ""
    pruned = f"{metric}_unpermuted" in summary
    rows = PRUNING_ROWS if pruned else ORDER_ROWS
    control = summary.get(metric + rows[0][1])
    if control is None:
        return f"test {name}, 1 seed: {_number(summary[metric], percent)} {unit}".rstrip() + f" ({_order(config)})"
    lines = [f"{f'test {name}, 1 seed':<36}{unit:>8}{'difference':>12}"]
    for label, suffix in rows:
        value = summary.get(metric + suffix)
        if value is not None:
            line = f"{label.format(order=_order(config)):<36}{_number(value, percent):>8}"
            lines.append(line if suffix == rows[0][1] else line + f"{_number(value - control, percent, sign='+'):>12}")
    return "\n".join(lines + (_pruning(summary) if pruned else []))


def _pruning(summary: Mapping[str, float]) -> list[str]:
    shown = (
        ("retained score", "prune/retained"),
        ("efficacy", "prune/efficacy"),
        ("reconstruction error, held out", "prune/reconstruction_error"),
        ("divergence from dense, calibration", "prune/calibration_loss"),
        ("seconds for the orders", "prune/seconds"),
        ("parameters learned", "prune/num_parameters"),
    )
    return [f"{label:<36}{summary[key]:>8.4g}" for label, key in shown if key in summary]


def _number(value: float, percent: bool, sign: str = "") -> str:
    return format(100 * value, f"{sign}.1f") if percent else format(value, f"{sign}.4g")


def _order(config: Mapping[str, Any]) -> str:
    method = config["method"]
    if method["component"] == "fixed":
        order = method["order"] if isinstance(method["order"], str) else "given"
        return f"order {order}, fixed"
    verb = "learned" if "lr" in method else "found"
    return f"order {verb} by {method['name']}"
