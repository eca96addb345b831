"""Sorting numbers."""
