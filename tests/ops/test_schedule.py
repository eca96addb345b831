"""Schedules against their closed forms, and every refusal with the key it names."""

import math

import pytest
from omegaconf import OmegaConf

from permlab.ops.schedule import KINDS, MIN_TEMPERATURE, Schedule, check_temperature, parse

SCHEDULES = {
    "constant": parse(0.3),
    "linear": parse({"start": 1.0, "end": 0.2}),
    "cosine": parse({"kind": "cosine", "start": 1.0, "end": 0.2}),
    "exponential": parse({"kind": "exponential", "start": 1.0, "end": 0.01}),
    "triangular": parse({"start": 0.1, "peak": 0.5, "end": 0.3}),
}
# Values worked out by hand at progress 0, 1/4, 1/2, 3/4 and 1.
EXPECTED = {
    "constant": [0.3, 0.3, 0.3, 0.3, 0.3],
    "linear": [1.0, 0.8, 0.6, 0.4, 0.2],
    "cosine": [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2],
    "exponential": [1.0, 10**-0.5, 0.1, 10**-1.5, 0.01],
    "triangular": [0.1, 0.3, 0.5, 0.4, 0.3],
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_at_quarters(kind):
    schedule = SCHEDULES[kind]
    assert schedule.kind == kind
    assert [schedule.at(quarter / 4) for quarter in range(5)] == pytest.approx(EXPECTED[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_end_points_are_exact(kind):
    schedule = SCHEDULES[kind]
    assert (schedule.at(0.0), schedule.at(1.0)) == (schedule.start, schedule.end)


@pytest.mark.parametrize("value", [0, 0.0, {"start": 0, "end": 0}, {"start": 0, "peak": 0, "end": 0}])
def test_no_schedule_falls_below_the_floor(value):
    assert {parse(value).at(step / 10) for step in range(11)} == {MIN_TEMPERATURE}


def test_triangle_from_zero_to_zero():
    schedule = parse({"start": 0.0, "peak": 0.2, "end": 0.0})
    assert schedule.at(0.0) == schedule.at(1.0) == MIN_TEMPERATURE
    assert schedule.at(0.5) == 0.2
    assert schedule.at(0.2) == pytest.approx(schedule.at(0.8)) == pytest.approx(0.08)


def test_a_single_step_table_has_no_time_to_move():
    assert parse({"start": 1.0, "end": 0.1}).at(0.0) == 1.0


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_the_interval(progress):
    with pytest.raises(ValueError, match="progress="):
        SCHEDULES["linear"].at(progress)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "temperature=-1"),
        (math.inf, "temperature=inf"),
        (math.nan, "temperature=nan"),
        (True, "temperature=True"),
        ("warm", "temperature='warm'"),
        ([1.0], r"temperature=\[1.0\]"),
        ({}, "start is missing"),
        ({"start": 1.0}, "end is missing"),
        ({"peak": 1.0, "end": 0.0}, "start is missing"),
        ({"start": -0.5, "end": 1.0}, "start=-0.5"),
        ({"start": 1.0, "end": math.inf}, "end=inf"),
        ({"start": 1.0, "end": "low"}, "end='low'"),
        ({"start": 1.0, "end": 0.1, "paek": 2.0}, "'paek'; did you mean peak?"),
        ({"start": 1.0, "ende": 0.1}, "'ende'; did you mean end?"),
        ({"kind": "cosin", "start": 1.0, "end": 0.1}, "'cosin'; did you mean cosine?"),
        ({"kind": 3, "start": 1.0, "end": 0.1}, "kind 3; choices: constant, linear"),
        ({"kind": "linear", "start": 1.0, "peak": 2.0, "end": 0.1}, "peak=2.0 has no effect"),
        ({"kind": "constant", "start": 1.0, "end": 0.1}, "end=0.1 has no effect"),
        ({"kind": "triangular", "start": 1.0, "end": 0.1}, "peak is missing"),
        ({"kind": "exponential", "start": 1.0, "end": 0.0}, "end=0.0"),
        ({"kind": "exponential", "start": 0.0, "end": 1.0}, "start=0.0"),
    ],
)
def test_refusals_name_key_and_value(value, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linaer", 1.0, 0.5, None), "did you mean linear"),
        (("linear", 1.0, -0.5, None), "end=-0.5"),
        (("linear", 1.0, 0.5, 2.0), "peak=2.0"),
        (("triangular", 1.0, 0.5, None), "peak=None"),
        (("constant", 1.0, 0.5, None), "end=0.5 has no effect"),
        (("exponential", 1.0, 0.0, None), "end=0.0"),
    ],
)
def test_a_schedule_built_directly_is_checked_too(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_reads_a_configuration_node():
    node = OmegaConf.create({"low": 0, "temperature": {"start": "${low}", "peak": 0.2, "end": 0}})
    assert parse(node.temperature) == parse({"start": 0, "peak": 0.2, "end": 0})
    assert parse(OmegaConf.create({"start": 1, "end": 0.1, "peak": None})).kind == "linear"


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_check_temperature(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}"):
        check_temperature(temperature)


def test_check_temperature_accepts_the_floor():
    check_temperature(MIN_TEMPERATURE)
