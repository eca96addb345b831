"""Short runs through the command line, in this process (importing torch and lightning again takes seconds)."""

import contextlib
import io
import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jaxtyping
import lightning as L
import yaml
from scale import FULL

from permlab.cli import main
from permlab.config.check import plan_of
from permlab.config.compose import resolve_train
from permlab.config.plan import Plan
from permlab.record.rundir import reproducible
from permlab.task.task import Companion

# Drawing takes four times as long as these runs: a test that looks at the pictures asks for them.
SHORT = ("logger.mode=disabled", "data.batch_size=32", "figures=false")


@dataclass
class Result:
    code: int
    out: str
    err: str
    where: Path | Sequence[str]

    @cached_property
    def run_dir(self) -> Path:
        return self.where if isinstance(self.where, Path) else resolve_train(self.where)[0].directory

    @property
    def summary(self) -> dict[str, float]:
        return json.loads((self.run_dir / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def log(self) -> list[dict[str, float]]:
        """The metrics without what was measured: a run that is repeated or resumed has the same."""
        return [reproducible(line) for line in self.metrics]

    @property
    def config(self) -> dict:
        return yaml.safe_load((self.run_dir / "config.yaml").read_text())


def train(runs: Path, *overrides: str, steps: int = 2) -> Result:
    """`python train.py` with a short schedule and its runs below `runs`."""
    words = [*SHORT, f"paths.runs={runs}", f"trainer.max_steps={steps}", *overrides]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _unchecked():
        code = main("train", words)
    return Result(code, out.getvalue(), err.getvalue(), words)


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Shapes are not checked in whole runs, a third of whose time that takes: tests of the parts do, and all of them do
    in `make test-all`."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", before or not FULL)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def configure(words: Sequence[str]) -> dict[str, Any]:
    """Complete configuration that these words give, for a test to change."""
    return dict(resolve_train(words)[0].config)


def assemble(config: Mapping[str, Any]) -> Any:
    """Parts of a run from its configuration; nothing is trained before."""
    from permlab.run.assembly import assemble

    return assemble(plan_of(config))


def data_module(config: Mapping[str, Any], seed: int = 0) -> Any:
    """Loaders of a configuration's data set."""
    from permlab.data.module import DataModule

    return DataModule(plan_of(config).data, config["data"], seed)


def cut_companions(compose: Callable[..., Plan], settings: Mapping[str, Any]) -> Callable[..., Plan]:
    """What makes the plans of runs before and beside a run, which are no longer than `settings` of the trainer say."""

    def cut(plan: Plan, companion: Companion) -> Plan:
        steps = compose(plan, companion).config["trainer"]["max_steps"]
        longest = settings["max_steps"]
        new = {**settings, "max_steps": min(steps, longest) if steps > 0 else longest, "val_check_interval": None}
        changes = {f"trainer.{key}": value for key, value in new.items()}
        return compose(plan, replace(companion, change={**companion.change, **changes}))

    return cut


class StopAt(L.Callback):
    """Pretends that a signal arrives during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGTERM)
