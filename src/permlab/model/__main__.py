"""Published models: what there is, how it can be had, whether a copy is whole.

python -m permlab.model get --list            every model: whether it is here, size, licence, how it can be had
python -m permlab.model get smollm2_135m      fetch it into paths.data/models, where paths.data is data/ unless given
python -m permlab.model check smollm2_135m    compare the files with what was fetched
python -m permlab.model get smollm2_135m way=package      from there alone; or way=hub
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from permlab.config.schema import CONF, component_names
from permlab.data.published import Shelf, run_command
from permlab.data.source import Source, is_published, read_settings, read_source
from permlab.errors import ConfigError, RunError, nearest
from permlab.model.fetch import WAYS, damage, fetch, read_origin

KEYS = ("paths.data", "way")


@dataclass(frozen=True)
class Place:
    """A model, where it is or would be, and the only way that is wanted, if any."""

    source: Source
    root: Path
    way: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    names = [name for name in component_names("model") if is_published(CONF / "model" / f"{name}.yaml")]
    shelf = Shelf("model", "model", KEYS, names, place=_place, get=_get, check=_check, row=_row)
    return run_command(shelf, sys.argv[1:] if arguments is None else arguments, __doc__ or "")


def _place(name: str, keys: dict[str, str]) -> Place:
    way = keys.get("way")
    if way is not None and way not in WAYS:
        raise ConfigError(f"way={way}: no such way{nearest(way, list(WAYS))}")
    path = CONF / "model" / f"{name}.yaml"
    return Place(read_source(path), Path(read_settings(path, keys.get("paths.data", "data"))["pretrained"]), way)


def _get(place: Place) -> str:
    source, root = place.source, place.root
    if place.way is None and damage(root, compare=True) is None:
        return f"{source.name}: already here, {root} (from {read_origin(root)['from']}; licence: {source.licence})"
    print(f"{source.name}: fetching {source.size}", flush=True)
    return f"{source.name}: {root} (from {fetch(source, root, way=place.way)}; licence: {source.licence})"


def _check(place: Place) -> str:
    problem = damage(place.root, compare=True)
    if problem:
        raise RunError(f"{place.source.name}: {problem}")
    return f"{place.source.name}: whole, {place.root} (from {read_origin(place.root)['from']}, SHA-256 as fetched)"


def _row(place: Place) -> tuple[str, str, str, str]:
    source = place.source
    here = "no" if damage(place.root, compare=False) else "yes"
    return here, source.size, source.licence, f"python -m permlab.model get {source.name}"


if __name__ == "__main__":
    sys.exit(main())
