"""Files that are broken, from the command line: named by path, or left out and counted."""

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import Result, data_module, train

from permlab.cli import main
from permlab.config.build import build
from permlab.config.compose import resolve_train
from permlab.data.image import FileDataset
from permlab.data.image_folder import ImageFolder

IMAGES = ("data=image_folder", "data.image_size=8", "data.resize=8", "data.channels=1", "data.patch_size=2")
RUN = ("task.control=false", "data.num_workers=0", "trainer.log_every_n_steps=1")
NUM = 8  # images per class to train on


def image_folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", NUM), ("val", 4), ("test", 4)):
        for name in ("ant", "bee"):
            for index in range(count):
                path = root / split / name / f"{index}.{'png' if index % 2 else 'jpg'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
    return root


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _garble(path: Path) -> None:
    path.write_bytes(bytes(reversed(path.read_bytes())))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _vanish(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere.png"))


def _deep(path: Path) -> None:
    Image.fromarray(np.zeros((32, 32), dtype=np.uint16)).save(path, format="PNG")


FAULTS = [_truncate, _garble, _empty, _vanish, _deep]


def run_images(root: Path, runs: Path, *words: str) -> Result:
    return train(runs, *IMAGES, *RUN, f"data.root={root}", "data.batch_size=4", *words, steps=8)


@pytest.mark.parametrize(
    ("fault", "name"),
    [(fault, "bee/3.png" if index % 2 else "ant/2.jpg") for index, fault in enumerate(FAULTS)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_image_is_named_by_its_path(fault: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    fault(root / "train" / name)
    result = run_images(root, tmp_path / "runs")
    assert result.code == 2
    assert result.err.startswith("error: data: ")
    assert str(root / "train" / name) in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_skipping_leaves_the_broken_ones_out_on_every_rank_alike(fault: Callable[[Path], None], tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    fault(root / "train" / "ant" / "2.jpg")
    options = dict(image_size=8, resize=8, channels=1, patch_size=2, augment="none", normalise=False, val_fraction=0.1)
    data = ImageFolder(root=str(root), on_corrupt="skip", **options)
    with pytest.warns(UserWarning, match=r"on_corrupt=skip: 1 of 16 images .*2\.jpg"):
        dataset = data.dataset("train", 0)
    names = [os.fsdecode(name) for name in dataset.names]
    assert names == sorted(names)
    assert len(names) == 2 * NUM - 1
    assert "ant/2.jpg" not in names
    dataset.__getitems__(range(len(dataset)))
    assert data.num_skipped == 1


def test_the_summary_counts_what_was_left_out(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    for name in ("train/ant/2.jpg", "train/bee/3.png", "val/ant/0.jpg"):
        _truncate(root / name)
    with pytest.warns(UserWarning, match="left out"):
        result = run_images(root, tmp_path / "runs", "data.on_corrupt=skip")
    assert result.code == 0, result.err
    assert result.summary["data/num_skipped"] == 3


def test_a_class_of_which_nothing_is_left_is_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    for path in (root / "train" / "bee").iterdir():
        _empty(path)
    result = run_images(root, tmp_path / "runs", "data.on_corrupt=skip")
    assert result.code == 2
    assert f"{root / 'train' / 'bee'}: holds no readable image" in result.err
    assert result.err.count("\n") == 1


def test_a_class_folder_without_images_is_named_before_anything_is_written(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    (root / "train" / "cow").mkdir()
    (root / "val" / "cow").mkdir()
    (root / "test" / "cow").mkdir()
    line = _refused(tmp_path, *IMAGES, f"data.root={root}")
    assert f"{root / 'train' / 'cow'}: holds no image" in line
    assert not (tmp_path / "runs").exists()


def _refused(tmp_path: Path, *words: str) -> str:
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main("train", [*words, f"paths.runs={tmp_path / 'runs'}"])
    assert code == 2
    assert err.getvalue().count("\n") == 1
    return err.getvalue()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_ends_the_run_with_one_line(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, main_process = FileDataset._fetch, os.getpid()

    def deadly(self: FileDataset, index: int, coarse: int | None = None):
        if index == 5 and os.getpid() != main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return fetch(self, index, coarse)

    monkeypatch.setattr(FileDataset, "_fetch", deadly)
    root = image_folder(tmp_path / "images")
    result = run_images(root, tmp_path / "runs", f"data.num_workers={workers}")
    assert result.code == 1
    assert result.err.startswith("error: data: a worker process died")
    assert "data.num_workers" in result.err
    assert result.err.count("\n") == 1


def test_a_worker_that_dies_while_other_code_is_busy_ends_the_run_with_that_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(plan: object) -> None:
        try:
            raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. ")
        except RuntimeError as error:
            raise TypeError("invalid code") from error

    monkeypatch.setattr("permlab.run.story.train", busy)
    assert main("train", [f"paths.runs={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: data: a worker process died")
    assert err.count("\n") == 1


# Text


def text_folder(root: Path, extension: str = "jsonl") -> Path:
    root.mkdir(parents=True)
    for split in ("train", "val", "test"):
        text = f"{split} of the text, again and again. " * 40
        line = json.dumps({"text": text}) + "\n"
        (root / f"{split}.{extension}").write_text(line * 8 if extension == "jsonl" else text * 8)
    return root


TEXT = ("task=lm", "data=wikitext2", "data.sequence_length=32", "data.batch_size=4", "data.num_workers=0")


def test_text_in_a_wrong_encoding_is_named(tmp_path: Path) -> None:
    root = text_folder(tmp_path / "text", "txt")
    (root / "train.txt").write_bytes("Grüße und Küsse".encode("latin-1") * 400)
    result = train(tmp_path / "runs", *TEXT, f"data.root={root}")
    assert result.code == 2
    assert str(root / "train.txt") in result.err
    assert result.err.count("\n") == 1


def test_lines_without_a_document_are_named_or_left_out(tmp_path: Path) -> None:
    root = text_folder(tmp_path / "text")
    path = root / "train.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2:2] = [b'{"text": 3}\n', b"\xff\xfe\n", b'{"text": "cut\n']
    path.write_bytes(b"".join(lines))
    stopped = train(tmp_path / "runs", *TEXT, f"data.root={root}")
    assert stopped.code == 2
    assert f"{path}: cannot be read (line 3: " in stopped.err
    with pytest.warns(UserWarning, match="3 lines of .* left out"):
        skipped = train(tmp_path / "runs", *TEXT, f"data.root={root}", "data.on_corrupt=skip")
    assert skipped.code == 0, skipped.err
    assert skipped.summary["data/num_skipped"] == 3


def test_elsewhere_the_setting_is_a_warning(tmp_path: Path) -> None:
    plan, warnings = resolve_train(["data=digits", "data.on_corrupt=skip"])
    assert warnings == ["data.on_corrupt=skip has no effect with data=digits"]
    assert data_module(plan.config, 0).statistics() == {}
    assert build("data", plan.config["data"]).spec().num_classes == 10
