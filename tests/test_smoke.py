"""Every backbone with every method takes two steps, and the large presets build."""

from pathlib import Path

import pytest
from runs import train

import permlab.run
from permlab.config import component_names

NANO = ("vit_nano", "vim_nano", "llama_nano", "ssm_probe")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permlab.run, "draw_all", lambda run_dir: [])


@pytest.mark.parametrize("model", NANO)
@pytest.mark.parametrize("method", component_names("method"))
def test_every_backbone_trains_with_every_method(model: str, method: str, tmp_path: Path) -> None:
    result = train(tmp_path, f"model={model}", f"method={method}", "model.patch_size=2", "task.control=false")
    assert result.code == 0, result.err
    assert result.summary["train/steps"] == 2
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
