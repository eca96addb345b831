"""The table of a study: one row for each configuration, mean and spread over its seeds, from the files of its runs."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from permlab.config import digest, run_directory
from permlab.report import headline
from permlab.rundir import read_provenance, read_summary, write_text

Config = Mapping[str, Any]
# What rows have to share to be compared: the dense model, and then what of it was pruned, on which samples.
DENSE = ("dense", "dense_steps")
PRUNED = (*DENSE, "sites", "num_samples")
# Columns of a pruning study beside the tested metric: heading, key, and format.
PRUNING = (
    ("retained", "prune/retained", ".4f"),
    ("efficacy", "prune/efficacy", ".3f"),
    ("reconstruction error", "prune/reconstruction_error", ".4f"),
    ("divergence", "prune/calibration_loss", ".4f"),
    ("seconds", "prune/seconds", ".1f"),
    ("MiB", "prune/peak_memory_mib", ".0f"),
    ("parameters", "prune/num_parameters", ".0f"),
)


def write_table(configs: Sequence[Config], path: Path) -> str:
    """Write `<path>.md` and `<path>.csv` and return the Markdown.

    Every configuration must have a finished run. The first column names what differs between
    the rows of a section, a section being a dataset and model (with a pattern, if pruned).

    Args:
        configs: of finished runs, several seeds of each configuration.
        path: of the two files, without suffix.
    """
    sections: dict[str, dict[str, list[Config]]] = {}
    for config in configs:
        sections.setdefault(_section(config), {}).setdefault(digest(config), []).append(config)
    parts, records = [], []
    for title, groups in sections.items():
        markdown, rows = _section_table(title, list(groups.values()))
        parts.append(markdown)
        records += rows
    text = "\n\n".join([*parts, _machine(configs)]) + "\n"
    write_text(path.with_suffix(".md"), text)
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path.with_suffix(".csv"), buffer.getvalue())
    return text


def _section(config: Config) -> str:
    task = config["task"]
    pattern = f", {task['n']}:{task['m']}" if "pruner" in task else ""
    return f"{task['name']}: {config['data']['name']}, {config['model']['name']}{pattern}"


def _section_table(title: str, groups: Sequence[Sequence[Config]]) -> tuple[str, list[dict[str, Any]]]:
    runs = [[(config, read_summary(run_directory(config))) for config in group] for group in groups]
    metric = headline(runs[0][0][1])
    labels = _labels([group[0] for group in groups])
    columns = _columns(runs, metric, _baselines(runs, metric))
    header = ["", *(name for name, _ in columns)]
    lines = [f"## {title}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    records = []
    for label, group in zip(labels, runs, strict=True):
        lines.append("| " + " | ".join([label, *(column(group) for _, column in columns)]) + " |")
        records += [_record(title, label, config, summary) for config, summary in group]
    dense = _dense_rows(runs, metric, len(columns))
    return "\n".join([*lines[:4], *dense, *lines[4:]]), records


def _dense_rows(runs: Any, metric: str, num_columns: int) -> list[str]:
    """The models that were pruned, each seed once."""
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for config, summary in (run for group in runs for run in group):
        if f"{metric}_dense" in summary:
            found.setdefault(_settings(config, DENSE), {})[config["seed"]] = summary[f"{metric}_dense"]
    lines = []
    for settings, values in found.items():
        differing = [x for i, x in enumerate(settings) if any(other[i] != x for other in found)]
        cells = [" ".join(["dense", *differing]), _spread(list(values.values()), metric), *[""] * (num_columns - 1)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _settings(config: Config, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{key}={config['task'].get(key)}" for key in keys)


def _labels(configs: Sequence[Config]) -> list[str]:
    """What distinguishes each row: method and pruner, and every other setting that is not a preset's own."""
    groups = ("method", "task", "trainer", "model", "data", "optim")
    flat = [_flatten({group: config[group] for group in groups}) for config in configs]
    labels = []
    for config, settings in zip(configs, flat, strict=True):
        name = config["method"]["name"]
        same = [other for other, c in zip(flat, configs, strict=True) if c["method"]["name"] == name]
        if "pruner" in config["task"]:
            same = [o for o in same if o["task.pruner"] == settings["task.pruner"]]
        extra = [
            f"{key.removeprefix('method.')}={value}"
            for key, value in settings.items()
            if any(other.get(key) != value for other in same)
        ]
        pruner = config["task"].get("pruner")
        shown = name if pruner is None else pruner if name == "fixed" else f"{pruner} + {name}"
        labels.append(" ".join([shown, *extra]))
    return labels


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _baselines(runs: Any, metric: str) -> dict[tuple[str, ...], dict[int, float]]:
    """Metric of plain Wanda, or of the fixed order, for every seed, by what it shares with the rows it is for.

    Runs that prune by Wanda have measured it themselves, on the way.
    """
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for config, summary in (run for group in runs for run in group):
        plain = metric if config["method"]["name"] == "fixed" else f"{metric}_unpermuted"
        if config["task"].get("pruner", "wanda") == "wanda" and plain in summary:
            found.setdefault(_settings(config, PRUNED), {})[config["seed"]] = summary[plain]
    return found


def _columns(
    runs: Any, metric: str, baselines: Mapping[tuple[str, ...], Mapping[int, float]]
) -> list[tuple[str, Callable[[Any], str]]]:
    percent = metric == "test/accuracy"
    columns: list[tuple[str, Callable[[Any], str]]] = [
        ("accuracy, %" if percent else "perplexity", lambda group: _spread([s[metric] for _, s in group], metric)),
    ]
    if baselines:
        unit = "points" if percent else "%"
        columns.append((f"against plain, {unit} (worst)", lambda group: _gain(group, metric, baselines)))
    for name, key, shape in PRUNING:
        if any(key in summary for group in runs for _, summary in group):
            columns.append((name, lambda group, key=key, shape=shape: _mean(group, key, shape)))  # type: ignore[misc]
    columns.append(("seeds", lambda group: str(len(group))))
    return columns


def _spread(values: Sequence[float], metric: str) -> str:
    scale, shape = (100, ".1f") if metric == "test/accuracy" else (1, ".3f")
    mean = format(scale * statistics.mean(values), shape)
    return f"{mean} ± {format(scale * statistics.stdev(values), shape)}" if len(values) > 1 else mean


def _gain(group: Any, metric: str, baselines: Mapping[tuple[str, ...], Mapping[int, float]]) -> str:
    """Mean difference to the baseline of the same seed, and the least favourable: points, or per cent of perplexity."""
    baseline = baselines.get(_settings(group[0][0], PRUNED), {})
    pairs = [(summary[metric], baseline[config["seed"]]) for config, summary in group if config["seed"] in baseline]
    if not pairs or all(ours == theirs for ours, theirs in pairs):
        return ""
    if metric == "test/accuracy":
        gains = [100 * (ours - theirs) for ours, theirs in pairs]
        return f"{statistics.mean(gains):+.1f} ({min(gains):+.1f})"
    gains = [100 * (ours / theirs - 1) for ours, theirs in pairs]
    return f"{statistics.mean(gains):+.1f} ({max(gains):+.1f})"


def _mean(group: Any, key: str, shape: str) -> str:
    values = [summary[key] for _, summary in group if key in summary]
    return format(statistics.mean(values), shape) if values else ""


def _record(title: str, label: str, config: Config, summary: Mapping[str, Any]) -> dict[str, Any]:
    return {"section": title, "row": label, "seed": config["seed"], **summary}


def _machine(configs: Sequence[Config]) -> str:
    found = sorted({read_provenance(run_directory(config)).get("device", "") for config in configs} - {""})
    return f"Mean ± standard deviation over seeds. Computed on: {', '.join(found) or 'unknown'}."
