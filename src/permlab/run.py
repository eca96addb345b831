"""The whole story of a run, readable top-down: train, pick, test, and compare with its controls."""

import copy
import fcntl
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from permlab.assembly import Assembly, assemble, load_weights
from permlab.callback.finish import ValidateAtEnd
from permlab.callback.permutation import PermutationLog
from permlab.callback.progress import Progress
from permlab.callback.ranks import RanksAgree, end_ranks
from permlab.callback.resume import ResumeRandomState
from permlab.callback.save import KeepBest, SaveState
from permlab.callback.temperature import Temperature
from permlab.checkpoint import LAST, CheckpointFiles, State, find_damage, newest_state, read_state
from permlab.config import build, digest, run_directory
from permlab.data.module import DataModule
from permlab.dense import data_seed, dense_config, dense_directory, read_config, read_item_order
from permlab.errors import ConfigError, Interrupted
from permlab.figure.draw import draw_all
from permlab.interrupt import STOP, keep_signals, stop_on_signals
from permlab.lock import RunLock
from permlab.provenance import device_name
from permlab.publish import export_run
from permlab.report import print_report
from permlab.rundir import (
    clear_run,
    fail_run,
    finish_run,
    is_done,
    is_rank_zero,
    read_summary,
    start_run,
    truncate_metrics,
    write_json,
    write_npz,
    writing,
)
from permlab.schema import EXTRA_TRAINER_KEYS
from permlab.sparsity.site_methods import SiteMethods
from permlab.strategy import ShardedBackbone
from permlab.task.base import Task
from permlab.task.guard import NonFiniteGuard
from permlab.tracking import RunLogger, replay

# Parameters; below this one thread is fastest.
SMALL_MODEL = 10_000

Config = Mapping[str, Any]
Summary = dict[str, float]

# Lightning's remarks that are no news here: how it logs, that a resumed run's folder has files, and that
# a pruned model is not trained.
EXPECTED_WARNINGS = (
    ".*is deprecated, use `isinstance.treespec, TreeSpec.*",
    "The number of training batches .* is smaller than the logging interval.*",
    "Checkpoint directory .* exists and is not empty.*",
    "Found .* module.* in eval mode at the start of training.*",
)


def train(config: Config) -> Summary:
    """Train, test and compare; write everything into the run directory and print the table.

    Raises:
        ConfigError: before anything is written, if a component refuses its values.
        LockedError: if another process is at work in the run directory.
        NonFiniteError, WriteError, RankError, Interrupted: after the last good state was kept.
    """
    with stop_on_signals():
        summary = run_once(config, announce=True)
    if is_rank_zero():
        print_report(config, summary)
    return summary


def evaluate(config: Config) -> Summary:
    """Test the picked checkpoint of a finished run again and print its numbers.

    Args:
        config: `run`, a run directory; `split`; `export`, a folder to write a pruned model to, or None;
            `sparse`, whether to time it as semi-structured; `upload`, whether to send its files to W&B.
    Raises:
        ConfigError: if the run's checkpoint or dataset cannot be read, or export or upload fail.
    """
    run_dir = Path(config["run"])
    settings = read_config(run_dir)
    _quiet_lightning()
    _, data, task = _build(_without_pretrained(settings))
    _set_threads(settings, task.model)
    # One process, wherever the run was trained: its ranks would each print.
    accelerator = "cpu" if settings["trainer"]["accelerator"] == "cpu" else "auto"
    settings["trainer"] |= {"accelerator": accelerator, "strategy": "auto", "devices": 1, "num_nodes": 1}
    summary = evaluate_best(settings, run_dir, task, data, split=config["split"])
    for name, value in summary.items():
        print(f"{name:<28} {value:.8g}")
    if config["export"]:
        export_run(run_dir, settings, data, Path(config["export"]), sparse=config["sparse"])
    if config["upload"]:
        _upload(run_dir)
    print(f"run: {run_dir}")
    return summary


def _without_pretrained(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose weights are about to be loaded from a run: no others are fetched before."""
    given = config["model"].get("pretrained")
    return (
        config if not given else config | {"model": config["model"] | {"pretrained": False if given is True else None}}
    )


def _upload(run_dir: Path) -> None:
    try:
        count = replay(run_dir)
    except Exception as error:  # of the network, the account or W&B itself; the run's files are untouched
        raise ConfigError(f"upload=true: {type(error).__name__}: {error}") from error
    print(f"uploaded {count} rows")


def run_once(config: Config, *, announce: bool = False) -> Summary:
    """One run, from whatever its directory already holds to a `DONE` with a summary.

    Args:
        config: complete.
        announce: whether this is the run that was asked for; another that works on it is then an
            error, while one that others share (a control, a dense model) is waited for.
    """
    run_dir = run_directory(config)
    if is_done(run_dir) and not config["force"] and not _has_group():
        return read_summary(run_dir)
    _quiet_lightning()
    dense = dense_run(config)
    parts, data, task = _build(config, dense)
    _set_threads(config, parts.model)
    _check_trainer(config)
    if not is_rank_zero():
        _meet()
        done = is_done(run_dir) and not config["force"]
        return read_summary(run_dir) if done else _run_all(config, run_dir, parts, data, task)
    with RunLock(run_dir, wait=not announce):
        _meet()
        if is_done(run_dir) and not config["force"]:
            return read_summary(run_dir)  # by the one that was waited for
        if config["force"]:
            clear_run(run_dir)
        start_run(run_dir, config, device=device_name(config["trainer"]["accelerator"]))
        if announce:
            print(_opening(config, parts), flush=True)
        try:
            with writing(run_dir):
                summary = _run_all(config, run_dir, parts, data, task)
                STOP.check()
                finish_run(run_dir, summary)
        except Interrupted:
            raise
        except BaseException as error:
            fail_run(run_dir, f"{type(error).__name__}: {error}")
            raise
    return summary


def _has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _meet() -> None:
    """Ranks decide by what they see in a folder, so they look when it no longer changes."""
    if _has_group():
        torch.distributed.barrier()


def _run_all(config: Config, run_dir: Path, parts: Assembly, data: DataModule, task: Task) -> Summary:
    """Training, test and controls, or what of them has not been done before."""
    summary = {} if not (run_dir / "summary.json").is_file() else read_summary(run_dir)
    if not any(name.startswith("test/") for name in summary):
        summary = fit_and_test(config, run_dir, parts, data, task)
    if config["task"].get("control"):
        summary |= compare(config, run_dir, summary)
    return summary


def dense_run(config: Config) -> Path | None:
    """Directory of the run whose model is pruned, which is trained here unless it has been before."""
    run_dir = dense_directory(config)
    if run_dir is None or config["task"]["dense"]:
        return run_dir
    if not is_done(run_dir):
        assemble(config)  # refuses what cannot be pruned before the minutes that training takes
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with (run_dir.parent / f".{run_dir.name}.lock").open("w") as lock:
        if is_rank_zero():
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two prunings that want it, one trains and one waits
            print(f"dense model: {'found' if is_done(run_dir) else 'trained once'}, {run_dir}", flush=True)
        run_once(dense_config(config))
    return run_dir


def _build(config: Config, dense: Path | None = None) -> tuple[Assembly, DataModule, Task]:
    """Model, method, data and task of a configuration, everything that can refuse it.

    Args:
        dense: run whose trained weights and item order the model takes over.
    """
    parts = assemble(config)
    data = DataModule(config["data"], data_seed(config))
    task = build("task", config["task"], parts.spec, parts.model, parts.method, config["optim"], config["seed"])
    if dense is not None:
        load_weights(dense / "checkpoints" / "best.ckpt", ("model", parts.model))
        task.read_order.set(read_item_order(dense))
    return parts, data, task


def fit_and_test(config: Config, run_dir: Path, parts: Assembly, data: DataModule, task: Task) -> Summary:
    """Train from the newest whole checkpoint, if any, and test the model that validation picked."""
    state = _resume_from(config, run_dir, task)
    if is_rank_zero():
        truncate_metrics(run_dir, state.step if state else 0, state.line if state else "")
    logger = _logger(config, run_dir)
    arguments = _trainer_arguments(config)
    sharded = arguments["strategy"] == "fsdp"
    if sharded:
        arguments["strategy"] = ShardedBackbone(parts.method)
    saving = SaveState(run_dir / "checkpoints" / LAST, **_when_to_save(config))
    trainer = _trainer(
        **arguments,
        logger=logger,
        callbacks=[*_callbacks(config, run_dir, parts, data, task), saving],
        plugins=[CheckpointFiles(config["checkpoint"]["keep"])],
        default_root_dir=run_dir,
        num_sanity_val_steps=0,
    )
    with end_ranks(trainer):
        task.to(trainer.strategy.root_device)
        task.guard = NonFiniteGuard(
            on_nonfinite=config["trainer"]["on_nonfinite"], max_skips=config["trainer"]["max_skips"]
        )
        task.begin(data)
        L.seed_everything(config["seed"], verbose=False)
        if task.learns:
            _fit(trainer, task, data, state.path if state else None)
        STOP.check()  # an exception that a signal raises in a destructor, say, gets lost
        summary = _statistics(parts, task, trainer)
        summary |= _finish(config, run_dir, task, data, trainer)
        if sharded:
            parts, data, task = _build(config)  # the trained one holds shards, which no checkpoint fits
            trainer = _trainer(**_trainer_arguments(config) | {"strategy": "ddp"})
        summary |= evaluate_best(config, run_dir, task, data, trainer=trainer)
    summary |= data.statistics() | {"train/seconds": round(saving.seconds, 3)}
    if is_rank_zero():
        _write_results(run_dir, parts, task)
        write_json(run_dir / "summary.json", summary)  # last: a run that has it is not trained again
        logger.mirror_results(summary, draw_all(run_dir))
    logger.finalize("success")
    return summary


def _trainer(**arguments: Any) -> L.Trainer:
    trainer = L.Trainer(**arguments, use_distributed_sampler=False)
    keep_signals(trainer)
    return trainer


def _fit(trainer: L.Trainer, task: Task, data: DataModule, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one.

    Raises:
        ConfigError: if the checkpoint is that of another run.
    """
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if checkpoint is None or task.started:
            raise
        reason = (str(error).splitlines() or [""])[-1].strip()
        raise ConfigError(f"checkpoint {checkpoint}: is not of this run ({type(error).__name__}: {reason})") from error


def _finish(config: Config, run_dir: Path, task: Task, data: DataModule, trainer: L.Trainer) -> Summary:
    """What the task makes of its training, and the test of what the result is compared with."""
    if task.permutes != "weights":
        return {}
    if task.learns:
        load_weights(run_dir / "checkpoints" / "picked.ckpt", ("method", task.method))
    task.to(trainer.strategy.root_device)  # which the trainer has left
    summary = task.finish(run_dir)
    trainer.strategy.barrier()
    final = {name: task.model.get_parameter(name).clone() for name in task.variants["dense"]}
    for variant, weights in task.variants.items():
        task.use(weights)
        scores = _test(task, data, trainer)
        summary |= {f"{name}_{variant}": value for name, value in scores.items()}
    task.use(final)
    return summary


def evaluate_best(
    config: Config,
    run_dir: Path,
    task: Task,
    data: DataModule,
    *,
    split: str = "test",
    trainer: L.Trainer | None = None,
) -> Summary:
    """Metrics of the checkpoint that validation picked, on `test` or `val`."""
    load_weights(run_dir / "checkpoints" / "best.ckpt", *task.tested())
    arguments = _trainer_arguments(config) | {"enable_progress_bar": False}
    if trainer is None:
        trainer = _trainer(**arguments, logger=False, enable_checkpointing=False)
    return _test(task, data, trainer, split=split)


def _test(task: Task, data: DataModule, trainer: L.Trainer, *, split: str = "test") -> Summary:
    trainer.logger = None
    run = trainer.test if split == "test" else trainer.validate
    run(task, datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(f"{split}/")}


# Controls


def compare(config: Config, run_dir: Path, summary: Summary) -> Summary:
    """Two more trainings under the same schedule, both with a fixed order, as runs of their own.

    `control` reads in the starting order; `refit` is a fresh model that reads in the learned
    order. Either is reused where a finished run has it. A method whose order depends on the
    image has no single order to refit.
    """
    control = run_once(_with_fixed_order(config, config["method"]["order"]))
    compared = {"test/accuracy_control": control["test/accuracy"]}
    with np.load(run_dir / "arrays" / "order.npz") as arrays:
        order = arrays["order"].tolist() if "order" in arrays else None
    if order is not None:
        refit = run_once(_with_fixed_order(config, order))
        compared["test/accuracy_refit"] = refit["test/accuracy"]
    return compared


def _with_fixed_order(config: Config, order: str | list[int]) -> dict[str, Any]:
    fixed = copy.deepcopy(dict(config))
    fixed["method"] = {"name": "fixed", "component": "fixed", "order": order}
    fixed["task"]["control"] = False
    fixed["force"], fixed["ckpt_path"] = False, None
    return fixed


# Parts of a run


def _quiet_lightning() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _opening(config: Config, parts: Assembly) -> str:
    spec, model = parts.spec, parts.model
    count = sum(parameter.numel() for parameter in model.parameters())
    kind = "tokens" if spec.kind == "text" else "classes"
    size = f"{model.width} tokens" if spec.kind == "text" else f"{model.height}x{model.width} patches"
    line = (
        f"{config['task']['name']}: {config['data']['name']} ({spec.num_classes} {kind}), {config['model']['name']} "
        f"({count:,} parameters) reading {size}, method {config['method']['name']}"
    )
    if isinstance(parts.method, SiteMethods):
        task = config["task"]
        line += f" at {len(parts.method.sites)} sites, {task['n']}:{task['m']}, pruner {task['pruner']}"
        if parts.left_dense:
            line += f"; too narrow for whole {task['m']}s and left dense: {', '.join(parts.left_dense)}"
    return line


def _set_threads(config: Config, model: torch.nn.Module) -> None:
    """On small tensors, threads cost more than they give: on a busy machine a hundred times more."""
    count = config["num_threads"]
    if count is None and sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        count = 1
    if count is not None:
        torch.set_num_threads(count)


def _trainer_arguments(config: Config) -> dict[str, Any]:
    arguments = {key: value for key, value in config["trainer"].items() if key not in EXTRA_TRAINER_KEYS}
    arguments.setdefault("enable_model_summary", False)
    if isinstance(arguments["val_check_interval"], int):
        arguments.setdefault("check_val_every_n_epoch", None)  # count batches across epochs
    return arguments


def _check_trainer(config: Config) -> None:
    """Let Lightning look at its arguments before anything is written.

    Raises:
        ConfigError: with what it says.
    """
    arguments = _trainer_arguments(config) | {"enable_progress_bar": False}
    try:
        L.Trainer(**arguments, logger=False, enable_checkpointing=False, use_distributed_sampler=False)
    except Exception as error:  # its checks and torch's raise many kinds
        raise ConfigError(f"trainer: {type(error).__name__}: {error}") from error


def _callbacks(config: Config, run_dir: Path, parts: Assembly, data: DataModule, task: Task) -> list[L.Callback]:
    folder = run_dir / "checkpoints"
    common: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "save_on_train_epoch_end": False}
    monitor, mode = task.monitor
    best = KeepBest(filename=_picked(task), monitor=monitor, mode=mode, save_weights_only=True, **common)
    items = task.permutes == "items"
    grid = (parts.model.height, parts.model.width) if items else None
    background = data.mean_image() if items and parts.spec.kind == "image" else None
    display = [Progress()] if config["trainer"].get("enable_progress_bar", True) else []
    return [
        *display,
        Temperature(),
        ResumeRandomState(),
        PermutationLog(run_dir, grid=grid, mean_image=background),
        RanksAgree(run_dir),
        ValidateAtEnd(),
        best,
    ]


def _when_to_save(config: Config) -> dict[str, Any]:
    return {key: config["checkpoint"][key] for key in ("every_n_steps", "every_minutes")}


def _logger(config: Config, run_dir: Path) -> RunLogger:
    settings = {key: value for key, value in config["logger"].items() if key != "name"}
    return RunLogger(run_dir, config=dict(config), group=digest(config), job_type=config["task"]["name"], **settings)


def _resume_from(config: Config, run_dir: Path, task: Task) -> State | None:
    """Where training goes on; damaged files are reported, and put aside so that none counts as a state again."""
    folder = run_dir / "checkpoints"
    state, damaged = newest_state(folder)
    for path, problem in damaged.items():
        assert state is not None
        if is_rank_zero():
            going_on = f"going on from {state.path.name}, step {state.step}"
            print(f"warning: {path}: {problem}; {going_on}", file=sys.stderr, flush=True)
            path.replace(path.with_name(f"{path.name}.damaged"))
    picked = folder / f"{_picked(task)}.ckpt"
    if state is not None and picked.is_file() and (problem := find_damage(picked)):
        raise ConfigError(
            f"checkpoint {picked}: {problem}; it is the best so far and of a step that is gone; "
            "force=true trains again from the start"
        )
    if state is None and config["ckpt_path"]:
        return read_state(Path(config["ckpt_path"]))
    return state


def _picked(task: Task) -> str:
    """What pruning picks are orders; its `best` is the model that it makes of them."""
    return "picked" if task.permutes == "weights" else "best"


def _statistics(parts: Assembly, task: Task, trainer: L.Trainer) -> Summary:
    statistics = {
        "train/steps": float(trainer.global_step),
        "train/skipped": float(task.guard.num_skipped),
        "model/num_parameters": float(sum(p.numel() for p in parts.model.parameters())),
        "permutation/num_parameters": float(sum(p.numel() for p in parts.method.parameters())),
    }
    checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    picked = next(callback for callback in checkpoints if callback.monitor)
    if task.learns:
        assert picked.best_model_score is not None, "the last step is always validated"
        statistics[task.monitor[0]] = float(picked.best_model_score)
    return statistics


def _write_results(run_dir: Path, parts: Assembly, task: Task) -> None:
    """The picked order and the confusion matrix, for figures, refits and reports."""
    method = parts.method
    if isinstance(method, SiteMethods):
        return
    arrays = {"start_order": method.start_order.cpu().numpy()}
    if not method.needs_items:
        arrays["order"] = method.best().cpu().numpy()
    write_npz(run_dir / "arrays" / "order.npz", **arrays)
    counts = getattr(task, "confusion_counts", None)
    if counts is not None:
        write_npz(run_dir / "arrays" / "confusion.npz", confusion=counts.cpu().numpy())
