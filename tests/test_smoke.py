"""Backbones, methods and tasks fit each other: they take two steps together, and the large presets build.

What each promises by itself is in the batteries of `tests/contract`; here every choice of one is met by some
choice of the other, and by all of them in `make test-all`.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
from runs import train
from scale import FULL

import permlab.run.story
from permlab.config.compose import compose_config
from permlab.config.schema import component_names, constant

NANO = ("vit_nano", "vim_nano", "llama_nano", "ssm_probe", "qwen_vl_nano")
PRUNED = tuple(name for name in NANO if name != "ssm_probe")  # which has no blocks
METHODS = component_names("method")


def those_for(what: str) -> list[str]:
    """Methods that permute items, or weights."""
    named = {name: compose_config("train", [f"method={name}"])[0]["method"]["component"] for name in METHODS}
    return [name for name, own in named.items() if what in (constant("method", own, "permutes") or (what,))]


def pairs(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, str]]:
    """All combinations, or enough of them that every choice is in one."""
    if FULL:
        return [(one, other) for one in first for other in second]
    count = max(len(first), len(second))
    return [(first[index % len(first)], second[index % len(second)]) for index in range(count)]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permlab.run.story, "draw_all", lambda run_dir: [])


@pytest.mark.parametrize(("model", "method"), pairs(NANO, those_for("items")))
def test_backbones_train_with_methods(model: str, method: str, tmp_path: Path) -> None:
    result = train(tmp_path, f"model={model}", f"method={method}", "model.patch_size=2", "task.control=false")
    assert result.code == 0, result.err
    assert result.summary["train/steps"] == 2
    assert 0 <= result.summary["test/accuracy"] <= 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that every dense model is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(("model", "method"), pairs(PRUNED, those_for("weights")))
def test_backbones_are_pruned_with_methods(model: str, method: str, runs: Path) -> None:
    options = ["task=prune", "task.dense_steps=2", "task.num_samples=32", "task.num_groups=2"]
    options += ["method.num_polish_steps=2"] if method in ("hybrid", "loss_search", "swap_descent") else []
    options += ["method.num_descent_steps=4"] if method == "swap_descent" else []
    result = train(runs, *options, f"model={model}", f"method={method}", "model.patch_size=2")
    assert result.code == 0, result.err
    assert 0.5 < result.summary["prune/retained"] < 1
    assert 0 <= result.summary["test/accuracy"] <= 1


@pytest.mark.parametrize(("model", "position"), pairs(NANO, ["item", "slot", "none"]))
def test_backbones_train_with_positions(model: str, position: str, tmp_path: Path) -> None:
    result = train(tmp_path, f"model={model}", f"model.position={position}", "model.patch_size=4", "task.control=false")
    assert result.code == 0, result.err


def test_mixed_precision(tmp_path: Path) -> None:
    options = ("trainer.precision=bf16-mixed", "model.patch_size=4", "task.control=false")
    for model in NANO:
        result = train(tmp_path, f"model={model}", *options)
        assert result.code == 0, result.err
