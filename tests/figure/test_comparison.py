"""The picture of a run's claim: curves of all that are compared, their tests, and numbers that do not overlap."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.text import Text

from permlab.config.compose import resolve_train
from permlab.figure.comparison import Side, _apart, comparison_figure, draw
from permlab.record.rundir import MetricsFile, write_json, write_npz
from permlab.task.metric import ACCURACY, PERPLEXITY

CURVE = np.array([[10, 0.2], [20, 0.5]])
HIGHER = np.array([[10, 0.45], [20, 0.75]])
NONE = np.empty((0, 2))


def diamonds(axes) -> list[float]:
    return [float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "D"]


def test_curves_tests_and_differences() -> None:
    sides = [Side("control", CURVE, 0.5), Side("learned", HIGHER, 0.75), Side("level", NONE, 0.7)]
    axes = comparison_figure(sides, ACCURACY).axes[0]
    curves = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata()) == 2][:2]
    assert curves == [[[10, 20], [20, 50]], [[10, 45], [20, 75]]]
    assert diamonds(axes) == pytest.approx([50, 75, 70])
    texts = sorted(text.get_text() for text in axes.texts)
    assert texts == ["control\n50.0 %", "learned\n75.0 %  (+25.0)", "level\n70.0 %  (+20.0)"]
    assert axes.get_ylabel() == "accuracy, %"


@pytest.mark.parametrize("finals", [(0.6, 0.79, 0.79), (0.5, 0.5, 0.5), (0.1, 0.9, 0.11)])
def test_labels_do_not_overlap_and_nothing_is_cut_off(finals: tuple[float, ...]) -> None:
    sides = [Side(f"one of several that are compared, {i}", CURVE, final) for i, final in enumerate(finals)]
    figure = comparison_figure(sides, ACCURACY)
    figure.draw_without_rendering()
    heights = [Text.get_window_extent(text).height for text in figure.axes[0].texts]  # without the arrow
    middles = sorted(
        text.get_position()[1] * figure.axes[0].get_window_extent().height for text in figure.axes[0].texts
    )
    assert min(b - a for a, b in pairwise(middles)) >= max(heights)
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.01
    assert (box.x1, box.y1) <= (width + 0.01, height + 0.01)


def test_labels_are_moved_no_more_than_needed() -> None:
    assert _apart(np.array([0.1, 0.5, 0.9]), 0.2).tolist() == [0.1, 0.5, 0.9]
    np.testing.assert_allclose(_apart(np.array([0.5, 0.5, 0.9]), 0.2), [0.4, 0.6, 0.9])
    np.testing.assert_allclose(_apart(np.array([0.5, 0.5, 0.6]), 0.2), [1 / 3, 1 / 3 + 0.2, 1 / 3 + 0.4])


def run_directory(folder: Path, words: list[str], summary: dict[str, float]) -> Path:
    plan, _ = resolve_train(words)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(plan.config)))
    write_json(folder / "summary.json", summary)
    metrics = MetricsFile(folder / "metrics.jsonl")
    key = plan.task.metric.validation_key
    for step, value in CURVE.tolist():
        metrics.update(int(step), {key: value})
    return folder


def test_a_run_is_drawn_with_those_beside_it_from_its_own_files(tmp_path: Path) -> None:
    summary = {"test/accuracy": 0.75, "test/accuracy_control": 0.5, "test/accuracy_refit": 0.8}
    folder = run_directory(tmp_path, [], summary)
    write_npz(folder / "arrays" / "beside.npz", control=CURVE, refit=HIGHER)
    axes = draw(folder).axes[0]
    assert diamonds(axes) == [50, 75, 80]
    assert sorted(line.get_ydata().tolist()[-1] for line in axes.lines if len(line.get_xydata()) == 2) == [50, 50, 75]
    assert "learned order, fresh model (refit)\n80.0 %  (+30.0)" in [text.get_text() for text in axes.texts]


def test_another_task_compares_what_it_has(tmp_path: Path) -> None:
    words = ["task=prune", "data=pydocs", "model=llama_nano", "method=sort_ste"]
    folder = run_directory(tmp_path, words, {"test/perplexity": 8.0, "test/perplexity_dense": 6.0})
    figure = draw(folder)
    assert figure.axes[0].get_ylabel() == PERPLEXITY.title
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "dense\n6  (-2)",
        "pruned, order of sort_ste\n8",
    ]


def test_a_single_number_is_no_comparison(tmp_path: Path) -> None:
    assert draw(tmp_path) is None
    assert draw(run_directory(tmp_path, [], {"test/accuracy": 0.75})) is None
