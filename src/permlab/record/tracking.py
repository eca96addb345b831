"""Metrics of a run: into its own files, and from there mirrored to Weights & Biases and copied for other readers.

The files are the record that figures, reports and evaluation read. The mirror may fail for any
reason, at any time, and the run goes on without it.
"""

import hashlib
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from permlab.record.copies import STEP, Copy
from permlab.record.provenance import read_provenance
from permlab.record.rundir import MetricsFile, is_done, read_metrics, read_summary

# Seconds. Training waits this long for a server that does not answer, and not longer.
INIT_TIMEOUT = 30.0
FINISH_TIMEOUT = 600.0


class RunLogger(Logger):
    """Lightning's logger of a run: `metrics.jsonl`, W&B as its mirror, and copies.

    Values logged for one step in several calls make one line, and one row in W&B. A step is
    the number of optimiser steps done; metrics that go through `LightningModule.log` arrive
    with Lightning's own number, which is one less. Only rank 0 writes.

    Args:
        run_dir: of the run; the W&B files go there too.
        config: complete configuration, plain containers only.
        mode: `offline` (files that `wandb sync` uploads later), `online`, or `disabled`.
        project, entity, tags, group, job_type: where W&B files the run.
        log_artifacts: upload the checkpoints when online.
        copies: further formats, see `permlab.record.copies`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: Mapping[str, Any],
        mode: str,
        project: str,
        entity: str | None,
        tags: Sequence[str],
        log_artifacts: bool,
        group: str,
        job_type: str,
        copies: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.run_dir = run_dir
        settings = {"project": project, "entity": entity, "tags": list(tags), "group": group, "job_type": job_type}
        self.mirror = Mirror(run_dir, mode=mode, config=config, **settings)
        self.copies = [Copy(run_dir, name, config) for name in copies]
        self._uploads = log_artifacts and mode == "online"
        self._file = MetricsFile(run_dir / "metrics.jsonl")
        self._row: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self.run_dir.parent.name

    @property
    def version(self) -> str:
        return self.run_dir.name

    @property
    def save_dir(self) -> str:
        return str(self.run_dir)

    @property
    def log_dir(self) -> str:
        return str(self.run_dir)

    @property
    def line(self) -> str:
        """What `metrics.jsonl` says of the newest step."""
        return self._file.line

    @rank_zero_only
    def sync(self) -> None:
        """Make the metrics outlast a failure of the machine."""
        self._file.sync()

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` is written when the run starts."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add values to the line of a step."""
        if step is None:
            raise ValueError(f"metrics {sorted(metrics)} need a step")
        if self._row.get(STEP) != step:
            self._mirror_row()
        self._row |= {STEP: step, **metrics}
        self._file.update(step, metrics)

    @rank_zero_only
    def mirror_results(self, summary: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """Send final metrics, figures and, if wanted, checkpoints to W&B, and end its run."""
        self._mirror_row()
        self.mirror.log_figures(figures)
        if self._uploads:
            self.mirror.log_checkpoints(sorted((self.run_dir / "checkpoints").glob("*.ckpt")))
        self.mirror.end(summary)
        for copy in self.copies:
            copy.end(summary)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Lightning calls this when it is done or has failed; after success, results may still follow."""
        self._mirror_row()
        if status != "success":
            self.mirror.end({}, exit_code=1)
            for copy in self.copies:
                copy.end({})

    def _mirror_row(self) -> None:
        if self._row:
            readers: list[Any] = [self.mirror, *self.copies]
            for copy in readers:
                copy.log(self._row)
            self._row = {}


class Mirror:
    """One W&B run, which starts with the first row and ends for good with the first failure.

    A failure of any kind, a missing package or account or network included, is one warning.
    """

    def __init__(self, run_dir: Path, *, mode: str, **settings: Any) -> None:
        self.run_dir, self.settings, self.mode = run_dir, settings, mode
        self.ended = mode == "disabled"
        self._run: Any = None

    def log(self, row: Mapping[str, Any]) -> None:
        self._attempt(lambda run: run.log(dict(row)))

    def log_figures(self, paths: Sequence[Path]) -> None:
        if paths:
            self._attempt(lambda run: run.log(_images(paths)))

    def log_checkpoints(self, paths: Sequence[Path]) -> None:
        if paths:
            self._attempt(lambda run: run.log_artifact(_artifact(self.run_dir, paths)))

    def end(self, summary: Mapping[str, Any], *, exit_code: int = 0) -> None:
        """End the run; a second call does nothing, and neither does one where nothing was logged."""
        if self._run is None:
            return

        def end(run: Any) -> None:
            run.summary.update(dict(summary))
            run.finish(exit_code=exit_code)

        self._attempt(end)
        self.ended, self._run = True, None

    def _attempt(self, action: Callable[[Any], Any]) -> None:
        if self.ended:
            return
        try:
            if self._run is None:
                self._run = start_wandb(self.run_dir, mode=self.mode, **self.settings)
            action(self._run)
        except Exception as error:  # whatever it is: tracking may fail, training may not
            self.ended, self._run = True, None
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(
                f"W&B ({self.mode}) stopped with {type(error).__name__}: {reason}; "
                f"the run goes on, its record is in {self.run_dir}",
                stacklevel=2,
            )


def start_wandb(
    run_dir: Path, *, mode: str, config: Mapping[str, Any], run_id: str | None = None, **settings: Any
) -> Any:
    """Start a W&B run with its files in the run directory; never asks for anything.

    Args:
        run_dir: of the run.
        mode: `offline` or `online`.
        config: plain containers; the run's provenance joins them.
        run_id: resume the run of this name if the server has it.
        settings: project, entity, tags, group, job_type.
    Raises:
        PermissionError: if online without a stored account.
        ImportError, wandb.Error: from W&B itself.
    """
    import wandb  # a second, which a run without W&B need not wait

    # Without this, `init` would ask for a key at a terminal.
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise PermissionError("not logged in; run `wandb login` or set WANDB_API_KEY")
    run = wandb.init(
        mode=mode,  # type: ignore[arg-type]
        dir=run_dir,
        config={**config, "provenance": read_provenance(run_dir)},
        name=f"{run_dir.parent.name}/{run_dir.name}",
        id=run_id,
        resume="allow" if run_id else None,
        reinit="create_new",
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
        ),
        **settings,
    )
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    return run


def _images(paths: Sequence[Path]) -> dict[str, Any]:
    import wandb

    return {f"figure/{path.stem}": wandb.Image(str(path)) for path in paths}


def _artifact(run_dir: Path, paths: Sequence[Path]) -> Any:
    import wandb

    artifact = wandb.Artifact(f"{run_dir.parent.name}-{run_dir.name}".replace("=", "-"), type="model")
    for path in paths:
        artifact.add_file(str(path))
    return artifact


def replay(run_dir: Path) -> int:
    """Upload a finished run from its files; a second time, or after a break, only what is missing.

    For runs tracked offline and then interrupted and resumed, whose several W&B directories do
    not merge into one run. The W&B name of the run is a digest of its files, and rows reach the
    server in the order of `metrics.jsonl`, so the number of rows it has says where to go on.

    Args:
        run_dir: a run directory with a `DONE`.
    Returns:
        Number of rows uploaded.
    Raises:
        ValueError: if the run is not finished.
        PermissionError, ImportError, wandb.Error: if W&B cannot be reached.
    """
    if not is_done(run_dir):
        raise ValueError(f"{run_dir} is no finished run")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    settings = {key: config["logger"][key] for key in ("project", "entity", "tags")}
    group, job_type = run_dir.resolve().name.rpartition("-")[2], config["task"]["name"]
    rows = read_metrics(run_dir)
    run = start_wandb(
        run_dir, mode="online", config=config, run_id=_digest(run_dir), group=group, job_type=job_type, **settings
    )
    sent = run.step
    for row in rows[sent:]:
        run.log({STEP: row.pop("step"), **row})
    figures = sorted((run_dir / "figures").glob("*.png"))
    if figures and sent <= len(rows):
        run.log(_images(figures))
    run.summary.update(read_summary(run_dir))
    run.finish()
    return len(rows[sent:])


def _digest(run_dir: Path) -> str:
    content = hashlib.sha256()
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        path = run_dir / name
        content.update(path.read_bytes() if path.is_file() else b"")
        content.update(b"\0")
    return content.hexdigest()[:16]
