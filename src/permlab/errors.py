"""Errors that end a run with one line and an exit code instead of a traceback."""

from collections.abc import Sequence


class ConfigError(Exception):
    """Bad input: every problem found, each naming key, value and nearest valid choice. Exit code 2."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class NonFiniteError(Exception):
    """A loss or gradient became NaN or infinite. Exit code 1."""


class Interrupted(Exception):
    """The run was asked to stop by a signal and has saved its state. Exit code 128 + signal."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"interrupted by signal {signal_number}")
