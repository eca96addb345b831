"""Schedules of the learning rate against published ones, worked out in plain numpy."""

import numpy as np
import pytest
from torch import nn

from permlab.task.optim import build_optimizer

SETTINGS = {"lr": 2.0, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "warmup_fraction": 0.05}


def rates(schedule: str, num_steps: int, **changes: float) -> np.ndarray:
    """Learning rate at every step."""
    settings = {**SETTINGS, "schedule": schedule, "hold_fraction": 0.0, **changes}
    optimizer, scheduler = build_optimizer(nn.Linear(2, 2), nn.Identity(), settings, num_steps=num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(found)


def test_with_and_without_hold_are_the_schedules_of_reorders_code() -> None:
    """100 epochs: 5 up; with a policy constant to 45 and then a cosine of 55, with fixed orders a cosine of 95."""
    epoch = np.linspace(0, 100, 1001)
    rising = np.minimum(epoch / 5, 1)
    held = np.where(epoch < 45, rising, (1 + np.cos(np.pi * (epoch - 45) / 55)) / 2)
    falling = np.where(epoch < 5, rising, (1 + np.cos(np.pi * (epoch - 5) / 95)) / 2)
    np.testing.assert_allclose(rates("cosine", 1001, hold_fraction=0.45), 2 * held, atol=1e-9)
    np.testing.assert_allclose(rates("cosine", 1001), 2 * falling, atol=1e-9)
    assert np.abs(held - falling).max() > 0.3


@pytest.mark.parametrize("schedule", ["constant", "onecycle", "linear", "cosine"])
def test_a_hold_within_the_warm_up_changes_nothing(schedule: str) -> None:
    np.testing.assert_array_equal(rates(schedule, 100, hold_fraction=0.03), rates(schedule, 100))


@pytest.mark.parametrize("schedule", ["constant", "onecycle"])
def test_schedules_without_a_fall_of_their_own_have_no_hold(schedule: str) -> None:
    np.testing.assert_array_equal(rates(schedule, 100, hold_fraction=0.5), rates(schedule, 100))


def test_a_rate_that_is_held_to_the_end_is_constant() -> None:
    np.testing.assert_array_equal(rates("linear", 100, hold_fraction=1.0)[:-1], rates("constant", 100)[:-1])
