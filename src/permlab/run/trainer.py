"""Lightning's side of a run: arguments, callbacks, logger, and where training goes on."""

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from permlab.callback.interrupt import keep_signals
from permlab.callback.keep_best import KeepBest
from permlab.callback.measurements import Measurements
from permlab.callback.permutation_log import PermutationLog
from permlab.callback.progress import Progress
from permlab.callback.ranks_agree import RanksAgree
from permlab.callback.resume_random_state import ResumeRandomState
from permlab.callback.save_state import SaveState
from permlab.callback.temperature import Temperature
from permlab.callback.validate_at_end import ValidateAtEnd
from permlab.config.plan import Plan
from permlab.config.schema import EXTRA_TRAINER_KEYS
from permlab.errors import ConfigError
from permlab.record.checkpoint import LAST, CheckpointFiles, State, find_damage, newest_state, read_state
from permlab.record.rundir import is_rank_zero
from permlab.record.tracking import RunLogger
from permlab.run.assembly import Assembly
from permlab.run.strategy import ShardedBackbone
from permlab.task.learner import Learner, Summary

# Parameters; below this one thread is fastest.
SMALL_MODEL = 10_000

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
PROFILE = "profile"
# Of a profile, which begins with what took longest, this much is printed.
PROFILE_LINES = 20

# Lightning's remarks that are no news here: how it logs, that a resumed run's folder has files, that
# frozen weights are not trained, and that values be shared which are metrics of all ranks already.
EXPECTED_WARNINGS = (
    ".*is deprecated, use `isinstance.treespec, TreeSpec.*",
    "The number of training batches .* is smaller than the logging interval.*",
    "Checkpoint directory .* exists and is not empty.*",
    "Found .* module.* in eval mode at the start of training.*",
    r"It is recommended to use `self.log\(.*, sync_dist=True\)` when logging on epoch level.*",
)


def quiet_lightning() -> None:
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def set_threads(plan: Plan, model: torch.nn.Module) -> None:
    """On small tensors, threads cost more than they give: on a busy machine a hundred times more."""
    count = plan.config["num_threads"]
    if count is None and sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        count = 1
    if count is not None:
        torch.set_num_threads(count)


def trainer_arguments(plan: Plan) -> dict[str, Any]:
    """Arguments of `lightning.Trainer` from the group `trainer`."""
    arguments = {key: value for key, value in plan.config["trainer"].items() if key not in EXTRA_TRAINER_KEYS}
    arguments.setdefault("enable_model_summary", False)
    if isinstance(arguments["val_check_interval"], int):
        arguments.setdefault("check_val_every_n_epoch", None)  # count batches across epochs
    return arguments


def check_trainer(plan: Plan) -> None:
    """Let Lightning look at its arguments before anything is written.

    Raises:
        ConfigError: with what it says.
    """
    arguments = trainer_arguments(plan) | {"enable_progress_bar": False}
    try:
        L.Trainer(**arguments, logger=False, enable_checkpointing=False, use_distributed_sampler=False)
    except Exception as error:  # its checks and torch's raise many kinds
        raise ConfigError(f"trainer: {type(error).__name__}: {error}") from error


def make_trainer(**arguments: Any) -> L.Trainer:
    trainer = L.Trainer(**arguments, use_distributed_sampler=False)
    keep_signals(trainer)
    return trainer


def training_trainer(plan: Plan, parts: Assembly, logger: RunLogger, saving: SaveState, display: Progress) -> L.Trainer:
    """The trainer of a run, with all that records it."""
    shown = [display] if plan.config["trainer"].get("enable_progress_bar", True) else []
    arguments = trainer_arguments(plan)
    if arguments["strategy"] == "fsdp":
        arguments["strategy"] = parts.learner.shards = ShardedBackbone(parts.method)
    return make_trainer(
        **arguments,
        logger=logger,
        callbacks=[*shown, *_callbacks(plan, parts), Measurements(saving), saving],
        plugins=[CheckpointFiles(plan.config["checkpoint"]["keep"])],
        default_root_dir=plan.directory,
        num_sanity_val_steps=0,
        profiler=make_profiler(plan),
    )


def testing_trainer(plan: Plan, **more: Any) -> L.Trainer:
    """A trainer that only tests."""
    arguments = trainer_arguments(plan) | {"enable_progress_bar": False} | more
    return make_trainer(**arguments, logger=False, enable_checkpointing=False)


def make_saving(plan: Plan) -> SaveState:
    when = {key: plan.config["checkpoint"][key] for key in ("every_n_steps", "every_minutes")}
    return SaveState(plan.directory / "checkpoints" / LAST, **when)


def make_logger(plan: Plan) -> RunLogger:
    config = plan.config
    settings = {key: value for key, value in config["logger"].items() if key != "name"}
    job_type = config["task"]["name"]
    return RunLogger(plan.directory, config=dict(config), group=plan.digest, job_type=job_type, **settings)


def make_profiler(plan: Plan) -> Profiler | None:
    """Lightning's profiler, if one is wanted; it writes into the run directory's `profile/`."""
    name = plan.config["trainer"]["profiler"]
    return PROFILERS[name](dirpath=plan.directory / PROFILE, filename=name) if name else None


def print_profile(profiler: Profiler) -> None:
    """Print the first lines of what a profiler, if there is one, has written of the training."""
    paths = sorted(Path(profiler.dirpath).glob("fit-*.txt")) if profiler.dirpath and is_rank_zero() else []
    for path in paths:
        lines = [re.sub(" {3,}", "  ", line) for line in path.read_text().splitlines() if line.strip("-= ")]
        print(*lines[:PROFILE_LINES], f"profile: {path} ({len(lines)} lines)", sep="\n", flush=True)


def _callbacks(plan: Plan, parts: Assembly) -> list[L.Callback]:
    learner, run_dir = parts.learner, plan.directory
    monitor, grid = learner.task.monitor, learner.grid
    common: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": False}
    best = KeepBest(
        dirpath=run_dir / "checkpoints",
        filename=learner.picked,
        monitor=monitor.validation_key,
        mode=monitor.better,
        save_weights_only=True,
        **common,
    )
    return [
        Temperature(),
        ResumeRandomState(),
        PermutationLog(run_dir, grid=grid, mean_image=None if grid is None else parts.data.mean_image()),
        RanksAgree(run_dir),
        ValidateAtEnd(),
        best,
    ]


# Where training goes on


def find_state(plan: Plan, learner: Learner) -> State | None:
    """Where training goes on; damaged files are reported, and put aside so that none counts as a state again.

    Raises:
        ConfigError: if there are states and not one is whole, or the best weights so far are damaged.
    """
    folder = plan.directory / "checkpoints"
    state, damaged = newest_state(folder)
    for path, problem in damaged.items():
        assert state is not None
        if is_rank_zero():
            going_on = f"going on from {state.path.name}, step {state.step}"
            print(f"warning: {path}: {problem}; {going_on}", file=sys.stderr, flush=True)
            path.replace(path.with_name(f"{path.name}.damaged"))
    picked = folder / f"{learner.picked}.ckpt"
    if state is not None and picked.is_file() and (problem := find_damage(picked)):
        raise ConfigError(
            f"checkpoint {picked}: {problem}; it is the best so far and of a step that is gone; "
            "force=true trains again from the start"
        )
    if state is None and plan.config["ckpt_path"]:
        return read_state(Path(plan.config["ckpt_path"]))
    return state


def fit(trainer: L.Trainer, parts: Assembly, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one.

    Raises:
        ConfigError: if the checkpoint is that of another run, or arguments of the trainer do not fit the data.
    """
    try:
        trainer.fit(parts.learner, datamodule=parts.data, ckpt_path=checkpoint, weights_only=True)
        print_profile(trainer.profiler)  # type: ignore[attr-defined]
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if checkpoint is None or parts.learner.started:
            raise
        reason = (str(error).splitlines() or [""])[-1].strip()
        raise ConfigError(f"checkpoint {checkpoint}: is not of this run ({type(error).__name__}: {reason})") from error


def run_test(trainer: L.Trainer, parts: Assembly, *, split: str = "test") -> Summary:
    """Metrics of the learner as it is, on `test` or `val`."""
    trainer.logger = None
    run = trainer.test if split == "test" else trainer.validate
    try:
        run(parts.learner, datamodule=parts.data, verbose=False)
    except MisconfigurationException as error:  # such as a limit that leaves no batch
        raise ConfigError(f"trainer: {error}") from error
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(f"{split}/")}


def statistics(trainer: L.Trainer, parts: Assembly) -> Summary:
    """What a training was: its steps, its parameters, and the best value of what it was picked by."""
    found = {
        "train/steps": float(trainer.global_step),
        "train/skipped": float(parts.learner.guard.num_skipped),
        "model/num_parameters": float(sum(p.numel() for p in parts.model.parameters())),
        "permutation/num_parameters": float(sum(p.numel() for p in parts.method.parameters())),
    }
    if parts.learner.learns:
        best = next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, KeepBest))
        assert best.best_model_score is not None, "the last step is always validated"
        found[parts.learner.task.monitor.validation_key] = float(best.best_model_score)
    return found
