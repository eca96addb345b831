"""The whole story of a run, readable top-down: claim, before, assemble, fit, finish, test, beside, write."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import lightning as L
import torch

from permlab.callback.interrupt import STOP, stop_on_signals
from permlab.callback.lifeline import end_ranks
from permlab.callback.progress import Progress
from permlab.config.plan import Plan
from permlab.config.words import command
from permlab.errors import Interrupted
from permlab.figure.draw import draw_all
from permlab.record.checkpoint import load_weights
from permlab.record.lock import RunLock
from permlab.record.provenance import device_name
from permlab.record.pulse import Pulse, say
from permlab.record.rundir import (
    clear_run,
    complete_run,
    fail_run,
    is_done,
    is_rank_zero,
    read_summary,
    start_run,
    truncate_metrics,
    write_checkpoint,
    write_json,
    write_npz,
    writing,
)
from permlab.record.stored import read_arrays
from permlab.run import trainer as lightning
from permlab.run.assembly import Assembly, assemble, opening, place
from permlab.run.companion import companion_plan, keep_beside, shared
from permlab.run.estimate import foretold
from permlab.run.known import known_numbers
from permlab.run.outlook import Outlook, name_of
from permlab.study.report import print_report
from permlab.task.learner import Result, Summary


def train(plan: Plan) -> Summary:
    """Train, test and compare; write everything into the run directory and print the report.

    Raises:
        ConfigError: before anything is written, if a component refuses its values.
        LockedError: if another process is at work in the run directory.
        NonFiniteError, WriteError, RankError, Interrupted: after the last good state was kept.
    """
    with stop_on_signals():
        summary = run_once(plan, foretold(plan), announce=True)
    if is_rank_zero():
        print_report(plan, summary)
    return summary


def run_once(plan: Plan, outlook: Outlook | None = None, name: str = "", *, announce: bool = False) -> Summary:
    """One run, from whatever its directory already holds to a `DONE` with a summary.

    Args:
        outlook: on all trainings of the command, of which this one has the name; None where it is the first.
        announce: whether this is the run that was asked for; another that works on it is then an
            error, while one that others share (a companion) is waited for.
    """
    run_dir, outlook, name = plan.directory, outlook or Outlook(plan), name or name_of(plan)
    if _is_over(plan) and not _has_group():
        return read_summary(run_dir)
    lightning.quiet_lightning()
    before = _run_before(plan, outlook)
    parts = assemble(plan, before)
    display = Progress(name=name, forecast=partial(outlook.forecast, name))
    lightning.set_threads(plan, parts.model)
    lightning.check_trainer(plan)
    if not is_rank_zero():
        _meet()
        return read_summary(run_dir) if _is_over(plan) else _tell(plan, parts, before, outlook, display)
    with RunLock(run_dir, wait=not announce):
        _meet()
        if _is_over(plan):
            return read_summary(run_dir)  # by the one that was waited for
        if plan.is_forced:
            clear_run(run_dir)
        where = {"device": device_name(plan.config["trainer"]["accelerator"])}
        start_run(run_dir, plan.config, **where, command=None if announce else command(plan.config))
        if announce:
            say(opening(plan, parts))
        try:
            with writing(run_dir):
                summary = _tell(plan, parts, before, outlook, display)
                STOP.check()
                complete_run(run_dir, summary)
        except Interrupted:
            raise
        except BaseException as error:
            if STOP.received:  # a library took the interruption for an error of its own
                raise Interrupted(STOP.received) from error
            fail_run(run_dir, f"{type(error).__name__}: {error}")
            raise
    return summary


def _is_over(plan: Plan) -> bool:
    return is_done(plan.directory) and not plan.is_forced


def _has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _meet() -> None:
    """Ranks decide by what they see in a folder, so they look when it no longer changes."""
    if _has_group():
        torch.distributed.barrier()


def _run_before(plan: Plan, outlook: Outlook) -> dict[str, Path]:
    """Directories of the runs that this one needs, each trained here unless it has been before."""
    found = {}
    for name, companion in plan.task.before(plan).items():
        if companion.run is not None:
            found[name] = companion.run
            continue
        other = companion_plan(plan, companion)
        if not is_done(other.directory):
            place(plan)  # refuses what cannot be done before the minutes that training takes
        with shared(other.directory, companion.label):
            run_once(other, outlook, companion.label or name)
        found[name] = other.directory
    return found


def _tell(plan: Plan, parts: Assembly, before: Mapping[str, Path], outlook: Outlook, display: Progress) -> Summary:
    """Training, test and runs beside, or what of them has not been done before."""
    run_dir = plan.directory
    summary = read_summary(run_dir) if (run_dir / "summary.json").is_file() else {}
    if plan.task.metric.key not in summary:
        summary = _fit_and_finish(plan, parts, before, display)
    _meet()  # what the first rank has written decides which runs follow
    key, order = plan.task.metric.key, read_arrays(run_dir / "arrays" / "order.npz")
    beside: dict[str, Plan] = {}
    for name, companion in plan.task.beside(plan, order).items():
        beside[name] = companion_plan(plan, companion)
        summary[f"{key}_{name}"] = run_once(beside[name], outlook, companion.label or name)[key]
    keep_beside(plan, beside, summary)
    return summary


def _fit_and_finish(plan: Plan, parts: Assembly, before: Mapping[str, Path], display: Progress) -> Summary:
    """Train from the newest whole checkpoint, if any, and let the task finish what validation picked."""
    run_dir, learner = plan.directory, parts.learner
    state = lightning.find_state(plan, learner)
    if is_rank_zero():
        truncate_metrics(run_dir, state.step if state else 0, state.line if state else "")
    saving = lightning.make_saving(plan)
    logger = lightning.make_logger(plan)
    trainer = lightning.training_trainer(plan, parts, logger, saving, display)
    with end_ranks(trainer):
        learner.to(trainer.strategy.root_device)
        learner.known = known_numbers(plan, trainer)
        with Pulse("preparation"):
            learner.prepare(parts.data, before)
        L.seed_everything(plan.config["seed"], verbose=False)
        if learner.learns:
            lightning.fit(trainer, parts, state.path if state else None)
        STOP.check()  # an exception that a signal raises in a destructor, say, gets lost
        summary = lightning.statistics(trainer, parts)
        with Pulse("finish"):
            result = _finish(plan, parts, trainer)
    summary |= result.summary | parts.data.statistics() | {"train/seconds": round(saving.seconds, 3)}
    if is_rank_zero():
        _write(run_dir, result)
        write_json(run_dir / "summary.json", summary)  # last: a run that has it is not trained again
        with Pulse("figures"):
            logger.mirror_results(summary, draw_all(run_dir) if plan.config["figures"] else [])
    logger.finalize("success")
    return summary


def _finish(plan: Plan, parts: Assembly, trainer: L.Trainer) -> Result:
    """What the task makes of the checkpoint that validation picked."""
    if parts.learner.shards is not None:
        parts = assemble(plan)  # the trained one holds shards, which no checkpoint fits
        trainer = lightning.testing_trainer(plan, strategy="ddp")
    learner = parts.learner
    if learner.learns:
        load_weights(plan.directory / "checkpoints" / f"{learner.picked}.ckpt", *learner.learned())
    learner.to(trainer.strategy.root_device)  # which the trainer has left
    return learner.finish(lambda: lightning.run_test(trainer, parts))


def _write(run_dir: Path, result: Result) -> None:
    for stem, arrays in result.arrays.items():
        write_npz(run_dir / "arrays" / f"{stem}.npz", **arrays)
    if result.state is not None:
        write_checkpoint(run_dir / "checkpoints" / "best.ckpt", {"state_dict": dict(result.state)})
