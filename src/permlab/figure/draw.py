"""Every figure of a run, from the files in its directory.

A figure is a file that has a function `draw(run_dir)`, which returns None where the run has not what it shows:
one of this folder, or, where only one task has it, of the folder `figure` of that task. The picture is
called as the file.
"""

import importlib
import warnings
from functools import cache
from pathlib import Path

from permlab.record.stored import UNREADABLE_ARRAYS

PACKAGE = Path(__file__).resolve().parents[1]


def draw_all(run_dir: Path) -> list[Path]:
    """Draw `figures/*.png` anew, each where the run has the files it is drawn from.

    Returns:
        Paths of the pictures, in a fixed order.
    """
    import matplotlib

    from permlab.figure.style import save_figure, style

    paths = []
    with matplotlib.rc_context(style()):
        for name, module in figures().items():
            try:
                figure = importlib.import_module(module).draw(run_dir)
            except (*UNREADABLE_ARRAYS, IndexError, AttributeError, RuntimeError) as error:
                # A picture is not worth the results it shows.
                warnings.warn(f"figures/{name}.png is not drawn: {type(error).__name__}: {error}", stacklevel=2)
                continue
            if figure is not None:
                paths.append(run_dir / "figures" / f"{name}.png")
                save_figure(figure, paths[-1])
    return paths


@cache
def figures() -> dict[str, str]:
    """Module of every figure by the picture's name."""
    paths = sorted((PACKAGE / "figure").glob("*.py")) + sorted((PACKAGE / "task").glob("*/figure/*.py"))
    drawn = [path for path in paths if "\ndef draw(" in path.read_text()]
    return {path.stem: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in drawn}
