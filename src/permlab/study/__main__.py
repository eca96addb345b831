"""Pictures of studies, from their tables.

python -m permlab.study figure real_llm            what every row reaches over the seconds that it takes
python -m permlab.study figure real_llm pydocs 2:4   of the sections whose titles have these words
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from permlab.config.schema import CONF
from permlab.errors import ConfigError, RunError, nearest

RESULTS = CONF.parent / "results"
COMMANDS = ("figure",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        for path in _draw(words):
            print(f"picture: {path}")
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _draw(words: Sequence[str]) -> list[Path]:
    """Draw `results/<study>_<section>.png`, `.pdf` and `.svg` of the sections that are asked for."""
    command, *words = words
    if command not in COMMANDS:
        raise ConfigError(f"{command}: no such command{nearest(command, COMMANDS)}")
    if not words:
        raise ConfigError(f"figure: of which study{nearest('', [path.stem for path in RESULTS.glob('*.csv')])}")
    import matplotlib

    from permlab.figure.draw import FORMATS
    from permlab.figure.style import save_figure, style
    from permlab.study.figures import section_figures

    study, *words = words
    paths = []
    with matplotlib.rc_context(style()):
        for title, figure in section_figures(RESULTS / f"{study}.csv", words).items():
            name = re.sub(r"\W+", "_", title.partition(": ")[2])
            paths.append(RESULTS / f"{study}_{name}.png")
            save_figure(figure, paths[-1], FORMATS)
    return paths


if __name__ == "__main__":
    sys.exit(main())
