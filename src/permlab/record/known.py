"""Numbers that several runs would find alike, kept in small files by a fingerprint of all that they depend on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from permlab.record.rundir import write_json

Numbers = dict[str, float]


class Known:
    """Numbers by what they are of: found once, read back exactly by every run that asks for the same.

    Args:
        folder: of the files; made when there is something to keep.
        facts: what all of them depend on, plain containers.
    Example:
        >>> import tempfile
        >>> known = Known(Path(tempfile.mkdtemp(), "known"), {"data": "digits"})
        >>> known.recall({"weights": "ab"}, lambda: {"loss": 0.1}), known.recall({"weights": "ab"}, dict)
        ({'loss': 0.1}, {'loss': 0.1})
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = folder, dict(facts)

    def recall(self, what: Mapping[str, Any], find: Callable[[], Numbers]) -> Numbers:
        """The numbers, found now if they have not been before; a file that cannot be read is written anew."""
        key = json.dumps({"facts": self.facts, "of": dict(what)}, sort_keys=True, default=str)
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        try:
            kept = json.loads(path.read_text())
            if kept["key"] == key:
                return {name: float(value) for name, value in kept["numbers"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        numbers = find()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "numbers": numbers})
        return numbers
