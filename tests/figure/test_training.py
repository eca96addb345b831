"""Training curves show what metrics.jsonl holds."""

import math

import pytest

from permlab.figure.training import training_figure
from permlab.task.classify.task import Classify

RECORDS = [
    {"step": 50, "train/loss": 2.0, "permutation/temperature": 0.3, "permutation/kendall": 1.0},
    {"step": 100, "train/loss": math.inf, "val/loss": 1.5, "val/accuracy": 0.5},
    {"step": 150, "train/loss": 1.0, "permutation/temperature": 0.1, "permutation/kendall": 0.5},
]
PHASES = [("warmup", 0, 0), ("active", 0, 100), ("frozen", 100, 150)]


def test_every_panel_draws_its_metrics() -> None:
    figure = training_figure(RECORDS, PHASES, Classify.panels)
    drawn = {
        axes.get_ylabel(): {line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes
    }
    assert drawn == {
        "loss": {"train": [[50, 2.0], [100, math.inf], [150, 1.0]], "validation": [[100, 1.5]]},
        "accuracy": {"validation": [[100, 0.5]]},
        "temperature": {"temperature": [[50, 0.3], [150, 0.1]]},
        "permutation": {"Kendall's tau to\nthe starting order": [[50, 1.0], [150, 0.5]]},
    }


def test_panels_without_data_are_left_out() -> None:
    figure = training_figure([{"step": 1, "train/loss": 1.0}])
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss"]


def test_panels_whose_numbers_stay_are_left_out_beside_others() -> None:
    level = [{"step": step, "permutation/temperature": 0.3} for step in (1, 2)]
    assert [axes.get_ylabel() for axes in training_figure(level).axes] == ["temperature"]
    moving = [record | {"train/loss": 1 / record["step"]} for record in level]
    assert [axes.get_ylabel() for axes in training_figure(moving).axes] == ["loss"]


def test_phases_are_named_where_they_last() -> None:
    texts = {
        text.get_text(): text.get_position()[0]
        for text in training_figure(RECORDS, PHASES, Classify.panels).axes[0].texts
    }
    assert texts == {"active": 50, "frozen": 125}


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 record"):
        training_figure([{"step": 1, "other": 2.0}])


def test_nothing_is_cut_off() -> None:
    figure = training_figure(RECORDS, PHASES, Classify.panels)
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.01
    assert (box.x1, box.y1) <= (width + 0.01, height + 0.01)
