"""The figure of a study, read back: against its table, and the front against all pairs of rows."""

from pathlib import Path

import numpy as np
import pytest

import permlab.study.__main__
from permlab.config.schema import CONF
from permlab.study.__main__ import main
from permlab.study.figures import FRONT, Sample, _ticks, front, section_figures, time_figure
from permlab.task.metric import ACCURACY, PERPLEXITY, Metric

TABLE = """section,row,seed,prune/seconds,test/accuracy,test/perplexity,test/perplexity_dense
"prune: pydocs, llama_nano, 2:4",wanda,0,1.0,0.2,30.0,4.0
"prune: pydocs, llama_nano, 2:4",wanda,1,3.0,0.2,50.0,6.0
"prune: pydocs, llama_nano, 2:4",hybrid,0,100.0,0.3,8.0,4.0
"prune: pydocs, llama_nano, 2:4",late,0,200.0,0.3,9.0,4.0
"prune: digits, vit_nano, 1:4",wanda,0,1.0,0.5,,
"prune: digits, vit_nano, 1:4",hybrid,0,2.0,0.6,,
"classify: digits, vit_nano",fixed,0,,0.6,,
"""


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(permlab.study.__main__, "RESULTS", tmp_path)
    (tmp_path / "tiny.csv").write_text(TABLE)
    return tmp_path


@pytest.mark.parametrize("metric", [ACCURACY, PERPLEXITY], ids=["max", "min"])
def test_the_front_is_what_no_other_row_beats_in_both(metric: Metric) -> None:
    rng = np.random.default_rng(0)
    sign = 1 if metric.better == "min" else -1
    for _ in range(20):
        samples = [Sample(str(i), rng.uniform(1, 9, 2), rng.uniform(1, 9, 2)) for i in range(8)]
        means = [(s.seconds.mean(), sign * s.values.mean()) for s in samples]
        expected = {
            i for i, (t, v) in enumerate(means) if not any(u <= t and w <= v for u, w in means if (u, w) != (t, v))
        }
        found = front(samples, metric)
        assert set(found) == expected
        assert [means[i][0] for i in found] == sorted(means[i][0] for i in found)


def test_points_are_the_rows_of_the_table_in_the_tasks_own_metric(results: Path) -> None:
    figures = section_figures(results / "tiny.csv")
    assert list(figures) == ["prune: pydocs, llama_nano, 2:4", "prune: digits, vit_nano, 1:4"]  # one needs two times
    text, digits = figures.values()
    axes, key = text.axes
    points = {tuple(line.get_xydata()[0]): line.get_color() for line in axes.lines if line.get_marker() == "o"}
    assert set(points) == {(2.0, 40.0), (100.0, 8.0), (200.0, 9.0)}
    assert [colour == FRONT for colour in points.values()] == [True, True, False]
    assert axes.get_ylabel() == "perplexity"
    assert axes.get_yscale() == axes.get_xscale() == "log"
    (level,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert set(level.get_ydata()) == {5.0}
    written = [note.get_text() for note in key.texts]
    assert written[0:2] == ["1", "hybrid\n8.000, 100 s, 1 seeds"]
    assert written[5] == f"wanda\n40.000 ± {np.std([30, 50], ddof=1):.3f}, 2 s, 2 seeds"
    assert text.get_suptitle() == "prune: pydocs, llama_nano, 2:4; seeds 0, 1"
    assert digits.axes[0].get_ylabel() == "accuracy, %"
    assert {line.get_ydata()[0] for line in digits.axes[0].lines if line.get_marker() == "o"} == {50.0, 60.0}


def test_no_number_lies_on_another_or_on_a_point() -> None:
    """Of the study that is here, every section."""
    for figure in section_figures(CONF.parent / "results" / "prune.csv").values():
        figure.draw_without_rendering()
        axes = figure.axes[0]
        boxes = [note.get_window_extent() for note in axes.texts if note.get_text().isdigit()]
        assert len(boxes) > 10
        centres = np.array([[(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2] for box in boxes])
        apart = np.linalg.norm(centres[:, None] - centres, axis=-1)
        assert apart[np.triu_indices(len(boxes), 1)].min() > 12


def test_the_axis_of_time_counts_as_people_do() -> None:
    assert list(_ticks(40, 4000).values()) == ["1 min", "2 min", "5 min", "10 min", "20 min", "30 min", "1 h"]
    assert list(_ticks(0.05, 4000).values()) == ["0.1 s", "1 s", "10 s", "1 min", "10 min", "1 h"]


def test_a_row_alone_and_a_time_with_a_wide_spread_are_drawn() -> None:
    samples = [Sample("one", np.array([0.1, 9.0]), np.array([0.4, 0.6]))]
    figure = time_figure(samples, ACCURACY, levels={}, clock="time")
    figure.draw_without_rendering()
    assert figure.axes[0].get_xlabel() == "time"


def test_the_command_writes_the_sections_that_are_asked_for(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure", "tiny", "digits"]) == 0
    assert capsys.readouterr().out == f"picture: {results / 'tiny_digits_vit_nano_1_4.png'}\n"
    assert sorted(path.name for path in results.glob("*.png")) == ["tiny_digits_vit_nano_1_4.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["figure", "tinny"], "tinny.csv: no such table; the study writes it; nearest valid choice: tiny"),
        (["figure"], "figure: of which study"),
        (["figure", "tiny", "prune: digits, vit_nan, 1:4"], "nearest valid choice: prune: digits, vit_nano, 1:4"),
        (["draw", "tiny"], "draw: no such command"),
    ],
)
def test_what_is_not_there_is_one_line(
    words: list[str], message: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
