"""Components that no preset is found of, so that a battery would pass them over without a word."""

import importlib
from collections.abc import Callable

from permlab.config.schema import PACKAGE, class_name, components, missing


def without_preset(group: str, is_one: Callable[[object], bool]) -> list[str]:
    """What each file of a group lacks that holds a class of its name, and is one of the group's components."""
    found = []
    for path in sorted((PACKAGE / group).glob("*.py")):
        cls = getattr(importlib.import_module(f"permlab.{group}.{path.stem}"), class_name(path.stem), None)
        if is_one(cls) and path.stem not in components(group):
            found.append(f"no preset of {path.stem} is found: {missing(group, path.stem)}")
    return found
