"""Fixture of the tests of bad input."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """What a user has: no type checker that catches a wrong dtype or shape before the code does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
