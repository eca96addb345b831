"""Figures drawn from the files of a run."""

from permlab.figure.draw import draw_all

__all__ = ["draw_all"]
