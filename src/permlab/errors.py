"""Errors that end a run with one line and an exit code instead of a traceback."""

from collections.abc import Sequence


class RunError(Exception):
    """What `train.py` and `eval.py` report in one line."""

    exit_code = 1


class ConfigError(RunError):
    """Bad input: every problem found, each naming key, value and nearest valid choice."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class NonFiniteError(RunError):
    """A loss or gradient became NaN or infinite."""


class Interrupted(RunError):
    """The run was asked to stop by a signal and has saved its state."""

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(f"interrupted by signal {signal_number}")
