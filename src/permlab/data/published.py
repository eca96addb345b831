"""The commands get, check and list, in which data sets and models are alike."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from permlab.errors import ConfigError, RunError, nearest

COMMANDS = ("get", "check", "list")
HEAD = ("here", "size", "licence", "how it can be had")


@dataclass(frozen=True)
class Shelf:
    """What is published of one kind, and what is done with one piece of it.

    Args:
        group: configuration group whose presets they are.
        noun: what one of them is called in messages.
        keys: that may be given as `key=value`.
        names: of all.
        place: where one is or would be, by its name and the given keys.
        get, check: do so; return the line that says what was done.
        row: cells of its line in the table, as in `HEAD`.
    """

    group: str
    noun: str
    keys: tuple[str, ...]
    names: Sequence[str]
    place: Callable[[str, dict[str, str]], Any]
    get: Callable[[Any], str]
    check: Callable[[Any], str]
    row: Callable[[Any], tuple[str, str, str, str]]


def run_command(shelf: Shelf, words: Sequence[str], usage: str) -> int:
    """Run one command; returns the exit code."""
    try:
        return _dispatch(shelf, list(words), usage)
    except RunError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; what was fetched is thrown away", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(shelf: Shelf, words: list[str], usage: str) -> int:
    if not words or {"-h", "--help"} & set(words):
        print(usage)
        return 0
    command, *words = words
    if command not in COMMANDS:
        raise ConfigError(f"{command}: no such command{nearest(command, COMMANDS)}")
    keys = dict(word.split("=", 1) for word in words if "=" in word)
    unknown = [key for key in keys if key not in shelf.keys]
    if unknown:
        raise ConfigError(f"{unknown[0]}={keys[unknown[0]]}: unknown key{nearest(unknown[0], shelf.keys)}")
    names = [word for word in words if "=" not in word]
    if command == "list" or "--list" in names:
        print("\n".join(_table(shelf, keys)))
        return 0
    wrong = [name for name in names if name not in shelf.names]
    if wrong:
        raise ConfigError(f"{shelf.group}={wrong[0]}: no such choice{nearest(wrong[0], shelf.names)}")
    if not names:
        raise ConfigError(f"{command}: of which {shelf.noun}{nearest('', shelf.names)}")
    own = f"{shelf.group}.root"
    if own in keys and len(names) > 1:
        raise ConfigError(f"{own}={keys[own]}: is the folder of one {shelf.noun}, and {len(names)} are given")
    for place in [shelf.place(name, keys) for name in names]:
        print(shelf.get(place) if command == "get" else shelf.check(place))
    return 0


def _table(shelf: Shelf, keys: dict[str, str]) -> list[str]:
    rows = [(f"{shelf.group}=", *HEAD)]
    rows += [(name, *shelf.row(shelf.place(name, keys))) for name in shelf.names]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows]
