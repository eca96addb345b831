"""The files of a run directory: reading and writing them without torch.

Whoever reads a file here sees its old or its new content, never half of it, so a run may be
killed at any moment. Numbers that JSON cannot hold are written as the strings `nan`, `inf`
and `-inf`, and read back as floats.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from permlab import provenance
from permlab.errors import ConfigError

# Everything that a run writes, and so everything that repeating it may delete.
FILES = ("config.yaml", "provenance.json", "metrics.jsonl", "summary.json", "DONE", "FAILED")
FOLDERS = ("arrays", "figures", "checkpoints", "wandb")

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_rank_zero() -> bool:
    """Whether this process is the one that writes files, from the launchers' environment variables."""
    return all(os.environ.get(name, "0") in ("", "0") for name in _RANK_VARIABLES)


# Life of a run


def start_run(run_dir: Path, config: Mapping[str, Any], *, device: str | None = None) -> None:
    """Create the directory, or open it again, with the configuration and where the code came from.

    Args:
        run_dir: of this run.
        config: complete configuration, plain containers only.
        device: what the run computes on, for the provenance.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for marker in ("DONE", "FAILED"):
        (run_dir / marker).unlink(missing_ok=True)
    write_text(run_dir / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    write_json(run_dir / "provenance.json", provenance.collect(device=device))


def finish_run(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write the final metrics and, last of all, the mark that the run is complete."""
    write_json(run_dir / "summary.json", summary)
    (run_dir / "FAILED").unlink(missing_ok=True)
    write_text(run_dir / "DONE", "")


def fail_run(run_dir: Path, message: str) -> None:
    """Mark the run as failed, with the reason."""
    write_text(run_dir / "FAILED", message.rstrip() + "\n")


def clear_run(run_dir: Path) -> None:
    """Delete what an earlier run left in the directory, and nothing else that may lie there."""
    (run_dir / "DONE").unlink(missing_ok=True)
    for name in FOLDERS:
        if (run_dir / name).is_symlink():
            (run_dir / name).unlink()  # what it points to is not this run's to delete
        elif (run_dir / name).is_dir():
            shutil.rmtree(run_dir / name)
    for name in FILES:
        (run_dir / name).unlink(missing_ok=True)


def is_done(run_dir: Path) -> bool:
    return (run_dir / "DONE").is_file()


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Final metrics of a run.

    Raises:
        ConfigError: naming the file, if it cannot be read.
    """
    path = run_dir / "summary.json"
    try:
        summary = _decode(json.loads(path.read_text()))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}); force=true repeats the run") from error
    wrong = [key for key, value in summary.items() if isinstance(value, bool) or not isinstance(value, (int, float))]
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]} is no number; force=true repeats the run")
    return summary


def read_provenance(run_dir: Path) -> dict[str, Any]:
    """Where a run's code came from and what it ran on; empty where that was not recorded."""
    path = run_dir / "provenance.json"
    return json.loads(path.read_text()) if path.is_file() else {}


# Metrics over time


class MetricsFile:
    """`metrics.jsonl`: one object per step, with everything that was logged for that step.

    A step is the number of optimiser steps done, so that of a checkpoint has its metrics.

    Every call reaches the file at once: while the step stays the same, its line is written
    anew, so a killed run loses at most the values of one call.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._record: dict[str, Any] = {}
        self._offset = 0

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the line of `step`, which starts a new line if it differs from the last one's."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        with self.path.open("r+b") as file:
            if self._record.get("step") != step:
                self._record, self._offset = {"step": step}, file.seek(0, os.SEEK_END)
            self._record |= values
            file.seek(self._offset)
            file.write((_dumps(self._record) + "\n").encode())
            file.truncate()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`, none if there is no file; a last line cut short by a crash is left out.

    Raises:
        ValueError: if another line cannot be read, with its number.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error.reason} at byte {error.start}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            record = _decode(json.loads(line))
            if not isinstance(record["step"], int):
                raise ValueError(f"step is {record['step']!r}")
            records.append(record)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error or type(error).__name__}") from error
    return records


def truncate_metrics(run_dir: Path, step: int) -> None:
    """Drop what was logged after `step`, before a run resumes there.

    Args:
        run_dir: of the run; nothing happens where it has no metrics yet.
        step: optimiser steps that the checkpoint has behind it.
    Raises:
        ConfigError: naming the line that cannot be read.
    """
    path = run_dir / "metrics.jsonl"
    if path.is_file():
        try:
            records = read_metrics(run_dir)
        except ValueError as error:
            raise ConfigError(f"{error}; repair the line, or force=true repeats the run") from error
        write_text(path, "".join(_dumps(r) + "\n" for r in records if r["step"] <= step))


# Atomic writing


def write_text(path: Path, text: str) -> None:
    _write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON; NumPy and torch scalars and arrays become numbers and lists."""
    write_text(path, _dumps(value, indent=2) + "\n")


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays of numbers or text, compressed."""
    _write(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors in plain containers, as `torch.load(weights_only=True)` reads them."""
    import torch  # the other files of a run are written and read without it

    _write(path, lambda file: torch.save(dict(state), file))


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# Strict JSON


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_encode(value), allow_nan=False, indent=indent)


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if hasattr(value, "tolist"):
        return _encode(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def _decode(record: dict[str, Any]) -> dict[str, Any]:
    return {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}
