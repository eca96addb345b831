"""What the machine has is looked at before torch is imported, and not where a run is only composed."""

import fnmatch
from typing import Any

import pytest

import permlab.config.machine
import permlab.run.story
from permlab.cli import main
from permlab.config.compose import resolve_train
from permlab.config.machine import check_machine, count_gpus
from permlab.data.cores import count_cores
from permlab.errors import ConfigError


def problems_of(monkeypatch: pytest.MonkeyPatch, *, gpus: int | None = 0, copies: Any = (), **trainer: Any) -> str:
    monkeypatch.setattr(permlab.config.machine, "count_cores", lambda: 2)
    monkeypatch.setattr(permlab.config.machine, "count_gpus", lambda: gpus)
    settings = {"accelerator": "cpu", "devices": 1} | trainer
    try:
        check_machine({"trainer": settings, "logger": {"copies": list(copies)}})
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("devices", [1, 2, "2", "auto", -1, [0, 1], "0,1", "what"])
def test_what_fits_is_left_alone(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems_of(monkeypatch, devices=devices) == ""
    assert problems_of(monkeypatch, devices=devices, accelerator="gpu", gpus=2) == ""
    assert problems_of(monkeypatch, devices=devices, accelerator="auto", gpus=None) == ""


@pytest.mark.parametrize("devices", [3, "3", 99, [0, 1, 2], "0,1,2"])
def test_more_than_there_is_is_refused(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = f"trainer.devices={devices}: there are 2 CPU cores, one for each process; nearest valid choice: 2"
    assert problems_of(monkeypatch, devices=devices) == cores
    assert problems_of(monkeypatch, devices=devices, accelerator="auto") == cores
    gpus = problems_of(monkeypatch, devices=devices, accelerator="auto", gpus=2)
    assert gpus == f"trainer.devices={devices}: there are 2 GPUs; nearest valid choice: 2"
    assert "1 GPU;" in problems_of(monkeypatch, devices=[1], accelerator="gpu", gpus=1)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems_of(monkeypatch, accelerator="gpu").startswith("trainer.accelerator=gpu: there is no GPU here")
    assert problems_of(monkeypatch, accelerator="gpu", gpus=None) == ""


def test_gpus_are_counted_as_the_driver_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permlab.config.machine.sys, "platform", "linux")
    present = ["nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl"]
    monkeypatch.setattr(
        permlab.config.machine.Path, "glob", lambda self, pattern: fnmatch.filter(present, pattern)
    )  # fmt: skip
    for visible, count in {"": 0, "0": 1, "1,3": 2, "-1": 0, "0,-1,2": 1, "0,1,2,3,4,5": 4}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert count_gpus() == count, visible
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert count_gpus() == 4
    present[:] = ["nvhost-gpu"]
    assert count_gpus() is None, "a Tegra board's GPU has another name"
    monkeypatch.setattr(permlab.config.machine.sys, "platform", "darwin")
    assert count_gpus() is None
    assert count_cores() >= 1


def test_a_copy_that_needs_a_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permlab.config.machine.importlib.util, "find_spec", lambda name: None)
    assert problems_of(monkeypatch, copies=["csv"]) == ""
    assert "logger=tensorboard: needs the package tensorboard" in problems_of(monkeypatch, copies=["tensorboard"])


def test_composing_asks_nothing_of_the_machine_and_starting_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.setattr(permlab.run.story, "train", lambda plan: pytest.fail("started"))
    words = ["trainer.devices=9999", f"paths.runs={tmp_path}"]
    assert resolve_train(words)[0].config["trainer"]["devices"] == 9999
    assert main("train", words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: trainer.devices=9999: there are ")
    assert list(tmp_path.iterdir()) == []
