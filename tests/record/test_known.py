"""Numbers that runs share."""

import json
from pathlib import Path

from permlab.record.known import Known


def test_numbers_are_found_once_and_read_back_exactly(tmp_path: Path) -> None:
    found = []

    def find() -> dict[str, float]:
        found.append(1)
        return {"loss": 0.1 + 0.2, "accuracy": 1 / 3, "worst": float("inf")}

    folder = tmp_path / "cache"
    first = Known(folder, {"data": {"name": "digits"}}).recall({"model": "a"}, find)
    again = Known(folder, {"data": {"name": "digits"}}).recall({"model": "a"}, find)
    assert first == again
    assert len(found) == 1
    for facts, what in (({"data": {"name": "text"}}, {"model": "a"}), ({"data": {"name": "digits"}}, {"model": "b"})):
        Known(folder, facts).recall(what, find)
    assert len(found) == 3
    assert len(list(folder.iterdir())) == 3


def test_a_file_that_cannot_be_read_or_is_of_something_else_is_found_anew(tmp_path: Path) -> None:
    known = Known(tmp_path, {})
    known.recall({"model": "a"}, lambda: {"loss": 1.0})
    (path,) = tmp_path.iterdir()
    for content in ("{", "[]", json.dumps({"key": "of another", "numbers": {"loss": 3.0}})):
        path.write_text(content)
        assert known.recall({"model": "a"}, lambda: {"loss": 2.0}) == {"loss": 2.0}
