"""No configuration is a copy of another, and no two sweeps are one with one more axis."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


def test_no_configuration_is_a_copy_of_another() -> None:
    """Comments aside. What two choices have in common is a file that both name in their `defaults`."""
    same: dict[str, list[str]] = {}
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        content = json.dumps(yaml.safe_load(path.read_text()), sort_keys=True)
        same.setdefault(content, []).append(str(path.relative_to(ROOT)))
    assert len(same) > 50
    assert [paths for paths in same.values() if len(paths) > 1] == []


def test_no_two_sweeps_are_one_with_one_more_axis() -> None:
    """Grids that differ in the values of one key are together a grid; those that differ in two are none."""
    grids = {path.stem: grid(yaml.safe_load(path.read_text())) for path in SWEEPS}
    assert len(grids) > 10
    assert [pair for pair in combinations(grids, 2) if differing(*(grids[name] for name in pair)) < 2] == []


def grid(sweep: dict[str, Any]) -> dict[str, Any]:
    """All keys of a sweep, a single value being the list of it."""
    parameters = sweep.pop("parameters")
    return sweep | {key: choice.get("values", [choice.get("value")]) for key, choice in parameters.items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> int:
    return sum(one.get(key) != other.get(key) for key in one.keys() | other.keys())


def test_twins_are_found() -> None:
    sweep: dict[str, Any] = {
        "metric": {"name": "loss"},
        "parameters": {"method": {"value": "fixed"}, "seed": {"values": [0, 1]}},
    }
    parameters = sweep["parameters"]
    for change, number in (
        ({"method": {"values": ["fixed"]}}, 0),
        ({"method": {"value": "sort_ste"}}, 1),
        ({"task.n": {"value": 1}}, 1),
        ({"method": {"value": "sort_ste"}, "seed": {"value": 0}}, 2),
    ):
        twin = sweep | {"parameters": parameters | change}
        assert differing(grid(dict(sweep)), grid(dict(twin))) == number


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_says_in_one_line_what_it_is(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(comments) == 1
    assert path.read_text().startswith(comments[0])
    assert len(comments[0]) > 15
