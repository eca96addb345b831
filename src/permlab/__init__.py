"""permlab: a laboratory for learned permutations."""

__version__ = "0.1.0"
