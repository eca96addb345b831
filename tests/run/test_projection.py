"""What `plan=true` says: operations against formulas, pieces that grow with their options, and nothing written."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

import permlab.run.estimate
from permlab.cli import main
from permlab.config.compose import resolve_train
from permlab.run import projection
from permlab.run.estimate import Shape, foretold, passes_seconds

TEXT = ("data=pydocs", "task=prune", "task.dense_steps=10")
DESCENT = ("method=swap_descent", "method.num_descent_steps=100")


def planned(folder: Path, *words: str) -> dict[str, Any]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main("train", [*words, "plan=json", "figures=false", f"paths.runs={folder / 'runs'}"]) == 0
    assert not (folder / "runs").exists()
    return json.loads(out.getvalue())


def parts_of(training: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {part["name"]: part for part in training["parts"]}


def test_operations_of_a_vit_are_those_of_its_products(tmp_path: Path) -> None:
    """Two blocks of width 32 over 64 patches and a class token; nothing but matrix products is counted."""
    (training,) = planned(tmp_path, "model=vit_nano", "method=fixed", "trainer.max_steps=7")["trainings"]
    n, d, hidden = 65, 32, 64
    block = 2 * n * d * (3 * d + d + 2 * hidden) + 4 * n * n * d
    forward = 2 * block + 2 * 64 * d + 2 * d * 10
    assert parts_of(training)["test"]["flops"] == 3 * 128 * forward  # 360 images in batches of 128
    # A product has two products for its gradients, but that of the patches only one; attention multiplies
    # queries and keys once more instead of keeping their product.
    backward = 2 * forward - 2 * 64 * d + 2 * (2 * n * n * d)
    assert training["step_flops"] == 128 * (forward + backward)
    assert training["steps"] == 7
    assert parts_of(training)["training"]["flops"] == 7 * training["step_flops"]


def test_memory_holds_the_parts_that_are_named(tmp_path: Path) -> None:
    (training,) = planned(tmp_path, "model=vit_nano", "method=fixed", "trainer.max_steps=7")["trainings"]
    model, learned, method = training["parameters"]
    assert method == 0
    assert training["bytes"]["weights"] >= 4 * model
    assert training["bytes"]["optimiser state"] == pytest.approx(8 * learned, rel=0.01)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models count as too large to be tried."""
    monkeypatch.setattr(projection, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(permlab.run.estimate, "matmul_speed", lambda *_: 1e9)


def test_a_model_that_is_not_tried_is_projected_by_its_passes(tmp_path: Path, untried: None) -> None:
    """Each piece by the samples that it reads: a step of the descent a batch and its gradients."""
    words = (*TEXT, "model=llama_nano", *DESCENT, "method.num_polish_steps=4", "task.num_samples=24")
    plan = planned(tmp_path, *words)
    prune = plan["trainings"][-1]
    parts = parts_of(prune)
    sample = parts["calibration"]["flops"] / (2 * 24)
    assert parts["descent"]["flops"] == pytest.approx(100 * 3 * 16 * sample)
    assert parts["polishing"]["flops"] == pytest.approx(5 * 3 * 24 * sample)
    assert parts["descent"]["seconds"] / parts["polishing"]["seconds"] == pytest.approx(1600 / (5 * 24))
    assert prune["how"] == "the speed of a matrix product"
    twice = planned(tmp_path, *words, "method.num_descent_steps=200")["trainings"][-1]
    assert parts_of(twice)["descent"]["seconds"] == pytest.approx(2 * parts["descent"]["seconds"])


def test_what_is_tried_has_the_descent_among_its_pieces(tmp_path: Path) -> None:
    words = (*TEXT, "model=llama_nano", "task.num_samples=8", "method.num_polish_steps=0")
    few, many = (
        planned(tmp_path, *words, "method=swap_descent", f"method.num_descent_steps={steps}")["trainings"][-1]
        for steps in (10, 40)
    )
    assert parts_of(many)["descent"]["flops"] == pytest.approx(4 * parts_of(few)["descent"]["flops"])
    assert parts_of(many)["descent"]["flops"] > 0


def test_seven_billion_parameters_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permlab.run.estimate, "matmul_speed", lambda *_: 1e11)
    words = ("data=pydocs", "data.tokenizer=byte", "model=llama_2_7b", "task=lm", "trainer.max_steps=3")
    plan = planned(tmp_path, *words)
    (training,) = plan["trainings"]
    width, hidden, depth, vocabulary = 4096, 11008, 32, 256
    weights = depth * (4 * width**2 + 3 * width * hidden + 2 * width) + width
    assert training["parameters"][0] - weights in (vocabulary * width, 2 * vocabulary * width)
    n = training["num_items"]
    products = 2 * n * (depth * (4 * width**2 + 3 * width * hidden) + vocabulary * width) + depth * 4 * n * n * width
    assert training["step_flops"] == pytest.approx(3 * 16 * products, rel=0.02)
    assert plan["gpus"]["T4"]["float32"] is None, "weights, gradients and moments do not fit"


def test_a_pass_takes_as_long_as_its_products_or_its_calls() -> None:
    large, small = Shape(1, 1, 6 * 10**9, 10, True), Shape(1, 1, 6, 10**6, True)
    assert passes_seconds(large, 2, 3, 1e9) == pytest.approx(3 * 2 * 6 / 0.6)
    assert passes_seconds(small, 2, 3, 1e9) == pytest.approx(3 * 8)


@pytest.mark.parametrize(("steps", "said"), [(1, False), (10_000_000, True)])
def test_a_descent_of_hours_is_said_at_the_beginning(
    steps: int, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*TEXT, "model=llama_nano", "method=swap_descent", f"method.num_descent_steps={steps}")
    plan, _ = resolve_train([*words, "trainer.max_steps=1", f"paths.runs={tmp_path}"])
    foretold(plan)
    out, err = capsys.readouterr()
    assert ("here for the whole command" in out + err) == said
