"""Every figure of a run, from the files in its directory.

A figure is a file that has a function `draw(run_dir)`, which returns None where the run has not what it shows:
one of this folder, or, where only one task has it, of the folder `figure` of that task. The picture is
called as the file.
"""

import importlib
import warnings
from collections.abc import Container
from functools import cache
from pathlib import Path

import yaml

from permlab.record.stored import UNREADABLE_ARRAYS

# For the eye, for a paper, for a page.
FORMATS = ("png", "pdf", "svg")
PACKAGE = Path(__file__).resolve().parents[1]


def draw_all(run_dir: Path, only: Container[str] | None = None) -> list[Path]:
    """Draw `figures/*.png` anew, with a `.pdf` and an `.svg` of each, where the run has the files it is drawn from.

    Args:
        only: names of figures; None for all of them.
    Returns:
        Paths of the PNGs, in a fixed order.
    """
    import matplotlib

    from permlab.figure.style import save_figure, sign_figure, style

    paths = []
    with matplotlib.rc_context(style()):
        for name, module in figures().items():
            if only is not None and name not in only:
                continue
            try:
                figure = importlib.import_module(module).draw(run_dir)
            except (*UNREADABLE_ARRAYS, IndexError, AttributeError, RuntimeError) as error:
                # A picture is not worth the results it shows.
                warnings.warn(f"figures/{name}.png is not drawn: {type(error).__name__}: {error}", stacklevel=2)
                continue
            if figure is not None:
                sign_figure(figure, caption(run_dir))
                paths.append(run_dir / "figures" / f"{name}.png")
                save_figure(figure, paths[-1], FORMATS)
    return paths


def caption(run_dir: Path) -> str:
    """Task, data, model, method and seed of a run, as far as its configuration names them."""
    path = run_dir / "config.yaml"
    config = yaml.safe_load(path.read_text()) if path.is_file() else {}
    named = [
        f"{group} {config[group]['name']}"
        for group in ("task", "data", "model", "method")
        if "name" in config.get(group, {})
    ]
    return ", ".join([*named, f"seed {config['seed']}"]) if named else ""


@cache
def figures() -> dict[str, str]:
    """Module of every figure by the picture's name."""
    paths = sorted((PACKAGE / "figure").glob("*.py")) + sorted((PACKAGE / "task").glob("*/figure/*.py"))
    drawn = [path for path in paths if "\ndef draw(" in path.read_text()]
    return {path.stem: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in drawn}
