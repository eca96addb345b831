"""The table at the end of a run."""

from permlab.config.compose import resolve_train
from permlab.study.report import report


def test_differences_are_to_the_control() -> None:
    plan, _ = resolve_train([])
    summary = {"test/accuracy": 0.75, "test/accuracy_control": 0.5, "test/accuracy_refit": 0.4}
    rows = [line.split() for line in report(plan, summary).splitlines()]
    assert [row[-1] for row in rows] == ["difference", "50.0", "+25.0", "-10.0"]
    assert [row[-2] for row in rows[2:]] == ["75.0", "40.0"]


def test_an_order_per_image_has_no_refit_row() -> None:
    plan, _ = resolve_train([])
    assert "refit" not in report(plan, {"test/accuracy": 0.75, "test/accuracy_control": 0.5})


def test_without_a_control_there_is_one_line() -> None:
    learned, _ = resolve_train(["method=sort_ste"])
    fixed, _ = resolve_train(["method=fixed", "method.order=spiral"])
    assert report(learned, {"test/accuracy": 0.5}) == "test accuracy, 1 seed: 50.0 % (order learned by sort_ste)"
    assert report(fixed, {"test/accuracy": 0.5}) == "test accuracy, 1 seed: 50.0 % (order spiral, fixed)"


# Pruning and text

PRUNED = {"test/accuracy": 0.7, "test/accuracy_dense": 0.9, "test/accuracy_unpermuted": 0.65, "prune/retained": 0.8125}


def test_pruning_is_compared_with_channels_as_they_are_and_with_the_dense_model() -> None:
    plan, _ = resolve_train(["task=prune", "method=sort_ste"])
    lines = report(plan, PRUNED | {"prune/seconds": 12.0}).splitlines()
    assert lines[0].split() == ["test", "accuracy,", "1", "seed", "%", "difference"]
    cells = {line[:36].strip(): line[36:].split() for line in lines[1:]}
    assert cells == {
        "pruned, channels as they are": ["65.0"],
        "pruned, order learned by sort_ste": ["70.0", "+5.0"],
        "dense": ["90.0", "+25.0"],
        "retained score": ["0.8125"],
        "seconds for the orders": ["12"],
    }


def test_an_order_that_was_found_is_not_called_learned() -> None:
    plan, _ = resolve_train(["task=prune", "method=swap_search"])
    assert "pruned, order found by swap_search" in report(plan, PRUNED)
    plan, _ = resolve_train(["task=prune", "method=fixed"])
    assert "pruned, order row, fixed" in report(plan, PRUNED)


def test_perplexity_has_no_unit_and_falls_with_a_minus() -> None:
    plan, _ = resolve_train(["task=prune", "method=sort_ste", "data=pydocs", "model=llama_nano"])
    summary = {"test/perplexity": 8.125, "test/perplexity_dense": 5.5, "test/perplexity_unpermuted": 10.0}
    summary |= {"test/accuracy": 0.3, "test/accuracy_unpermuted": 0.2}
    lines = report(plan, summary).splitlines()
    assert lines[0].split() == ["test", "perplexity,", "1", "seed", "difference"]
    assert [line[36:].split() for line in lines[1:]] == [["10"], ["8.125", "-1.875"], ["5.5", "-4.5"]]
    assert plan.task.metric.key == "test/perplexity"


def test_a_language_model_is_one_line() -> None:
    plan, _ = resolve_train(["task=lm"])
    assert report(plan, {"test/perplexity": 12.25, "test/accuracy": 0.3}) == (
        "test perplexity, 1 seed: 12.25 (order row, fixed)"
    )
