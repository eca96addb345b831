"""Every backbone with every method takes two steps, and the large presets build."""

from pathlib import Path

import pytest
from runs import train

import permlab.run.story
from permlab.config.compose import compose_config
from permlab.config.schema import class_name, component_names, component_path
from permlab.option import class_constant

NANO = ("vit_nano", "vim_nano", "llama_nano", "ssm_probe", "qwen_vl_nano")
METHODS = component_names("method")


def _for_pruning_only(preset: str) -> bool:
    component = compose_config("train", [f"method={preset}"])[0]["method"]["component"]
    return class_constant(component_path("method", component), class_name(component), "tasks") is not None


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permlab.run.story, "draw_all", lambda run_dir: [])


@pytest.mark.parametrize("model", NANO)
@pytest.mark.parametrize("method", [name for name in METHODS if not _for_pruning_only(name)])
def test_every_backbone_trains_with_every_method(model: str, method: str, tmp_path: Path) -> None:
    result = train(tmp_path, f"model={model}", f"method={method}", "model.patch_size=2", "task.control=false")
    assert result.code == 0, result.err
    assert result.summary["train/steps"] == 2
    assert 0 <= result.summary["test/accuracy"] <= 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that every dense model is trained once."""
    return tmp_path_factory.mktemp("runs")


PAIRS = [("vit_nano", method) for method in METHODS] + [
    (model, method)
    for model in ("vim_nano", "llama_nano", "qwen_vl_nano")
    for method in ("sinkhorn", "reorder", "hybrid", "swap_search")
]


@pytest.mark.parametrize(("model", "method"), PAIRS)
def test_every_backbone_is_pruned_with_every_method(model: str, method: str, runs: Path) -> None:
    options = ["task=prune", "task.dense_steps=2", "task.num_samples=32", "task.num_groups=2"]
    options += ["method.num_polish_steps=2"] if method in ("hybrid", "loss_search") else []
    result = train(runs, *options, f"model={model}", f"method={method}", "model.patch_size=2")
    assert result.code == 0, result.err
    assert 0.5 < result.summary["prune/retained"] < 1
    assert 0 <= result.summary["test/accuracy"] <= 1


@pytest.mark.parametrize("position", ["item", "slot", "none"])
@pytest.mark.parametrize("model", NANO)
def test_every_backbone_trains_with_every_position(model: str, position: str, tmp_path: Path) -> None:
    result = train(tmp_path, f"model={model}", f"model.position={position}", "model.patch_size=4", "task.control=false")
    assert result.code == 0, result.err


def test_mixed_precision(tmp_path: Path) -> None:
    options = ("trainer.precision=bf16-mixed", "model.patch_size=4", "task.control=false")
    for model in NANO:
        result = train(tmp_path, f"model={model}", *options)
        assert result.code == 0, result.err
