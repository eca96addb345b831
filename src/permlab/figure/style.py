"""What the figures have in common: sizes, colours that colour-blind readers can tell apart, saving."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito's palette, without the yellow that is too pale for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# What others are compared with.
REFERENCE = "#6e6e6e"
# Perceptually uniform and rising in lightness, so it reads in grey as well.
SEQUENTIAL = "viridis"
# White at its centre, for numbers of both signs.
DIVERGING = "RdBu_r"
DPI = 200
# Canvas of a format, and what its files would say of when and by what they were written.
_CANVASES: dict[str, tuple[Any, dict[str, None]]] = {
    "png": (FigureCanvasAgg, {"Software": None}),
    "pdf": (FigureCanvasPdf, {"CreationDate": None}),
    "svg": (FigureCanvasSVG, {"Date": None}),
}


def new_figure(width: float, height: float) -> Figure:
    """Figure of a size in inches, drawn by Agg, that no global state knows of."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, formats: Sequence[str] = ("png",)) -> None:
    """Write a figure, `path` with the suffix of every format; the bytes depend on the figure alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is laid out once is the same in every format
    for name in formats:
        target = path.with_suffix(f".{name}")
        temporary = path.with_name(f".{target.name}")
        # Straight to the canvas: `savefig` draws everything once more each time, to lay it out.
        canvas, undated = _CANVASES[name]
        getattr(canvas(figure), f"print_{name}")(temporary, metadata=undated)
        temporary.replace(target)


def sign_figure(figure: Figure, text: str) -> None:
    """Say above everything else what a figure is of."""
    if text:
        figure.suptitle(text, x=0.01, ha="left", fontsize=9, color="#444444")


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
            "pdf.fonttype": 42,  # letters that publishers accept and readers can select
            "svg.hashsalt": "permlab",
        }
    )
    return settings
