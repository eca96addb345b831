"""What a key that does not exist may have been meant to be."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from permlab.config.schema import (
    COMPONENT_GROUPS,
    GROUPS,
    OWN_TRAINER_KEYS,
    SECTIONS,
    component_options,
    components,
    schema,
)
from permlab.errors import nearest

# Of two names, how alike they are for one to be a slip of the pen for the other: 1 is the same.
ALIKE = 0.75


def nearest_key(group: str, key: object, config: Mapping[str, Any]) -> str:
    """Suggestion to append to a message: a key nearly of that name, or of that name in another group.

    People write `max_steps` for `trainer.max_steps`, so a key without a group is compared with the last part of
    those of all groups. Keys that are set come first.

    Args:
        group: that the key was looked for in; empty for the root.
        key: that it does not have; in a file it may be anything.
        config: as composed, or as read from a file.
    Example:
        >>> nearest_key("", "max_step", {})
        '; nearest valid choice: trainer.max_steps'
    """
    key = str(key)
    if group == "" and key in OWN_TRAINER_KEYS:
        return f"; trainer.{key}: {OWN_TRAINER_KEYS[key]}"
    known = {name: _keys(name) for name in ("", *reversed(GROUPS), *SECTIONS)}
    own = [*known.pop(group), *(GROUPS if group == "" else ())]
    same = [f"{name}.{key}".lstrip(".") for name, keys in known.items() if key in keys]
    alike = _alike(key, _set(config, group, own)) or _alike(key, own)
    if alike and (not same or group):
        return f"; nearest valid choice: {_dotted(group, alike)}"
    if same:
        return f"; nearest valid choice: {' or '.join(same)}"
    if group:
        return nearest(_dotted(group, key), [_dotted(group, name) for name in own])
    homes = {name: home for home, keys in known.items() for name in keys}
    set_here = [name for home, keys in known.items() for name in _set(config, home, keys)]
    alike = _alike(key, set_here) or _alike(key, list(homes))
    return f"; nearest valid choice: {homes[alike]}.{alike}" if alike else nearest(key, own)


def _set(config: Mapping[str, Any], group: str, names: Sequence[str]) -> list[str]:
    """Those of a group's keys that a configuration sets."""
    settings = config.get(group) if group else config
    return [name for name in names if isinstance(settings, Mapping) and name in settings]


def _alike(key: str, names: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key, names, n=1, cutoff=ALIKE)), None)


def _dotted(group: str, key: str) -> str:
    return f"{group}.{key}" if group else key


def _keys(group: str) -> list[str]:
    """Keys of a group, those of all its components among them: one that is not chosen answers with a warning."""
    options = [schema(group, None)]
    options += [component_options(group, name) for name in components(group)] if group in COMPONENT_GROUPS else []
    return [key for part in options for key in part if key not in ("name", "component")]
