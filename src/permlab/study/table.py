"""Tables over runs, from their files: one line of text for each job, or one row of Markdown for each configuration.

Both show the rows that the runs' task names; see `permlab.task.metric.Row`.
"""

import csv
import io
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from permlab.config.plan import Plan
from permlab.record.rundir import write_text
from permlab.study.finished import Finished, find_finished
from permlab.study.grid import Job
from permlab.task.metric import Metric

# Groups of the configuration in which rows may differ.
COMPARED = ("method", "task", "trainer", "model", "data", "optim")


def by_configuration(runs: Sequence[Finished]) -> list[list[Finished]]:
    """Runs that differ in nothing but the seed, together."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(run.plan.digest, []).append(run)
    return list(groups.values())


def _spread(values: Sequence[float], metric: Metric, sign: str) -> str:
    mean = metric.show_mean(statistics.mean(values))
    return f"{mean} {sign} {metric.show_mean(statistics.stdev(values))}" if len(values) > 1 else mean


# One line of text for each job


def job_table(jobs: Sequence[Job], plans: Sequence[Plan | None], codes: Sequence[int]) -> str:
    """One line per job, then mean and standard deviation over the seeds of each configuration."""
    swept = [index for index in range(len(jobs[0])) if len({job[index] for job in jobs}) > 1]
    runs = [find_finished(plan) if code == 0 else None for plan, code in zip(plans, codes, strict=True)]
    tasks = [plan.task for plan in plans if plan is not None]
    columns = [row for row in tasks[0].rows if row.format is None] if tasks else []
    lines = [[f"test {tasks[0].metric.title}" if tasks else "", *(row.heading for row in columns)]]
    for job, run, code in zip(jobs, runs, codes, strict=True):
        cells = [f"failed (exit {code})"] if run is None else [_cell([run], row.key) for row in columns]
        lines.append([_label(job, swept), *cells])
    for group in by_configuration([run for run in runs if run is not None]):
        if len(group) > 1:
            job = jobs[next(index for index, run in enumerate(runs) if run is group[0])]
            label = _label(job, [index for index in swept if not job[index].startswith("seed=")])
            lines.append([f"{label or 'all'} ({len(group)} seeds)", *(_cell(group, row.key) for row in columns)])
    return _aligned(lines)


def _label(job: Job, swept: Sequence[int]) -> str:
    return " ".join(job[index] for index in swept)


def _cell(group: Sequence[Finished], key: str) -> str:
    """The value of a run, or mean and deviation over the runs that have it."""
    values = [run.summary[key] for run in group if key in run.summary]
    few = len(values) < min(2, len(group))
    return "-" if few else _spread(values, group[0].plan.task.metric, "+-")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join(lines)


# One row of Markdown for each configuration


def write_table(runs: Sequence[Finished], path: Path, before: Sequence[Finished] = ()) -> str:
    """Write `<path>.md` and `<path>.csv` and return the Markdown.

    The first column names what differs between the rows of a section, a section being a task, dataset and model.

    Args:
        runs: several seeds of each configuration.
        path: of the two files, without suffix.
        before: runs that these needed, which count in the hours.
    """
    sections: dict[str, list[Finished]] = {}
    for run in runs:
        sections.setdefault(_section(run.plan), []).append(run)
    parts, records = [], []
    for title, group in sections.items():
        markdown, rows = _section_table(title, by_configuration(group))
        parts.append(markdown)
        records += rows
    text = "\n\n".join([*parts, _cost([*runs, *before])]) + "\n"
    write_text(path.with_suffix(".md"), text)
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path.with_suffix(".csv"), buffer.getvalue())
    return text


def _section(plan: Plan) -> str:
    names = plan.config
    title = f"{names['task']['name']}: {names['data']['name']}, {names['model']['name']}"
    return title + plan.task.section(plan)


def _section_table(title: str, groups: Sequence[Sequence[Finished]]) -> tuple[str, list[dict[str, Any]]]:
    labels = _labels([group[0].plan for group in groups])
    columns = _columns(groups)
    lines = [f"## {title}", "", _line(["", *(name for name, _ in columns)]), "|---" * (len(columns) + 1) + "|"]
    lines += _shared_lines(groups, len(columns))
    records = []
    for label, group in zip(labels, groups, strict=True):
        lines.append(_line([label, *(column(group) for _, column in columns)]))
        records += [{"section": title, "row": label, "seed": run.seed, **run.summary} for run in group]
    return "\n".join(lines), records


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shared_lines(groups: Sequence[Sequence[Finished]], num_columns: int) -> list[str]:
    """What is the same for many runs, each seed once."""
    task = groups[0][0].plan.task
    lines = []
    for row in task.rows:
        found: dict[tuple[str, ...], dict[int, float]] = {}
        for run in (run for group in groups for run in group):
            if row.once and row.key in run.summary:
                found.setdefault(_settings(run.plan, row.once), {})[run.seed] = run.summary[row.key]
        for settings, values in found.items():
            differing = [x for i, x in enumerate(settings) if any(other[i] != x for other in found)]
            spread = _spread(list(values.values()), task.metric, "±")
            lines.append(_line([" ".join([row.heading, *differing]), spread, *[""] * (num_columns - 1)]))
    return lines


def _settings(plan: Plan, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{key}={plan.config['task'].get(key)}" for key in keys)


def _labels(plans: Sequence[Plan]) -> list[str]:
    """What distinguishes each row: its name, and every other setting in which it differs from rows of that name."""
    flat = [_flatten({group: plan.config[group] for group in COMPARED}) for plan in plans]
    names = [plan.task.label(plan) for plan in plans]
    labels = []
    for name, settings in zip(names, flat, strict=True):
        same = [other for other, its in zip(flat, names, strict=True) if its == name]
        extra = [
            f"{key.removeprefix('method.')}={value}"
            for key, value in settings.items()
            if any(other.get(key) != value for other in same)
        ]
        labels.append(" ".join([name, *extra]))
    return labels


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


Baselines = Mapping[tuple[str, ...], Mapping[int, float]]


def _baselines(groups: Sequence[Sequence[Finished]]) -> Baselines:
    """The metric of the plain row for every seed, by what it shares with the rows it is for."""
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for run in (run for group in groups for run in group):
        plain = run.plan.task.baseline(run.plan, run.summary)
        if plain is not None:
            found.setdefault(_settings(run.plan, run.plan.task.compared_within), {})[run.seed] = plain
    return found


def _columns(groups: Sequence[Sequence[Finished]]) -> list[tuple[str, Callable[[Sequence[Finished]], str]]]:
    task, baselines = groups[0][0].plan.task, _baselines(groups)
    metric = task.metric
    columns: list[tuple[str, Callable[[Sequence[Finished]], str]]] = [
        (metric.title, lambda group: _spread([run.summary[metric.key] for run in group], metric, "±")),
    ]
    if baselines:
        heading = f"against plain, {metric.gain_unit} (worst)"
        columns.append((heading, lambda group: _gain(group, metric, baselines)))
    for row in task.rows:
        if row.format and any(row.key in run.summary for group in groups for run in group):
            columns.append((row.heading, lambda group, row=row: _mean(group, row.key, row.format)))  # type: ignore[misc]
    columns.append(("seeds", lambda group: str(len(group))))
    return columns


def _gain(group: Sequence[Finished], metric: Metric, baselines: Baselines) -> str:
    """Mean difference to the plain row of the same seed, and the least favourable."""
    plan = group[0].plan
    plain = baselines.get(_settings(plan, plan.task.compared_within), {})
    pairs = [(run.summary[metric.key], plain[run.seed]) for run in group if run.seed in plain]
    if not pairs or all(ours == theirs for ours, theirs in pairs):
        return ""
    gains = [metric.gain(ours, theirs) for ours, theirs in pairs]
    return f"{statistics.mean(gains):+.1f} ({metric.worst(gains):+.1f})"


def _mean(group: Sequence[Finished], key: str, shape: str) -> str:
    values = [run.summary[key] for run in group if key in run.summary]
    return format(statistics.mean(values), shape) if values else ""


def _cost(runs: Sequence[Finished]) -> str:
    """What the numbers are, what they were computed on, and how long that took in all."""
    found = sorted({run.provenance.get("device", "") for run in runs} - {""})
    line = f"Mean ± standard deviation over seeds. Computed on: {', '.join(found) or 'unknown'}."
    seconds = [run.summary.get("train/seconds", 0.0) for run in runs]
    return f"{line} {len(seconds)} runs, {sum(seconds) / 3600:.2f} hours in all." if any(seconds) else line
