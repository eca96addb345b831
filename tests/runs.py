"""Short runs through the command line, in this process (importing torch and lightning again takes seconds)."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from permlab.cli import main, resolve
from permlab.config import run_directory

SHORT = ("logger.mode=disabled", "data.batch_size=32")


@dataclass
class Result:
    code: int
    out: str
    err: str
    run_dir: Path

    @property
    def summary(self) -> dict[str, float]:
        return json.loads((self.run_dir / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def config(self) -> dict:
        return yaml.safe_load((self.run_dir / "config.yaml").read_text())


def train(runs: Path, *overrides: str, steps: int = 2) -> Result:
    """`python train.py` with a short schedule and its runs below `runs`."""
    words = [*SHORT, f"paths.runs={runs}", f"trainer.max_steps={steps}", *overrides]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main("train", words)
    return Result(code, out.getvalue(), err.getvalue(), run_directory(resolve("train", words)[0]))
