"""Families of blocks in which sites are known: one file each, found by its place, which defines `FAMILY`."""
