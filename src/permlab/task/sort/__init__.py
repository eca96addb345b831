"""Sorting images by the numbers that they show."""
