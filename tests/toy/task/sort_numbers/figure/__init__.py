"""Figures of sorted numbers."""
