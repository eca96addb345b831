"""A linear head on frozen features."""
