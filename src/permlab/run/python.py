"""Runs from Python: train a configuration, look at what came out, use the model, test and export it."""

import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from permlab.config.compose import resolve_evaluation, resolve_train
from permlab.config.machine import check_machine
from permlab.errors import Interrupted
from permlab.record.rundir import is_done, read_metrics, read_summary
from permlab.record.stored import read_arrays, read_plan
from permlab.run.evaluation import evaluate, load_learner
from permlab.run.story import train as tell
from permlab.task.learner import Learner, Summary


@dataclass(frozen=True)
class Run:
    """A run by its directory; everything is read from its files when it is asked for.

    Args:
        directory: that `permlab.train` or `train.py` has written.
    """

    directory: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", Path(self.directory))

    @property
    def config(self) -> Mapping[str, Any]:
        """The complete configuration.

        Raises:
            ConfigError: if the directory holds no readable one.
        """
        return read_plan(self.directory).config

    @property
    def is_finished(self) -> bool:
        return is_done(self.directory)

    @property
    def metrics(self) -> dict[str, Any]:
        """Final metrics by name, as `test/...`; those of controls and other companions among them."""
        return read_summary(self.directory)

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was logged of every step, each a dict with a `step`."""
        return read_metrics(self.directory)

    @property
    def orders(self) -> dict[str, np.ndarray]:
        """The learned order of every site, gather indices by its name; none where each input has its own."""
        return {name: order.cpu().numpy() for name, order in self.learner().method.orders().items()}

    @property
    def figures(self) -> list[Path]:
        return sorted((self.directory / "figures").glob("*.png"))

    def arrays(self, stem: str) -> dict[str, np.ndarray]:
        """The arrays of `arrays/<stem>.npz` by name; none where there is no such file."""
        return read_arrays(self.directory / "arrays" / f"{stem}.npz")

    def learner(self) -> Learner:
        """The trained model with its method, in evaluation mode: `predict(inputs)` gives logits.

        Raises:
            ConfigError: if the checkpoint cannot be read.
        """
        with _threads_kept():
            return load_learner(self.directory)

    def evaluate(self, split: str = "test") -> Summary:
        """Test the picked checkpoint again, as `eval.py` does; returns what that prints.

        Raises:
            ConfigError: if the run's files or the data cannot be read.
        """
        return self._evaluate(f"split={split}")

    def export(self, folder: str | Path) -> Path:
        """Write the model to a new folder, as `eval.py export=<folder>` does.

        Raises:
            ConfigError: if the run has nothing to export, or the folder has something in it.
        """
        self._evaluate(f"export={folder}")
        return Path(folder)

    def _evaluate(self, word: str) -> Summary:
        with _threads_kept():
            return evaluate(resolve_evaluation([f"run={self.directory}", word]))


def train(words: str | Sequence[str] = ()) -> Run:
    """Train a configuration, or find it trained, in this process; prints what `train.py` prints.

    Settings without effect are warnings. Random generators of the process are seeded; one process trains, so
    for several ranks there is `train.py`.

    Args:
        words: of the command line, as `["method=sinkhorn_ste", "trainer.max_steps=300"]`.
    Returns:
        The finished run.
    Raises:
        ConfigError: with every problem of the configuration; nothing is written then.
        RunError: if the run fails on the way; the same call goes on from its last checkpoint.
        KeyboardInterrupt: after the state was saved; the same call goes on from there.
    """
    plan, ineffective = resolve_train(words.split() if isinstance(words, str) else list(words))
    for message in ineffective:
        warnings.warn(message, stacklevel=2)
    check_machine(plan.config)
    if not is_done(plan.directory) or plan.is_forced:
        with _threads_kept():
            try:
                tell(plan)
            except Interrupted as error:
                if error.exit_code == 128 + signal.SIGINT:
                    raise KeyboardInterrupt(str(error)) from error
                raise
    return Run(plan.directory)


@contextmanager
def _threads_kept() -> Iterator[None]:
    """A run sets torch's number of threads, which afterwards is the caller's again."""
    count = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(count)
