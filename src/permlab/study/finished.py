"""Finished runs of a study: those whose files lie here, and those that its results say have been run elsewhere.

A study may take longer than one machine is to be had. `results/<study>.jsonl` has a line for each of
its runs, with everything that its table is made of; a run with a line there need not be run again.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permlab.config.plan import Plan
from permlab.errors import ConfigError
from permlab.record.provenance import read_provenance
from permlab.record.rundir import decode_numbers, is_done, json_line, read_summary, write_text

# Of a run's provenance, what its line keeps.
KEPT = ("git_sha", "git_dirty", "lock_sha256", "device")

Kept = Mapping[str, Mapping[str, Any]]  # lines by the name of the run


@dataclass(frozen=True)
class Finished:
    """A finished run: its plan, its final metrics, and where its code came from and what it ran on."""

    plan: Plan
    summary: Mapping[str, float]
    provenance: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return self.plan.config["seed"]

    @property
    def name(self) -> str:
        return run_name(self.plan)


def run_name(plan: Plan) -> str:
    """`<task>/<data>-<model>-<method>/seed=<seed>-<hash8>`, the same wherever runs lie."""
    return plan.directory.relative_to(plan.config["paths"]["runs"]).as_posix()


def find_finished(plan: Plan | None, kept: Kept | None = None) -> Finished | None:
    """The run of a plan, if it has been run here, or else elsewhere."""
    if plan is None:
        return None
    if is_done(plan.directory):
        return Finished(plan, read_summary(plan.directory), read_provenance(plan.directory))
    line = (kept or {}).get(run_name(plan))
    return Finished(plan, line["summary"], line["provenance"]) if line else None


def write_kept(runs: Iterable[Finished], path: Path) -> None:
    """Write a line for each run, beside those of other runs that the file has."""
    lines = {**read_kept(path), **{run.name: _kept(run) for run in runs}}
    write_text(path, "".join(json_line({"run": name, **line}) for name, line in sorted(lines.items())))


def _kept(run: Finished) -> dict[str, Any]:
    provenance = {key: run.provenance[key] for key in KEPT if key in run.provenance}
    return {"summary": dict(run.summary), "provenance": provenance}


def read_kept(path: Path) -> Kept:
    """Lines by the name of the run; none where there is no such file.

    Raises:
        ConfigError: naming the line, if it is no run's.
    """
    kept: dict[str, Mapping[str, Any]] = {}
    for number, text in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            line = json.loads(text)
            summary = decode_numbers(line["summary"])
            if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in summary.values()):
                raise TypeError
            kept[line["run"]] = {"summary": summary, "provenance": dict(line["provenance"])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: line {number} is not of a run; delete it to have it run again") from error
    return kept
