"""Scan orders: how well a data set's patches compress in each.

python -m permlab.ops compress                                  the default data, patches and seed of train.py
python -m permlab.ops compress data=digits model.patch_size=2   or any words that train.py takes

What compresses well keeps alike patches together: method.order=compressible starts a method from the best of these.
The numbers are by how many per cent fewer bytes LZMA needs than row by row, for tokens by the patches' colours and by
a codebook, singly and in pairs.
"""

import sys
from collections.abc import Mapping, Sequence

from permlab.config.compose import resolve_train
from permlab.config.plan import Plan
from permlab.errors import ConfigError, RunError, nearest

COMMANDS = ("compress",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        if words[0] not in COMMANDS:
            raise ConfigError(f"{words[0]}: no such command{nearest(words[0], COMMANDS)}")
        plan, _ = resolve_train(words[1:])
        if plan.spec.is_sequence:
            raise ConfigError(f"data={plan.config['data']['name']}: has no patches to compress")
        print("\n".join(_table(plan)))
    except RunError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


def _table(plan: Plan) -> list[str]:
    from permlab.run.assembly import place
    from permlab.task.place import compression

    model, _ = place(plan)
    found = compression(plan, model.height, model.width)
    columns = list(next(iter(found.values())))
    first = f"{plan.spec.describe(model.height, model.width)} of data={plan.config['data']['name']}; % less than row"
    return [first, _line("", columns), *(_row(scan, found[scan]) for scan in _best_first(found))]


def _best_first(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    return sorted(found, key=lambda scan: -found[scan]["mean"])


def _row(scan: str, values: Mapping[str, float]) -> str:
    return _line(scan, [f"{value:.2f}" for value in values.values()])


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<16}" + "".join(f"{cell:>20}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
