"""What a study's rows reach over the time that they take, from its table `results/<study>.csv`."""

import csv
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, LogFormatter, NullLocator, ScalarFormatter

from permlab.config.build import build
from permlab.config.compose import compose_config
from permlab.config.schema import component_names, constant, preset_component
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError, nearest
from permlab.figure.style import DPI, PALETTE, REFERENCE, new_figure, sign_figure
from permlab.task.metric import Metric
from permlab.task.task import Task

FRONT, OTHERS = PALETTE[1], PALETTE[0]
# Characters of a line of the key; a range of so many times that needs a logarithmic axis; marks on the axis of time.
KEY_WIDTH, WIDE, MAX_TICKS = 46, 3.0, 8
# Pixels between a number and all else that are enough.
CLEAR = 30.0


class Sample(NamedTuple):
    """A row of a study.

    Args:
        label: of the row.
        seconds, values: of its runs, one for each seed.
    """

    label: str
    seconds: np.ndarray
    values: np.ndarray


def section_figures(path: Path, words: Sequence[str] = ()) -> dict[str, Figure]:
    """Figure of every section of a table that has a time for two rows or more, by the section's title.

    Args:
        path: of the `.csv`.
        words: that a title has to have.
    Raises:
        ConfigError: if there is no such table or section.
    """
    sections = _read(path)
    chosen = {title: records for title, records in sections.items() if all(word in title for word in words)}
    if not chosen:
        raise ConfigError(
            f"{' '.join(words)}: no section of {path} is called so{nearest(' '.join(words), list(sections))}"
        )
    drawn = {title: _section_figure(title, records) for title, records in chosen.items()}
    return {title: figure for title, figure in drawn.items() if figure is not None}


def _read(path: Path) -> dict[str, list[dict[str, str]]]:
    """Records of a table by its sections."""
    if not path.is_file():
        tables = [other.stem for other in path.parent.glob("*.csv")]
        raise ConfigError(f"{path}: no such table; the study writes it{nearest(path.stem, tables)}")
    sections: dict[str, list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for record in csv.DictReader(file):
            sections.setdefault(record["section"], []).append(record)
    return sections


def _section_figure(title: str, records: Sequence[Mapping[str, str]]) -> Figure | None:
    task = _task_of(title)
    key, clock = task.metric.key, task.clock[0]
    samples = []
    for label in dict.fromkeys(record["row"] for record in records):
        runs = [record for record in records if record["row"] == label and record.get(clock) and record.get(key)]
        if runs:
            samples.append(Sample(label, *(np.array([float(run[name]) for run in runs]) for name in (clock, key))))
    if len(samples) < 2:
        return None
    levels = {row.heading: _mean_of(records, row.key) for row in task.rows if row.once}
    seeds = sorted({int(record["seed"]) for record in records})
    figure = time_figure(samples, task.metric, levels={k: v for k, v in levels.items() if v}, clock=task.clock[1])
    sign_figure(figure, f"{title}; seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
    return figure


def _mean_of(records: Sequence[Mapping[str, str]], key: str) -> float | None:
    """Mean over the seeds of what is the same for all runs of a seed."""
    found = {record["seed"]: float(record[key]) for record in records if record.get(key)}
    return float(np.mean(list(found.values()))) if found else None


def _task_of(title: str) -> Task:
    """The task that a section is of, which knows what its numbers mean.

    Raises:
        ConfigError: if there is no such task or data any more.
    """
    name, _, rest = title.partition(": ")
    data = rest.partition(", ")[0]
    for group, choice in (("task", name), ("data", data)):
        if choice not in component_names(group):
            raise ConfigError(f"{title}: there is no {group}={choice}{nearest(choice, component_names(group))}")
    composed, problems = compose_config("train", [f"task={name}"])
    if problems:
        raise ConfigError(problems)
    kind = constant("data", preset_component("data", data), "kind")
    return build("task", composed["task"], DataSpec(kind, num_classes=2, channels=1, height=1, width=1))


def front(samples: Sequence[Sample], metric: Metric) -> list[int]:
    """Places of the rows than which none is as fast and better: the best that can be had in a given time, in its order.

    Example:
        >>> from permlab.task.metric import Metric
        >>> rows = [Sample("a", np.array([9.0]), np.array([5.0])), Sample("b", np.array([1.0]), np.array([7.0])),
        ...         Sample("c", np.array([2.0]), np.array([8.0]))]
        >>> front(rows, Metric("loss", "min"))
        [1, 0]
    """
    sign = 1 if metric.better == "min" else -1
    times, values = (np.array([column.mean() for column in columns]) for columns in _columns(samples))
    found: list[int] = []
    for index in np.lexsort((sign * values, times)):
        if not found or sign * values[index] < sign * values[found[-1]]:
            found.append(int(index))
    return found


def _columns(samples: Sequence[Sample]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [sample.seconds for sample in samples], [sample.values for sample in samples]


def time_figure(samples: Sequence[Sample], metric: Metric, *, levels: Mapping[str, float], clock: str) -> Figure:
    """Mean and deviation of every row over the seconds that it takes, on a logarithmic axis; the front is a line.

    Points bear numbers, the best row's first, which the key beside them explains.

    Args:
        samples: of rows, at least one.
        metric: of their values.
        levels: values without a time of their own, by name.
        clock: what the seconds are of.
    """
    figure = new_figure(11.0, 1.9 + max(3.9, 0.32 * len(samples)))
    axes, key = figure.subplots(1, 2, width_ratios=(1.75, 1))
    on_front, sign = front(samples, metric), 1 if metric.better == "min" else -1
    ranked = sorted(range(len(samples)), key=lambda index: sign * samples[index].values.mean())
    numbers = {index: number for number, index in enumerate(ranked, start=1)}
    for index, sample in enumerate(samples):
        _draw_point(axes, sample, metric, FRONT if index in on_front else OTHERS)
    for name, level in levels.items():
        axes.axhline(metric.scale * level, color=REFERENCE, linestyle="--", linewidth=1.2)
        axes.annotate(name, (0.995, metric.scale * level), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      color=REFERENCE, fontsize=9)  # fmt: skip
    _draw_front(axes, [samples[index] for index in on_front], metric)
    _set_axes(axes, samples, metric, clock, levels)
    _number(axes, samples, metric, numbers, on_front)
    _write_key(key, [(numbers[index], samples[index], index in on_front) for index in ranked], metric)
    return figure


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _draw_point(axes: Axes, sample: Sample, metric: Metric, colour: str) -> None:
    bars: dict[str, Any] = {"elinewidth": 1.0, "alpha": 0.55, "capsize": 0}
    mean, error = sample.seconds.mean(), _spread(sample.seconds)
    low = min(error, 0.9 * mean)  # a logarithmic axis has no place for what is below zero
    axes.errorbar(mean, metric.scale * sample.values.mean(), metric.scale * _spread(sample.values),
                  [[low], [error]], fmt="none", ecolor=colour, zorder=2, **bars)  # fmt: skip
    axes.plot(mean, metric.scale * sample.values.mean(), "o", color=colour, markersize=6, markeredgecolor="white",
              markeredgewidth=0.8, zorder=4)  # fmt: skip


def _draw_front(axes: Axes, best: Sequence[Sample], metric: Metric) -> None:
    times = [sample.seconds.mean() for sample in best]
    values = [metric.scale * sample.values.mean() for sample in best]
    axes.step([*times, 1e9], [*values, values[-1]], where="post", color=FRONT, linewidth=1.6, alpha=0.8, zorder=3,
              label="best that can be had in a given time")  # fmt: skip


def _set_axes(axes: Axes, samples: Sequence[Sample], metric: Metric, clock: str, levels: Mapping[str, float]) -> None:
    times = np.array([sample.seconds.mean() for sample in samples])
    values = np.array([*(sample.values.mean() for sample in samples), *levels.values()])
    axes.set(xscale="log", xlabel=clock, ylabel=metric.title, xlim=(times.min() / 1.6, times.max() * 1.8))
    if metric.is_ratio and values.max() > WIDE * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2.0, 0.5)))
    ticks = _ticks(*axes.get_xlim())
    if len(ticks) > 1:
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.xaxis.set_major_formatter(FixedFormatter(list(ticks.values())))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title("points: mean;  bars: standard deviation over seeds", size=9.5)
    axes.legend(loc="upper right" if metric.better == "min" else "lower right", fontsize=9)


def _ticks(low: float, high: float) -> dict[float, str]:
    """Times between two that people count in, as few as fit beside each other."""
    units = ((1, "s"), (60, "min"), (3600, "h"))
    times: dict[float, str] = {
        unit * count: f"{count} {name}" for unit, name in units for count in (1, 2, 5, 10, 20, 30)
    }
    times |= {0.1: "0.1 s", 0.2: "0.2 s", 0.5: "0.5 s"}
    fitting = {time: text for time, text in sorted(times.items()) if low <= time <= high}
    few = {time: text for time, text in fitting.items() if text.partition(" ")[0] in ("0.1", "1", "10")}
    return few if len(fitting) > MAX_TICKS else fitting


def _number(axes: Axes, samples: Sequence[Sample], metric: Metric, numbers: Mapping[int, int], best: list[int]) -> None:
    """Each point's number beside it, at the nearest of several places that keeps clear of points and other numbers."""
    centres = [(sample.seconds.mean(), metric.scale * sample.values.mean()) for sample in samples]
    points = [axes.transData.transform(centre) for centre in centres]
    taken = list(points)
    for index in sorted(numbers, key=numbers.__getitem__):
        others = [other for other in taken if other is not points[index]]
        place = max(_places(points[index]), key=lambda spot: min([CLEAR, *(np.hypot(*(spot - o)) for o in others)]))
        taken.append(place)
        style: dict[str, Any] = {"color": FRONT, "weight": "bold"} if index in best else {"color": OTHERS}
        offset = (place - points[index]) * 72 / DPI
        axes.annotate(str(numbers[index]), centres[index], (offset[0], offset[1]), textcoords="offset points",
                      ha="center", va="center", fontsize=9, zorder=5, **style)  # fmt: skip


def _places(point: np.ndarray) -> list[np.ndarray]:
    angles = np.deg2rad([45, 135, 225, 315, 0, 90, 180, 270])
    return [point + radius * np.array([np.cos(a), np.sin(a)]) for radius in (26, 40) for a in angles]


def _write_key(axes: Axes, rows: Sequence[tuple[int, Sample, bool]], metric: Metric) -> None:
    """Number, name and values of every row, from the best downwards."""
    axes.axis("off")
    lines = [textwrap.wrap(sample.label.replace("task.", ""), KEY_WIDTH) or [""] for _, sample, _ in rows]
    total = sum(len(line) + 1.35 for line in lines)
    top = 1.0
    for (number, sample, best), line in zip(rows, lines, strict=True):
        number_of_seeds = f" ± {metric.show_mean(_spread(sample.values))}" if len(sample.values) > 1 else ""
        seconds, seeds = f"{sample.seconds.mean():.3g} s", f"{len(sample.values)} seeds"
        values = f"{metric.show_mean(sample.values.mean())}{number_of_seeds}, {seconds}, {seeds}"
        style: dict[str, Any] = {"va": "top", "fontsize": 8.5, "color": FRONT if best else "#333333"}
        axes.text(0.0, top, f"{number}", weight="bold", ha="left", **style)
        axes.text(0.07, top, "\n".join([*line, values]), linespacing=1.15, **style)
        top -= (len(line) + 1.35) / total
