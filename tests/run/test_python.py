"""The page on Python is run as it stands; names of the package come when they are asked for; runs as objects."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import permlab
import permlab.run.python
from permlab.config.schema import CONF
from permlab.errors import ConfigError, Interrupted

PAGE = CONF.parent / "docs" / "python.md"


def test_the_page_runs_as_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("permlab.run.story.draw_all", lambda run_dir: [])  # pictures have tests of their own
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {"torch": torch, "folder": tmp_path}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102 (our own page)
    assert "learned order" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "vit-2-4", "mlp-2-4"}


def test_a_dozen_lines_are_enough() -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        assert len([line for line in block.splitlines() if line.strip()]) <= 25


def test_the_package_alone_is_imported_in_milliseconds_and_without_torch() -> None:
    code = (
        "import sys, time; began = time.process_time(); import permlab\n"
        "print(time.process_time() - began, *({'torch', 'numpy', 'hydra', 'lightning'} & set(sys.modules)))\n"
        "permlab.ConfigError; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    first, second = result.stdout.splitlines()
    assert float(first) < 0.05
    assert second == "False"


@pytest.mark.parametrize("name", permlab.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(permlab, name).__name__ == name
    assert name in dir(permlab)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        permlab.trian  # noqa: B018


# Runs


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    reached: list[Path] = []

    def tell(plan) -> None:
        reached.append(plan.directory)
        torch.set_num_threads(torch.get_num_threads() + 1)

    monkeypatch.setattr(permlab.run.python, "tell", tell)
    return reached


def test_words_may_be_one_string_and_threads_stay_the_callers(no_training: list[Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    run = permlab.train(f"seed=3 paths.runs={tmp_path}")
    assert no_training == [run.directory]
    assert run.directory == permlab.train(["seed=3", f"paths.runs={tmp_path}"]).directory
    assert run.directory.name.startswith("seed=3-")
    assert not run.is_finished
    assert torch.get_num_threads() == threads


def test_mistakes_are_raised_before_anything_is_written(no_training: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        permlab.train(["optim.lr=-1", "max_steps=3", f"paths.runs={tmp_path / 'runs'}"])
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match=r"trainer\.devices=999: there are"):
        permlab.train(["trainer.devices=999", f"paths.runs={tmp_path / 'runs'}"])
    assert no_training == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"no readable config\.yaml"):
        permlab.Run(tmp_path).config  # noqa: B018


def test_a_setting_without_effect_is_a_warning_at_the_callers_line(no_training: list[Path], tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        permlab.train(["method=sort_ste", "method.num_iters=5", f"paths.runs={tmp_path}"])
    (warning,) = caught
    assert str(warning.message) == "method.num_iters=5 has no effect with method=sort_ste"
    assert warning.filename == __file__


def test_ctrl_c_is_what_python_calls_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(plan) -> None:
        raise Interrupted(2)

    monkeypatch.setattr(permlab.run.python, "tell", interrupt)
    with pytest.raises(KeyboardInterrupt, match="goes on from here"):
        permlab.train([f"paths.runs={tmp_path}"])
