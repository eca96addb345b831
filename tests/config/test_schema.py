"""A new component that lacks something is told what."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from permlab.config import compose, schema
from permlab.errors import ConfigError

MINE = "class Mine:\n    def __init__(self, site, *, sharpness: PositiveFloat) -> None: ...\n"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of nothing, and its values."""
    for folder in ("src/permlab/method", "src/permlab/task/mine", "conf/method", "conf/task"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(schema, "PACKAGE", tmp_path / "src" / "permlab")
    monkeypatch.setattr(schema, "CONF", tmp_path / "conf")
    schema.components.cache_clear()
    yield tmp_path
    schema.components.cache_clear()


CASES = [
    (MINE, None, "src/permlab/method/mine.py has no conf/method/mine.yaml"),
    (None, "sharpness: 1.0", "conf/method/mine.yaml has no src/permlab/method/mine.py"),
    ("class Your: ...", "sharpness: 1.0", "src/permlab/method/mine.py: has no class Mine"),
    ("class Mine: ...", "sharpness: 1.0", "src/permlab/method/mine.py: Mine has no __init__ of its own"),
    ("class Mine", "sharpness: 1.0", "src/permlab/method/mine.py: line 1: expected ':'"),
    (
        MINE.replace(": PositiveFloat", ""),
        "sharpness: 1.0",
        "src/permlab/method/mine.py: Mine: option sharpness has no annotation",
    ),
    (
        MINE.replace("PositiveFloat", "Positive"),
        "sharpness: 1.0",
        "src/permlab/method/mine.py: Mine: option sharpness: name 'Positive' is not defined; expected a type of",
    ),
    (None, None, None),
    (MINE, "sharpness: 1.0", None),
]


@pytest.mark.parametrize(("source", "values", "expected"), CASES)
def test_what_a_method_lacks_is_named(tree: Path, source: str | None, values: str | None, expected: str | None) -> None:
    for text, path in ((source, "src/permlab/method/mine.py"), (values, "conf/method/mine.yaml")):
        if text is not None:
            (tree / path).write_text(text)
    found = schema.missing("method", "mine")
    assert (found or "").startswith(expected or "")
    assert (found is None) == (expected is None)


def test_the_command_line_says_so(tree: Path) -> None:
    (tree / "src/permlab/method/mine.py").write_text(MINE)
    (override,) = compose.parse_overrides(["method=mine"])
    assert compose._check_override(override) == "method=mine: src/permlab/method/mine.py has no conf/method/mine.yaml"
    (override,) = compose.parse_overrides(["method=yours"])
    assert compose._check_override(override).startswith("method=yours: no such choice")


def test_a_task_in_a_folder_lacks_its_yaml(tree: Path) -> None:
    (tree / "src/permlab/task/mine/task.py").write_text(MINE)
    assert schema.missing("task", "mine") == "src/permlab/task/mine/task.py has no conf/task/mine.yaml"


def test_a_component_without_a_source_says_which(tree: Path) -> None:
    (tree / "conf/method/mine.yaml").write_text("sharpness: 1.0")
    with pytest.raises(
        ConfigError, match=r"method.component=mine: no such component; conf/method/mine.yaml has no src"
    ):
        schema.check_component("method", "mine")
