"""Data sets: what there is, how it can be had, whether a copy is whole.

python -m permlab.data get --list            every data set: whether it is here, size, licence, how it can be had
python -m permlab.data get fashion_mnist     fetch it into paths.data, which is data/ unless given
python -m permlab.data check fashion_mnist   compare the files with their hashes
python -m permlab.data get mnist paths.data=/scratch      or data.root=<the folder itself>
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permlab.config.build import build
from permlab.config.schema import CONF, component_names
from permlab.data.fetch import fetch
from permlab.data.published import Shelf, run_command
from permlab.data.source import Source, read_settings, read_source
from permlab.errors import ConfigError, RunError

KEYS = ("paths.data", "data.root")


@dataclass(frozen=True)
class Place:
    """A data set, and where it is or would be."""

    source: Source
    settings: dict[str, Any]

    @property
    def root(self) -> Path | None:
        """Its folder; None for a data set that comes with a package."""
        return Path(self.settings["root"]) if "root" in self.settings else None

    def problem(self) -> str | None:
        """Why there is nothing here to train on; None if there is."""
        if self.root is not None and not self.root.is_dir():
            return f"{self.root}: no such folder"
        try:
            build("data", self.settings).spec()
        except (ConfigError, ValueError, OSError) as error:
            return str(error)
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    names = component_names("data")
    shelf = Shelf("data", "data set", KEYS, names, place=_place, get=_get, check=_check, row=_row)
    return run_command(shelf, sys.argv[1:] if arguments is None else arguments, __doc__ or "")


def _place(name: str, keys: dict[str, str]) -> Place:
    path = CONF / "data" / f"{name}.yaml"
    settings = read_settings(path, keys.get("paths.data", "data")) | {"name": name}
    if "data.root" in keys and "root" in settings:
        settings["root"] = keys["data.root"]
    return Place(read_source(path), settings)


def _get(place: Place) -> str:
    source, root = place.source, place.root
    if root is None:
        return f"{source.name}: already here, {source.origin}"
    if not source.hashes and place.problem() is None:
        return f"{source.name}: already here, {root}"
    if source.problem(root) is not None and source.hashes:
        print(f"{source.name}: fetching {source.size}", flush=True)
    way = fetch(source, root)
    files = f"{len(source.hashes)} files, SHA-256 as published"
    return f"{source.name}: {way}, {root} ({files}; licence: {source.licence})"


def _check(place: Place) -> str:
    source, root = place.source, place.root
    problem = (source.problem(root) if root is not None else None) or place.problem()
    if problem:
        raise RunError(f"{source.name}: {problem}")
    if source.hashes:
        return f"{source.name}: whole, {root} ({len(source.hashes)} files, SHA-256 as published)"
    spec = build("data", place.settings).spec()
    shape = f"{spec.width} tokens" if spec.is_sequence else f"{spec.channels}x{spec.height}x{spec.width} pixels"
    where = f", {root}" if root is not None else ""
    return f"{source.name}: is read as {spec.num_classes} {spec.labels}, {shape}{where}; no hashes are known to compare"


def _row(place: Place) -> tuple[str, str, str, str]:
    source = place.source
    fetched = "python -m permlab.data get " + source.name if source.hashes else source.origin
    return "no" if place.problem() else "yes", source.size, source.licence, fetched


if __name__ == "__main__":
    sys.exit(main())
