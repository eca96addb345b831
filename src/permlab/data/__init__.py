"""Datasets: a specification known before torch is imported, and loaders."""
