"""Files and words made to do harm: nothing is executed, nothing leaves the runs directory, no secret is written."""

import contextlib
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from runs import Result, train

from permlab.cli import main
from permlab.config.compose import resolve_train
from permlab.config.schema import CONF
from permlab.config.secret import leaks, redact
from permlab.errors import ConfigError
from permlab.record.rundir import clear_run
from permlab.study.grid import read_sweep
from permlab.task.prune.reading import read_item_order

ROOT = CONF.parent
WANDB_KEY, HF_TOKEN = "0123456789abcdef0123456789abcdef01234567", "hf_" + "Planted0Secret1Planted2Secret"


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def call(name: str, *words: str) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(name, list(words))
    return code, err.getvalue()


def refused(name: str, *words: str) -> str:
    code, err = call(name, *words)
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    result = train(tmp_path_factory.mktemp("runs"), "task.control=false", steps=2)
    assert result.code == 0, result.err
    return result


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    """What would exist if anything were executed; the bomb itself is known to work."""
    tried = tmp_path / "tried"
    pickle.loads(pickle.dumps(Bomb(tried)))  # noqa: S301
    assert tried.is_dir()
    return tmp_path / "executed"


# Nothing is unpickled


@pytest.mark.parametrize("place", ["state_dict", "global_step", "whole", "legacy"])
@pytest.mark.parametrize("use", ["ckpt_path", "eval", "resume"])
def test_a_malicious_checkpoint(use: str, place: str, finished: Result, bomb: Path, tmp_path: Path) -> None:
    source = finished.run_dir / "checkpoints" / ("best.ckpt" if use == "eval" else "last.ckpt")
    state = torch.load(source, weights_only=True)
    state = Bomb(bomb) if place in ("whole", "legacy") else state | {place: Bomb(bomb)}
    path = tmp_path / "bad.ckpt"
    torch.save(state, path, _use_new_zipfile_serialization=place != "legacy")
    if use == "ckpt_path":
        words = ("task.control=false", f"ckpt_path={path}", f"paths.runs={tmp_path / 'runs'}", "logger.mode=disabled")
        line = refused("train", *words)
    else:
        runs = tmp_path / "runs"
        run_dir = _copy(finished, runs)
        name = "best.ckpt" if use == "eval" else "last.ckpt"
        path.replace(run_dir / "checkpoints" / name)
        path = run_dir / "checkpoints" / name
        if use == "eval":
            line = refused("eval", f"run={run_dir}")
        else:
            (run_dir / "DONE").unlink()
            (run_dir / "summary.json").unlink()
            result = train(runs, "task.control=false", steps=2)
            assert (result.code, result.err.count("\n")) == (2, 1)
            line = result.err
    assert str(path) in line
    assert not bomb.exists()


def _copy(finished: Result, runs: Path) -> Path:
    run_dir = runs / finished.run_dir.relative_to(finished.run_dir.parents[2])
    shutil.copytree(finished.run_dir, run_dir)
    return run_dir


YAML_BOMBS = [
    "!!python/object/apply:os.mkdir ['{path}']",
    "seed: !!python/object/apply:os.mkdir ['{path}']",
    "!!python/object/new:os.mkdir ['{path}']",
    "model: !!python/name:os.abort ''",
    "model: {{_target_: os.mkdir, path: '{path}'}}",
]


@pytest.mark.parametrize("text", YAML_BOMBS)
@pytest.mark.parametrize("key", ["run", "task.teacher", "task.dense"])
def test_a_malicious_configuration(key: str, text: str, finished: Result, bomb: Path, tmp_path: Path) -> None:
    run_dir = _copy(finished, tmp_path / "runs")
    (run_dir / "config.yaml").write_text(text.format(path=bomb))
    if key == "run":
        refused("eval", f"run={run_dir}")
    else:
        task = ("task.distill_weight=1",) if key == "task.teacher" else ("task=prune",)
        refused("train", *task, f"{key}={run_dir}", f"paths.runs={tmp_path / 'new'}", "logger.mode=disabled")
    assert not bomb.exists()
    assert not (tmp_path / "new").exists()


def _object_npz(path: Path, name: str, bomb: Path) -> None:
    np.savez(path, **{name: np.array([Bomb(bomb)], dtype=object)})


def test_a_malicious_order(bomb: Path, tmp_path: Path) -> None:
    _object_npz(tmp_path / "order.npz", "order", bomb)
    line = refused("train", f"method.order={tmp_path / 'order.npz'}", f"paths.runs={tmp_path / 'runs'}")
    assert "order.npz" in line
    assert not bomb.exists()
    assert not (tmp_path / "runs").exists()


def test_a_malicious_dataset(bomb: Path, tmp_path: Path) -> None:
    _object_npz(tmp_path / "pathmnist.npz", "train_images", bomb)
    line = refused("train", "data=medmnist", f"data.root={tmp_path}", f"paths.runs={tmp_path / 'runs'}")
    assert "pathmnist.npz" in line
    assert not bomb.exists()


def test_arrays_of_a_run_that_hold_objects(finished: Result, bomb: Path, tmp_path: Path) -> None:
    run_dir = _copy(finished, tmp_path / "runs")
    _object_npz(run_dir / "arrays" / "order.npz", "order", bomb)
    with pytest.raises(ConfigError, match=r"order\.npz"):
        read_item_order(run_dir)
    assert not bomb.exists()


def test_an_archive_that_is_no_array(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "order.npz", "w") as archive:
        archive.writestr("order.npy", b"\x93NUMPY\x01\x00 garbage")
    refused("train", f"method.order={tmp_path / 'order.npz'}", f"paths.runs={tmp_path / 'runs'}")
    (tmp_path / "order.npz").write_bytes(b"PK\x03\x04 no archive")
    refused("train", f"method.order={tmp_path / 'order.npz'}", f"paths.runs={tmp_path / 'runs'}")


# Nothing is constructed but the components by name


@pytest.mark.parametrize(
    "word",
    [
        "+trainer.profiler={_target_: os.abort}",
        "trainer.plugins._target_=os.abort",
        "model._target_=os.abort",
        "+_target_=os.abort",
        "method.temperature={_target_: os.abort}",
        "+trainer.x=[{y: {_target_: os.abort}}]",
        "model.component=../../../etc/x",
        "model.component=__init__",
        "data.component=loader",
    ],
)
def test_nothing_is_constructed_that_is_no_component(word: str, tmp_path: Path) -> None:
    line = refused("train", word, f"paths.runs={tmp_path}")
    assert "_target_" in line or "component" in line
    assert list(tmp_path.iterdir()) == []


# Nothing leaves the runs directory


@pytest.mark.parametrize("group", ["task", "model", "method", "data", "optim", "trainer", "logger"])
@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "a/../../b", "x\\..\\y", "."])
def test_names_cannot_leave_the_runs_directory(group: str, name: str, tmp_path: Path) -> None:
    assert group in refused("train", f"{group}={name}", f"paths.runs={tmp_path}")
    assert f"{group}.name" in refused("train", f"++{group}.name={name}", f"paths.runs={tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_seed_is_a_number(tmp_path: Path) -> None:
    assert "seed" in refused("train", "seed=../../x", f"paths.runs={tmp_path}")
    assert resolve_train([f"paths.runs={tmp_path}"])[0].directory.is_relative_to(tmp_path)


@pytest.mark.parametrize("name", ["../conf/train", "/etc/passwd", "..", "a/b"])
def test_sweeps_are_files_of_their_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="no such sweep"):
        read_sweep(name)


def test_repeating_a_run_does_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "precious").write_text("x")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "arrays").symlink_to(outside)
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "link").symlink_to(outside)
    (run_dir / "summary.json").symlink_to(outside / "deep" / "precious")
    clear_run(run_dir)
    assert (outside / "deep" / "precious").read_text() == "x"
    assert list(run_dir.iterdir()) == []


# No secret is written


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setenv("HF_TOKEN", HF_TOKEN)
    return WANDB_KEY, HF_TOKEN


@pytest.mark.parametrize(
    "word",
    ["logger.entity={}", "logger.project=x{}", "logger.tags=[a,{}]", "data.root={}", "logger.api_key={}", "{}=1"],
)
def test_a_secret_in_the_command_is_refused_and_not_repeated(
    word: str, planted: tuple[str, str], tmp_path: Path
) -> None:
    for secret in planted:
        data = ("data=image_folder",) if word.startswith("data") else ()
        line = refused("train", *data, word.format(secret), f"paths.runs={tmp_path}")
        assert secret not in line
    assert list(tmp_path.iterdir()) == []


def test_a_secret_is_not_taken_from_the_environment(planted: tuple[str, str], tmp_path: Path) -> None:
    line = refused("train", "logger.project=${oc.env:WANDB_API_KEY}", f"paths.runs={tmp_path}")
    assert "logger.project" in line
    assert WANDB_KEY not in line


def test_no_file_and_no_output_of_a_run_holds_a_secret(tmp_path: Path) -> None:
    """A real process with W&B's own files, offline, and with W&B failing to go online."""
    pytest.importorskip("wandb")
    words = ["task.control=false", "trainer.max_steps=2", f"paths.runs={tmp_path / 'runs'}", "logger.mode=offline"]
    words += ["figures=false"]
    variables = {"WANDB_API_KEY": WANDB_KEY, "HF_TOKEN": HF_TOKEN, "HOME": str(tmp_path / "home")}
    variables |= {"WANDB_MODE": "offline", "SOME_PASSWORD": "correct horse battery"}
    (tmp_path / "home").mkdir()
    done = forked.run(forked.train, [words], tmp_path, variables)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for secret in (WANDB_KEY, HF_TOKEN, "correct horse battery"):
        assert secret not in done.stdout + done.stderr
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []


def test_a_known_secret_is_hidden_wherever_it_stands(planted: tuple[str, str]) -> None:
    for secret in planted:
        assert secret not in redact(f"could not log in with {secret}, sorry")
    assert redact("data.tokenizer=byte num_tokens=3 optim.lr=0.1") == "data.tokenizer=byte num_tokens=3 optim.lr=0.1"
    config = {"a": {"b": ["x", HF_TOKEN]}, "c": 1, WANDB_KEY: 2}
    assert list(leaks(config)) == ["a.b", "the configuration"]
    assert list(leaks(yaml.safe_load((ROOT / "conf" / "train.yaml").read_text()))) == []
