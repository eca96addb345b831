"""Backbones: embed images or token ids into items, read items in a given order."""
