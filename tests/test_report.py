"""The table at the end of a run."""

from permlab.cli import resolve
from permlab.report import report


def test_differences_are_to_the_control() -> None:
    config, _ = resolve("train", [])
    summary = {"test/accuracy": 0.75, "test/accuracy_control": 0.5, "test/accuracy_refit": 0.4}
    rows = [line.split() for line in report(config, summary).splitlines()]
    assert [row[-1] for row in rows] == ["difference", "50.0", "+25.0", "-10.0"]
    assert [row[-2] for row in rows[2:]] == ["75.0", "40.0"]


def test_an_order_per_image_has_no_refit_row() -> None:
    config, _ = resolve("train", [])
    assert "refit" not in report(config, {"test/accuracy": 0.75, "test/accuracy_control": 0.5})


def test_without_a_control_there_is_one_line() -> None:
    learned, _ = resolve("train", ["method=sort_ste"])
    fixed, _ = resolve("train", ["method=fixed", "method.order=spiral"])
    assert report(learned, {"test/accuracy": 0.5}) == "test accuracy, 1 seed: 50.0 % (order learned by sort_ste)"
    assert report(fixed, {"test/accuracy": 0.5}) == "test accuracy, 1 seed: 50.0 % (order spiral, fixed)"
