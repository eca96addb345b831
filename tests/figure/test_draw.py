"""Every figure is drawn from the files of a run alone, the same every time."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import permlab.figure.order
from permlab.figure.draw import draw_all
from permlab.figure.order import order_figure
from permlab.record.rundir import MetricsFile, start_run, write_npz
from permlab.record.stored import read_snapshots

CONFIG = {
    "method": {"warmup_fraction": 0.1, "freeze_fraction": 0.3},
    "trainer": {"max_steps": 100},
    "task": {"component": "classify"},
}
RNG = np.random.default_rng(0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    start_run(tmp_path, CONFIG)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (50, 100):
        file.update(step, {"train/loss": 1 / step, "permutation/temperature": 0.1})
    arrays = tmp_path / "arrays"
    write_npz(arrays / "grid.npz", grid=np.array([2, 3]), start_order=np.arange(6), mean_image=np.eye(6))
    for step in (100, 0):
        order, scores, soft = RNG.permutation(6), RNG.normal(size=(1, 6, 6)), np.full((6, 6), 1 / 6)
        write_npz(arrays / f"step={step:07d}.npz", step=np.array(step), order=order, scores=scores, soft=soft)
    write_npz(arrays / "order.npz", order=np.array([5, 4, 3, 2, 1, 0]), start_order=np.arange(6))
    write_npz(arrays / "confusion.npz", confusion=np.eye(10, dtype=int))
    return tmp_path


@pytest.fixture
def all_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("permlab.figure.draw.FORMATS", ("png", "pdf", "svg"))


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


@pytest.mark.usefixtures("all_formats")
def test_all_figures_and_the_same_bytes_twice_in_every_format(run_dir: Path) -> None:
    paths = draw_all(run_dir)
    assert names(paths) == ["order", "scores", "soft_matrix", "training", "confusion"]
    files = sorted((run_dir / "figures").iterdir())
    assert files == sorted(path.with_suffix(suffix) for path in paths for suffix in (".png", ".pdf", ".svg"))
    first = [path.read_bytes() for path in files]
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": None}):
        draw_all(run_dir)
    assert [path.read_bytes() for path in files] == first
    for path in paths:
        with Image.open(path) as image:
            assert image.width >= 800
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            assert np.asarray(image.convert("L")).std() > 1
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
        assert "</svg>" in path.with_suffix(".svg").read_text()
    assert plt.get_fignums() == []


def test_every_figure_says_what_it_is_of(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"task": {"component": "classify", "name": "classify"}, "data": {"name": "digits"}, "seed": 7}
    start_run(run_dir, CONFIG | named | {"model": {"name": "vit"}, "method": CONFIG["method"] | {"name": "sinkhorn"}})
    signs = []
    monkeypatch.setattr("permlab.figure.style.save_figure", lambda figure, *_: signs.append(figure.get_suptitle()))
    assert len(draw_all(run_dir)) == len(signs) == 5
    assert set(signs) == {"task classify, data digits, model vit, method sinkhorn, seed 7"}


def test_some_figures_only(run_dir: Path) -> None:
    assert names(draw_all(run_dir, ["order", "comparison"])) == ["order"]


def test_snapshots_come_in_the_order_of_their_steps(run_dir: Path) -> None:
    assert [int(snapshot["step"]) for snapshot in read_snapshots(run_dir)] == [0, 100]


def test_the_picked_order_is_drawn_where_there_is_one(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def spy(start: np.ndarray, order: np.ndarray, **options: object):
        drawn.append(order)
        return order_figure(start, order, **options)

    monkeypatch.setattr("permlab.figure.order.order_figure", spy)
    permlab.figure.order.draw(run_dir)
    (run_dir / "arrays" / "order.npz").unlink()
    permlab.figure.order.draw(run_dir)
    own_orders = np.stack([np.arange(6), np.arange(6)[::-1]])
    write_npz(run_dir / "arrays" / "order.npz", order=np.arange(6))
    write_npz(run_dir / "arrays" / "step=0000200.npz", step=np.array(200), order=own_orders)
    permlab.figure.order.draw(run_dir)
    assert drawn[0].tolist() == [5, 4, 3, 2, 1, 0]
    assert drawn[1].tolist() == read_snapshots(run_dir)[1]["order"].tolist()
    assert drawn[2].tolist() == own_orders.tolist()


def test_only_what_the_files_allow(run_dir: Path) -> None:
    for path in (run_dir / "arrays").iterdir():
        path.unlink()
    assert names(draw_all(run_dir)) == ["training"]
    (run_dir / "metrics.jsonl").write_text("")
    assert draw_all(run_dir) == []


def test_a_fixed_order_has_no_scores(run_dir: Path) -> None:
    for step in (0, 100):
        write_npz(run_dir / "arrays" / f"step={step:07d}.npz", step=np.array(step), order=np.arange(6))
    assert names(draw_all(run_dir)) == ["order", "training", "confusion"]


@pytest.mark.parametrize("shape", [(6,), (2, 3, 3)])
def test_scores_of_items_and_of_groups(run_dir: Path, shape: tuple[int, ...]) -> None:
    for step in (0, 100):
        scores = RNG.normal(size=shape)
        write_npz(run_dir / "arrays" / f"step={step:07d}.npz", step=np.array(step), order=np.arange(6), scores=scores)
    assert "scores" in names(draw_all(run_dir))
