"""Data sets: what there is, how it can be had, whether a copy is whole.

python -m permlab.data get --list            every data set: whether it is here, size, licence, how it can be had
python -m permlab.data get fashion_mnist     fetch it into paths.data, which is data/ unless given
python -m permlab.data check fashion_mnist   compare the files with their hashes
python -m permlab.data get mnist paths.data=/scratch      or data.root=<the folder itself>
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permlab.config.build import build
from permlab.config.schema import CONF, component_names
from permlab.data.fetch import fetch
from permlab.data.source import Source, read_settings, read_source
from permlab.errors import ConfigError, RunError, nearest

KEYS = ("paths.data", "data.root")
COMMANDS = ("get", "check", "list")


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
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except RunError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; what was fetched is thrown away", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    command, *words = words
    if command not in COMMANDS:
        raise ConfigError(f"{command}: no such command{nearest(command, COMMANDS)}")
    keys = dict(word.split("=", 1) for word in words if "=" in word)
    unknown = [key for key in keys if key not in KEYS]
    if unknown:
        raise ConfigError(f"{unknown[0]}={keys[unknown[0]]}: unknown key{nearest(unknown[0], KEYS)}")
    names = [word for word in words if "=" not in word]
    if command == "list" or "--list" in names:
        print("\n".join(_table(keys)))
        return 0
    places = [_place(name, keys) for name in names]
    if not places:
        raise ConfigError(f"{command}: of which data set{nearest('', component_names('data'))}")
    if "data.root" in keys and len(places) > 1:
        raise ConfigError(f"data.root={keys['data.root']}: is the folder of one data set, and {len(places)} are given")
    for place in places:
        print(_get(place) if command == "get" else _check(place))
    return 0


def _place(name: str, keys: dict[str, str]) -> Place:
    if name not in component_names("data"):
        raise ConfigError(f"data={name}: no such choice{nearest(name, component_names('data'))}")
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


def _table(keys: dict[str, str]) -> Iterator[str]:
    places = [_place(name, keys) for name in component_names("data")]
    rows = [("data=", "here", "size", "licence", "how it can be had")]
    for place in places:
        source = place.source
        fetched = "python -m permlab.data get " + source.name if source.hashes else source.origin
        rows.append((source.name, "no" if place.problem() else "yes", source.size, source.licence, fetched))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])


if __name__ == "__main__":
    sys.exit(main())
