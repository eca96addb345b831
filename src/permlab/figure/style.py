"""What the figures have in common: sizes, colours that colour-blind readers can tell apart, saving."""

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, without the yellow that is too pale for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Perceptually uniform and rising in lightness, so it reads in grey as well.
SEQUENTIAL = "viridis"
DPI = 100


def new_figure(width: float, height: float) -> Figure:
    """Figure of a size in inches, drawn by Agg, that no global state knows of."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG whose bytes depend on the figure alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    temporary.replace(path)


def style() -> matplotlib.RcParams:
    """Settings under which every figure is drawn, whatever the user's own are."""
    settings = matplotlib.RcParams(matplotlib.rcParamsDefault)
    settings.update(
        {
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )
    return settings
