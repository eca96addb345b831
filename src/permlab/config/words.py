"""From a complete configuration back to the words of a command line that gives it."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from typing import Any

from permlab.config.compose import compose_config
from permlab.config.schema import CONF, GROUPS

# Texts that Hydra's grammar takes for something else.
_TAKEN = ("true", "false", "null", "nan", "inf", "")


def command(config: Mapping[str, Any]) -> str:
    """A command that makes the run of this configuration, to be pasted into a shell."""
    return shlex.join(["python", "train.py", *words(config)])


def words(config: Mapping[str, Any]) -> list[str]:
    """Overrides that give a complete configuration: its choice in every group, and what then still differs.

    Args:
        config: complete and valid.
    """
    found = [f"{group}={config[group]['name']}" for group in GROUPS]
    while True:
        more = dict(_differences(config, _composed(tuple(found))))
        found += [f"{key}={as_word(value)}" for key, value in more.items()]
        if not more.keys() & _referred_to():
            return found


@lru_cache(maxsize=64)
def _composed(words: tuple[str, ...]) -> Mapping[str, Any]:
    """What these words give; not to be changed. A run and those beside it ask for the same."""
    return compose_config("train", words)[0]


@cache
def _referred_to() -> frozenset[str]:
    """Dotted keys from which others take their values, and so change with them."""
    texts = (path.read_text() for path in CONF.rglob("*.yaml"))
    return frozenset(key for text in texts for key in re.findall(r"\$\{([\w.]+)\}", text))


def _differences(wanted: Mapping[str, Any], given: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys, and their values, that are others than those given."""
    for key, value in wanted.items():
        other = given.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _differences(value, other, f"{path}{key}.")
        elif key not in given or value != other or isinstance(value, bool) != isinstance(other, bool):
            yield f"{path}{key}", value


def as_word(value: Any) -> str:
    """A value as Hydra's grammar has it.

    Example:
        >>> as_word({"start": 1.0, "kind": "linear"}), as_word(None), as_word("runs/a"), as_word("a b"), as_word("1e5")
        ('{start: 1.0, kind: "linear"}', 'null', 'runs/a', '"a b"', '"1e5"')
    """
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_/.][\w./-]*", value) and value.lower() not in _TAKEN:
        return value
    return as_json(value)


def as_json(value: Any) -> str:
    """JSON, but for the keys, which are not quoted."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {as_json(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_json, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
