"""The starting order in which the training images' patches compress best, and the command that shows all."""

import numpy as np
import pytest
import torch
from runs import SHORT, assemble, configure, train

import permlab.data.digits
from permlab import __main__ as door
from permlab.errors import ConfigError
from permlab.ops import __main__ as command
from permlab.ops.scan_order import PATHS, scan_order
from permlab.task import place


@pytest.fixture(params=["column", "spiral"])
def planted(request, monkeypatch):
    """Digits whose pixels rarely change along a path."""
    rng = np.random.default_rng(0)
    changes = rng.random((240, 64)) < 0.2
    changes[:, 0] = True
    last = np.maximum.accumulate(np.where(changes, np.arange(64), 0), 1)
    values = np.take_along_axis(rng.integers(17, size=changes.shape), last, 1)
    images = np.empty((240, 64), dtype=np.float32)
    images[:, scan_order(request.param, 8, 8).numpy()] = values / 16
    monkeypatch.setattr(permlab.data.digits, "_load", lambda: (images.reshape(-1, 1, 8, 8), np.arange(240) % 10))
    place._compression.cache_clear()
    yield request.param
    place._compression.cache_clear()


def test_a_method_starts_from_what_compresses_best(planted):
    parts = assemble(configure([*SHORT, "method.order=compressible"]))
    expected = scan_order(planted, 8, 8)
    assert torch.equal(parts.method.start_order, expected)
    assert torch.equal(parts.method.best(), expected)


def test_the_weights_are_those_of_any_other_order():
    models = [
        assemble(configure([*SHORT, "model.patch_size=2", f"method.order={order}"])).model.state_dict()
        for order in ("compressible", "row")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


@pytest.mark.parametrize("planted", ["spiral"], indirect=True)
def test_a_run_and_its_control_start_there(planted, tmp_path):
    result = train(tmp_path, "method=sort_ste", "method.order=compressible", steps=2)
    assert result.code == 0, result.err
    with np.load(result.run_dir / "arrays" / "order.npz") as arrays:
        assert arrays["start_order"].tolist() == scan_order(planted, 8, 8).tolist()
    control = train(tmp_path, "method=fixed", "method.order=compressible", steps=2)
    assert result.summary["test/accuracy_control"] == control.summary["test/accuracy"]


@pytest.mark.parametrize("words", [["task=lm", "data=pydocs", "model=llama_nano", "method=fixed"], ["task=prune"]])
def test_what_has_no_patches_is_refused(words):
    with pytest.raises(ConfigError, match=r"method\.order=compressible: there are no patches to compress"):
        configure([*words, "method.order=compressible"])


# The command


@pytest.mark.parametrize("planted", ["column"], indirect=True)
def test_the_table_has_the_best_first(planted, capsys):
    assert command.main(["compress", "method=fixed"]) == 0
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title == "64 patches of 1x1 pixels in an 8x8 grid of data=digits; % less than row"
    assert head.split("  ")[-1].strip() == "mean"
    assert {row.split()[0] for row in rows} == set(PATHS)
    assert rows[0].split()[0] == planted
    means = [float(row.split()[-1]) for row in rows]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compres"], "compres: no such command; nearest valid choice: compress"),
        (["compress", "data=digit"], "data=digit"),
        (["compress", "task=lm", "data=pydocs", "model=llama_nano", "method=fixed"], "data=pydocs: has no patches"),
    ],
)
def test_a_wrong_word_is_one_line(capsys, words, message):
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("main", "words"), [(command.main, ["--help"]), (door.main, ["compress", "--help"])])
def test_help_is_printed(capsys, main, words):
    assert main(words) == 0
    assert "python -m permlab.ops compress" in capsys.readouterr().out


def test_a_slip_of_the_pen_is_guessed():
    with pytest.raises(ConfigError, match=r"method\.order=compresible: unknown order .*; did you mean compressible\?"):
        configure(["method.order=compresible"])
