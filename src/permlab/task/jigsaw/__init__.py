"""Putting images together from their pieces."""
