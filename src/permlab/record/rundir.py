"""The files of a run directory: reading and writing them without torch.

Whoever reads a file here sees its old or its new content, never half of it, so a run may be
killed at any moment. Numbers that JSON cannot hold are written as the strings `nan`, `inf`
and `-inf`, and read back as floats.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from permlab.errors import ConfigError, WriteError
from permlab.record import provenance

# Everything that a run writes, and so everything that repeating it may delete.
FILES = ("config.yaml", "provenance.json", "metrics.jsonl", "summary.json", "DONE", "FAILED")
FOLDERS = ("arrays", "figures", "checkpoints", "wandb", "csv", "tensorboard", "profile")
# What `DONE` vouches for.
RESULTS = ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints/best.ckpt")

# What of a line of `metrics.jsonl` was measured, and so differs when a run is repeated or resumed; nothing else does.
MEASURED = ("time/", "memory/")

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_rank_zero() -> bool:
    """Whether this process is the one that writes files, from the launchers' environment variables."""
    return all(os.environ.get(name, "0") in ("", "0") for name in _RANK_VARIABLES)


def check_place(run_dir: Path) -> None:
    """Refuse a run directory that cannot be made, or written to, by making and removing a folder where it would be.

    Raises:
        ConfigError: naming what is in the way.
    """
    place = run_dir
    try:
        place = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
        os.rmdir(tempfile.mkdtemp(prefix=".permlab-", dir=place))
    except OSError as error:
        raise ConfigError(
            f"paths.runs={run_dir.parents[2]}: no folder can be made in {place}: {error.strerror}; "
            "make it writable or free space there, or take another, such as paths.runs=runs"
        ) from error


# Life of a run


def start_run(
    run_dir: Path, config: Mapping[str, Any], *, device: str | None = None, command: str | None = None
) -> None:
    """Create the directory, or open it again, with the configuration and where the code came from.

    Args:
        run_dir: of this run.
        config: complete configuration, plain containers only.
        device: what the run computes on, for the provenance.
        command: that makes this run, for the provenance; None for that of this process.
    """
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        for marker in ("DONE", "FAILED"):
            (run_dir / marker).unlink(missing_ok=True)
        _remove_temporaries(run_dir)
    write_text(run_dir / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    write_json(run_dir / "provenance.json", provenance.collect(device=device, command=command))


def complete_run(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write the final metrics and, last of all, the mark that the run is complete.

    The mark holds the checksums of the results, as `sha256sum --check DONE` reads them.
    """
    write_json(run_dir / "summary.json", summary)
    (run_dir / "FAILED").unlink(missing_ok=True)
    write_text(run_dir / "DONE", checksums(run_dir, RESULTS))


def fail_run(run_dir: Path, message: str) -> None:
    """Mark the run as failed, with the reason, if the directory still takes it."""
    if run_dir.is_dir():
        with suppress(OSError):
            write_text(run_dir / "FAILED", message.rstrip() + "\n")


def checksums(folder: Path, names: Iterable[str]) -> str:
    """A line for each of these files that exists, in the format of `sha256sum`."""
    lines = []
    for name in names:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def _remove_temporaries(run_dir: Path) -> None:
    """Of writes that a kill has cut short."""
    for folder in (run_dir, *(run_dir / name for name in FOLDERS if name != "wandb")):
        for path in folder.glob(".*"):
            if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
                path.unlink(missing_ok=True)


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
        summary = decode_numbers(json.loads(path.read_text()))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}); force=true repeats the run") from error
    wrong = [key for key, value in summary.items() if isinstance(value, bool) or not isinstance(value, (int, float))]
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]} is no number; force=true repeats the run")
    return summary


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

    @property
    def line(self) -> str:
        """What the file says of the newest step; empty before there is one."""
        return _dumps(self._record) + "\n" if self._record else ""

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the line of `step`, which starts a new line if it differs from the last one's."""
        with writing(self.path):
            if not self._record:
                self._open()
            with self.path.open("r+b") as file:
                if self._record.get("step") != step:
                    self._record, self._offset = {"step": step}, file.seek(0, os.SEEK_END)
                self._record |= values
                file.seek(self._offset)
                file.write(self.line.encode())
                file.truncate()

    def sync(self) -> None:
        """Make what was written outlast a failure of the machine."""
        if self._record:
            with writing(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _open(self) -> None:
        """Create the file, or go on with the last line of one that is there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        content = self.path.read_bytes()
        self._offset = content.rstrip(b"\n").rfind(b"\n") + 1
        if content.endswith(b"\n"):
            self._record = json.loads(content[self._offset :])


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
            record = decode_numbers(json.loads(line))
            if not isinstance(record["step"], int):
                raise ValueError(f"step is {record['step']!r}")
            records.append(record)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error or type(error).__name__}") from error
    return records


def reproducible(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a line of metrics is the same when a run is repeated, or resumed: all but what was measured."""
    return {key: value for key, value in record.items() if not key.startswith(MEASURED)}


def truncate_metrics(run_dir: Path, step: int, line: str = "") -> None:
    """Drop what was logged after `step`, before a run resumes there.

    Args:
        run_dir: of the run; nothing happens where it has no metrics yet.
        step: optimiser steps that the checkpoint has behind it.
        line: what the checkpoint remembers of the newest line, which stands in for the file's own.
    Raises:
        ConfigError: naming the line that cannot be read.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return
    try:
        records = read_metrics(run_dir)
    except ValueError as error:
        raise ConfigError(f"{error}; repair the line, or force=true repeats the run") from error
    lines = {record["step"]: _dumps(record) + "\n" for record in records if record["step"] <= step}
    if line:
        lines[json.loads(line)["step"]] = line
    write_text(path, "".join(lines.values()))


# Atomic writing


def write_text(path: Path, text: str) -> None:
    _write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON; NumPy and torch scalars and arrays become numbers and lists."""
    write_text(path, _dumps(value, indent=2) + "\n")


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays of numbers or text, compressed."""
    _write(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def write_checkpoint(path: Path, state: Mapping[str, Any], *, keep: int = 1) -> None:
    """Write tensors in plain containers, as `torch.load(weights_only=True)` reads them.

    The format has a checksum of every part, see `permlab.record.checkpoint`.

    Args:
        path: of the new file.
        state: what it holds.
        keep: of the file and those before it, which become `<stem>-1`, `<stem>-2` and so on.
    """
    import torch  # the other files of a run are written and read without it

    def save(file: IO[bytes]) -> None:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:
            # torch says no more than that something is wrong with the file.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    _write(path, save, before=lambda: _step_back(path, keep))


def older(path: Path, age: int) -> Path:
    """Where the checkpoint lies that was replaced `age` times ago."""
    return path.with_name(f"{path.stem}-{age}{path.suffix}") if age else path


def _step_back(path: Path, keep: int) -> None:
    for age in range(keep - 1, 0, -1):
        if older(path, age - 1).is_file():
            older(path, age - 1).replace(older(path, age))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says of a file into an error that ends the run with one line."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error) from error


def _write(path: Path, write: Callable[[IO[bytes]], Any], before: Callable[[], None] = lambda: None) -> None:
    """Write a temporary file, make sure of it, and put it in the place of the old one.

    Only the file's own folder is created: that of a run that has gone does not come back as an empty one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            before()
            temporary.replace(path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, outlast a failure of the machine, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def json_line(value: Mapping[str, Any]) -> str:
    """Strict JSON on a line of its own."""
    return _dumps(value) + "\n"


def decode_numbers(record: dict[str, Any]) -> dict[str, Any]:
    """What was written as strict JSON, with numbers that are not finite as such."""
    return {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}
