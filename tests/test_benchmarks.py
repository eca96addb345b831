"""The benchmarks themselves: peers compute what ours compute, and a table and a picture come out."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import ops
import outer

ROOT = Path(__file__).resolve().parents[1]
CASES = [
    ops.sinkhorn_case(2, 8),
    ops.sorting_case(ops.soft_sort, ops.peers.soft_sort, 2, 8),
    ops.sorting_case(ops.neural_sort, ops.peers.neural_sort, 2, 8),
    ops.permute_case(2, 8, 4),
    ops.gather_case(2, 8, 4),
    ops.plackett_luce_case(4, 8),
    ops.assign_case(2, 8, 1.0),
    ops.scan_case(2, 4, 8, 3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operation)
def test_every_implementation_is_timed_and_right(case: ops.Case) -> None:
    rows = ops.measure(case, budget_s=0.01)
    assert [row.name for row in rows] == ["ours", *case.peers]
    assert all(row.forward_ms > 0 and row.ratio > 0 for row in rows)
    exact = [row.error for row in rows if row.error is not None and row.name != "POT"]
    assert bool(exact) == (case.reference is not None)
    assert all(error < 1e-5 for error in exact)
    assert case.targets.keys() <= set(case.peers) | {"log-domain autograd", "pygmtools", "POT", "mambapy"}
    table = ops.text(rows)
    assert all(row.name in table for row in rows)


def test_gradients_of_the_peers_are_those_of_ours() -> None:
    for case in CASES[:4]:
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in case.inputs.items()}
        torch.manual_seed(1)
        ours = ops._call(case.ours, inputs, case.learned)()
        for name, peer in case.peers.items():
            if name in ("POT", "pygmtools"):  # the one has rows last, the other float32 inside
                continue
            torch.manual_seed(1)
            for found, expected in zip(ops._call(peer, inputs, case.learned)(), ours, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_picture_of_the_peers_and_the_growth_from_the_json_alone(tmp_path: Path) -> None:
    """The same file gives the same picture, which names every peer, and nothing is measured."""
    record = ROOT / "results" / "bench.json"
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in pictures:
        ops.main(["--redraw", "--json", str(record), "--figure", str(path)])
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    rows = json.loads(record.read_text())["rows"]
    axes = Figure().subplots()
    ops._draw_peers(axes, rows)
    words = " ".join(text.get_text() for text in axes.texts)
    assert all(row["name"] in words for row in rows)
    with pytest.raises(SystemExit):
        ops.main(["--redraw", "--figure", str(pictures[0])])


def test_the_parts_of_the_outer_benchmark_exist() -> None:
    assert set(outer.PARTS) == {"methods", "harness", "startup", "ranks", "block"}
    step = outer._project(7.0)
    assert step["GiB"] > 7
