"""How much of what is long by nature is run: a part by `make test`, all of it by `make test-all`."""

import os

FULL = os.environ.get("PERMLAB_TESTS") == "all"


def part(count: int, *, of: int = 10) -> int:
    """The whole number where everything is run, else one in so many of it, and at least one."""
    return count if FULL else max(1, count // of)
