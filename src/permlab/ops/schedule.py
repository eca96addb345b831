"""Temperature over the course of training, free of torch so that a configuration is checked without it."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The points each kind reads; any other is an error, so that no setting goes without effect.
_POINTS = {
    "constant": ("start",),
    "linear": ("start", "end"),
    "cosine": ("start", "end"),
    "exponential": ("start", "end"),
    "triangular": ("start", "peak", "end"),
}
KINDS = tuple(_POINTS)

# Scores are of order 10 at most, and float32 resolves 10 / 1e-3 = 1e4 nats to about 1e-3 nats,
# so the relaxations still mean what they say. A few orders of magnitude lower their exponents
# are rounding noise, and at 0 they divide by zero. float16 holds 1e4 as well (its largest is 65504).
MIN_TEMPERATURE = 1e-3


@dataclass(frozen=True)
class Schedule:
    """Temperature as a function of progress through the active phase.

    `constant` stays at `start`; `linear`, `cosine` (half a cosine wave) and `exponential`
    (a constant ratio per step) run from `start` to `end`; `triangular` runs linearly from
    `start` to `peak` at half time and on to `end`.

    Args:
        kind: one of `KINDS`.
        start: temperature at progress 0, in nats, finite and >= 0.
        end: temperature at progress 1; equal to `start` where constant, > 0 (as is `start`) where exponential.
        peak: temperature at progress 0.5, for `triangular` only.
    Raises:
        ValueError: naming the key and the value that is out of range, missing or without effect.
    Example:
        >>> schedule = Schedule("triangular", start=0.0, peak=0.2, end=0.0)
        >>> [schedule.at(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.001, 0.1, 0.2, 0.001]
    """

    kind: str
    start: float
    end: float
    peak: float | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        for key in ("start", "peak", "end"):
            value = getattr(self, key)
            if value is not None or key != "peak":
                _check_point(key, value)
        if (self.peak is None) == (self.kind == "triangular"):
            raise ValueError(f"peak={self.peak} does not go with kind {self.kind}: triangular has a peak, no other has")
        if self.kind == "constant" and self.end != self.start:
            raise ValueError(f"end={self.end} has no effect: a constant schedule stays at start={self.start}")
        if self.kind == "exponential" and 0 in (self.start, self.end):
            key = "start" if self.start == 0 else "end"
            raise ValueError(f"{key}={getattr(self, key)} is out of reach: an exponential schedule needs points > 0")

    def at(self, progress: float) -> float:
        """Temperature at a progress in [0, 1], never below `MIN_TEMPERATURE`.

        Raises:
            ValueError: if progress is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress={progress} is outside [0, 1]")
        return max(self._unfloored(progress), MIN_TEMPERATURE)

    def _unfloored(self, progress: float) -> float:
        if self.kind == "triangular":
            assert self.peak is not None
            if progress <= 0.5:
                return _mix(self.start, self.peak, 2 * progress)
            return _mix(self.peak, self.end, 2 * progress - 1)
        if self.kind == "cosine":
            return _mix(self.start, self.end, (1 - math.cos(math.pi * progress)) / 2)
        if self.kind == "exponential":
            return self.start ** (1 - progress) * self.end**progress
        return float(self.start) if self.kind == "constant" else _mix(self.start, self.end, progress)


def parse(value: Any) -> Schedule:
    """Read a schedule from a configuration value.

    A number stays constant. A mapping has the keys `start`, `end` and, for a triangle, `peak`;
    its `kind` may be left out and is then triangular where there is a peak and linear
    otherwise. A key whose value is None counts as absent.

    Args:
        value: a number >= 0 in nats, or a mapping with keys among kind, start, peak, end.
    Returns:
        The schedule; its temperatures are floored at `MIN_TEMPERATURE`.
    Raises:
        ValueError: naming the offending key and value.
    Example:
        >>> parse(0.3)
        Schedule(kind='constant', start=0.3, end=0.3, peak=None)
        >>> parse({"start": 1.0, "end": 0.1}).at(0.5)
        0.55
    """
    if not isinstance(value, Mapping):
        _check_point("temperature", value)
        return Schedule("constant", float(value), float(value))
    points = {key: point for key, point in value.items() if point is not None}
    kind = points.pop("kind", "triangular" if "peak" in points else "linear")
    _check_kind(kind)
    wanted = _POINTS[kind]
    for key, point in points.items():
        if key not in ("start", "peak", "end"):
            raise ValueError(f"unknown key {key!r}{_nearest(key, ('kind', 'start', 'peak', 'end'))}")
        if key not in wanted:
            raise ValueError(f"{key}={point} has no effect: a {kind} schedule has {', '.join(wanted)}")
        _check_point(key, point)
        points[key] = float(point)
    for key in wanted:
        if key not in points:
            raise ValueError(f"{key} is missing: a {kind} schedule has {', '.join(wanted)}")
    return Schedule(kind, points["start"], points.get("end", points["start"]), points.get("peak"))


def check_temperature(temperature: float) -> None:
    """Raise unless an operation can divide by the temperature.

    Raises:
        ValueError: if it is not finite and > 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} is not a finite number > 0")


def _mix(first: float, second: float, weight: float) -> float:
    return (1 - weight) * first + weight * second


def _check_kind(kind: object) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}{_nearest(kind, KINDS)}")


def _check_point(key: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{key}={value!r} is not a number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{key}={value} is not a finite number >= 0")


def _nearest(value: object, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; choices: {', '.join(choices)}"
