"""What a run does beside its training steps, in pieces that are alike, for whoever foretells what it takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

# What pieces and steps are timed by. A benchmark on a machine that others use puts the processor's own in its place.
clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Amounts:
    """How often a run does what every run does.

    Args:
        steps: optimiser steps; 0 where nothing is trained.
        logged: of them, steps whose metrics are logged.
        validations: passes over the validation split, and batches of each.
        val_batches, test_batches: of one pass over the split.
    """

    steps: int
    logged: int
    validations: int
    val_batches: int
    test_batches: int


@dataclass(frozen=True)
class Piece:
    """A part of a run that is made of like pieces, one of which is tried to know what all take.

    Args:
        name: what the part is called.
        times: how many pieces as large as the one that is tried; a fraction for a last one that is smaller.
        make: makes one, in memory alone; or the seconds that one takes, where they are known.
    """

    name: str
    times: float
    make: Callable[[], object] | float


def timed(make: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = clock()
    make()
    return clock() - began
