"""`python -m permlab <command>`: everything that can be started here, from anywhere.

The commands are those of `train.py`, `eval.py` and `python -m permlab.sweep`, and take the same words.
"""

import sys
from collections.abc import Callable, Sequence

import permlab.config.reference
import permlab.ops.__main__
import permlab.study.__main__
import permlab.sweep.__main__
from permlab import cli
from permlab.errors import nearest

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "train": ("train a model, or with -m every combination of values", lambda words: cli.main("train", words)),
    "eval": ("test a finished run again, export or upload it", lambda words: cli.main("eval", words)),
    "sweep": ("run the grids of sweeps/; without a name, list them", permlab.sweep.__main__.main),
    "study": ("draw the figures of a study from its table", permlab.study.__main__.main),
    "compress": (
        "show in which scan order a data set's patches compress best",
        lambda words: permlab.ops.__main__.main(["compress", *words]),
    ),
    "options": ("write docs/options.md anew", lambda _: permlab.config.reference.main()),
}
USAGE = """usage: python -m permlab <command> [words ...]

{commands}

Each has a --help of its own: python -m permlab train --help lists tasks, data sets, models, methods and keys.
From Python: import permlab; permlab.train([...]), see docs/python.md"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command with the words behind it (default: the process's own); returns the exit code."""
    command, *words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("--help", "-h", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:<8} {text}" for name, (text, _) in COMMANDS.items())))
        return 0
    if command not in COMMANDS:
        print(f"error: {command}: no such command{nearest(command, list(COMMANDS))}", file=sys.stderr)
        return 2
    return COMMANDS[command][1](words)


if __name__ == "__main__":
    sys.exit(main())
