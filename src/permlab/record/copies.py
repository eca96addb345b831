"""Copies of a run's metrics in the formats of Lightning's own loggers, for other programs to read."""

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from permlab.record.rundir import read_metrics

STEP = "trainer/global_step"
LOGGERS: Mapping[str, Callable[[Path], Logger]] = {
    "csv": lambda run_dir: CSVLogger(run_dir, name="csv", version="", flush_logs_every_n_steps=1),
    "tensorboard": lambda run_dir: TensorBoardLogger(run_dir, name="tensorboard", version="", default_hp_metric=False),
}


class Copy:
    """The metrics of a run in a folder named as the format, made anew from `metrics.jsonl` where a run goes on.

    A failure of any kind is one warning, and the copy's end: `metrics.jsonl` has everything.

    Args:
        run_dir: of the run.
        name: of the format, a key of `LOGGERS`.
        config: of the run, plain containers only.
    """

    def __init__(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        self.run_dir, self.name, self.config = run_dir, name, config
        self._logger: Logger | None = None
        self._step = 0
        self._ended = False

    def log(self, row: Mapping[str, Any]) -> None:
        """Add the values of a step, named by `trainer/global_step`."""
        values = {key: value for key, value in row.items() if key != STEP}
        self._attempt(lambda logger: logger.log_metrics(values, step=row[STEP]), row[STEP])

    def end(self, summary: Mapping[str, Any]) -> None:
        """Add the final metrics to the last step, and close the files."""
        if self._logger is None:
            return

        def end(logger: Logger) -> None:
            if summary:
                logger.log_metrics(dict(summary), step=self._step)
            logger.finalize("success")

        self._attempt(end, self._step)
        self._ended = True

    def _attempt(self, action: Callable[[Logger], None], step: int) -> None:
        if self._ended:
            return
        try:
            if self._logger is None:
                self._logger = self._start(step)
            action(self._logger)
            self._step = step
        except Exception as error:  # whatever it is: a copy may fail, training may not
            self._ended = True
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(
                f"the copy {self.run_dir / self.name} stopped with {type(error).__name__}: {reason}; the run goes on",
                stacklevel=2,
            )

    def _start(self, step: int) -> Logger:
        """A logger that knows all steps before this one."""
        shutil.rmtree(self.run_dir / self.name, ignore_errors=True)
        logger = LOGGERS[self.name](self.run_dir)
        logger.log_hyperparams(dict(self.config))
        for row in read_metrics(self.run_dir):
            if (earlier := row.pop("step")) < step:
                logger.log_metrics(row, step=earlier)
        return logger
