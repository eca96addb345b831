"""What a command is going to train, and how long that takes here: said before anything slow. Nothing imports torch."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from permlab.config.check import count_items
from permlab.config.plan import Plan
from permlab.config.schema import constant
from permlab.record.pulse import duration
from permlab.record.rundir import is_done
from permlab.record.stored import UNREADABLE_ARRAYS, read_arrays
from permlab.run.companion import companion_plan
from permlab.task.task import Companion

# Above so many seconds a command says what would make it shorter.
LONG_SECONDS = 3600.0


@dataclass(frozen=True)
class Training:
    """One of the trainings that a command makes.

    Args:
        name: how it is called among them.
        plan: of its run; the order of one that reads in a learned order is not known yet.
        shorten: setting that makes it shorter, or leaves it out.
        alone: whether the schedule is not that of the run that was asked for.
        follows: whether it reads in an order that is not known yet, so that no other job shares it.
    """

    name: str
    plan: Plan
    shorten: str
    alone: bool = False
    follows: bool = False

    @property
    def num_steps(self) -> int | None:
        """Optimiser steps; None where the training is measured in epochs."""
        if not self.plan.task.learns(self.plan):
            return 0
        steps = self.plan.config["trainer"]["max_steps"]
        return steps if steps > 0 else None

    @property
    def effort(self) -> float:
        """Of a step, roughly, to be compared with others of the same model."""
        batch = self.plan.config["data"]["batch_size"] * self.plan.config["trainer"]["accumulate_grad_batches"]
        return self.plan.task.effort * batch

    @property
    def length(self) -> str:
        if self.num_steps == 0:
            return "nothing to train"
        trainer = self.plan.config["trainer"]
        return f"{trainer['max_epochs']} epochs" if self.num_steps is None else f"{self.num_steps:,} steps"


class Outlook:
    """The trainings that a run makes with its companions, those left out that are finished.

    Args:
        plan: of the run that was asked for.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._began = time.monotonic()
        self._key = "trainer.max_steps" if plan.config["trainer"]["max_steps"] > 0 else "trainer.max_epochs"
        # Of a step of a training, in whatever unit they share; `permlab.run.estimate` puts seconds in its place.
        self.step_cost: Callable[[Training], float] = lambda training: training.effort
        self._on = f"on {plan.config['data']['name']} with {plan.config['model']['name']}"

    @cached_property
    def trainings(self) -> list[Training]:
        """In the order in which they are made."""
        return list(_trainings(self.plan, Training(name_of(self.plan), self.plan, self._key)))

    def announce(self) -> str:
        """One line: how many trainings, on what, and which setting says how long each is."""
        count = sum(training.num_steps != 0 for training in self.trainings)
        groups = groupby(self.trainings, self._length)
        each = [f"{' and '.join(training.name for training in group)} ({length})" for length, group in groups]
        return f"{_count(count, 'training')} {self._on}: {', '.join(each)}"

    def _length(self, training: Training) -> str:
        if training.num_steps == 0:
            return training.length
        if training.alone:
            return f"{training.length}, {training.shorten}; {self._key} does not shorten it"
        joint = "; left out by" if "=" in training.shorten else ","
        return f"{training.length}{joint} {training.shorten}"

    def forecast(self, name: str, seconds_per_step: float, num_left: int) -> str:
        """One line: how long a training takes here, and how long all that are left; over an hour, what to change.

        Args:
            name: of the training that is under way.
            seconds_per_step: of it, as measured.
            num_left: its optimiser steps to come.
        """
        this = seconds_per_step * num_left
        names = [training.name for training in self.trainings]
        here = names.index(name) if name in names else len(names)
        whole = time.monotonic() - self._began + this
        for training in self.trainings[here + 1 :]:
            steps = num_left if training.num_steps is None else training.num_steps
            whole += steps * seconds_per_step * self.step_cost(training) / self.step_cost(self.trainings[here])
        line = f"{name}: about {duration(this)} for this training"
        if len(names) > 1:
            line += f", {duration(whole)} for the whole command"
        return line if whole <= LONG_SECONDS else f"{line}; to shorten that, {self.shorter()}"

    def shorter(self) -> str:
        """What to change where the command takes too long."""
        keys = dict.fromkeys(training.shorten for training in self.trainings if training.num_steps != 0)
        return f"change {', '.join(keys) or self._key}, or take a smaller model"


def announce_jobs(plans: Iterable[Plan | None]) -> str:
    """One line: how many trainings so many jobs make together, each of those that several share counted once.

    Args:
        plans: of the jobs; None for one that is refused.
    """
    made: set[object] = set()
    plans = list(plans)
    for index, plan in enumerate(plans):
        for training in Outlook(plan).trainings if plan is not None else []:
            if training.num_steps != 0:
                made.add((index, training.name) if training.follows else training.plan.directory)
    return f"{_count(len(plans), 'job')}, {_count(len(made), 'training')} to make"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def name_of(plan: Plan) -> str:
    """What a training is called that is not another one's companion."""
    return plan.config["task"]["name"]


def _trainings(plan: Plan, this: Training) -> Iterator[Training]:
    """A run's training among those that it needs before, and those beside it, as far as they are to be made."""
    if is_done(plan.directory) and not plan.is_forced:
        return
    for key, companion in plan.task.before(plan).items():
        if companion.run is None:
            yield from _of_companion(plan, key, companion, this)
    yield this
    known = plan.task.beside(plan, {})
    for key, companion in plan.task.beside(plan, _arrays(plan)).items():
        yield from _of_companion(plan, key, companion, this, follows=key not in known)


def _of_companion(
    plan: Plan, key: str, companion: Companion, this: Training, *, follows: bool = False
) -> Iterator[Training]:
    other = companion_plan(plan, companion)
    alone = not {"trainer", "trainer.max_steps"} & set(companion.take)
    name = companion.label or key
    yield from _trainings(other, Training(name, other, companion.shorten or this.shorten, alone, follows))


def _arrays(plan: Plan) -> Mapping[str, Any]:
    """The orders that a run has, or any order of its items in place of one that it is yet to learn."""
    try:
        arrays = read_arrays(plan.directory / "arrays" / "order.npz")
    except UNREADABLE_ARRAYS:
        arrays = {}
    if arrays or plan.task.permutes != "items" or _depends_on_items(plan):
        return arrays
    return {"order": np.arange(count_items(plan))[::-1]}


def _depends_on_items(plan: Plan) -> bool:
    """Whether each input gets an order of its own."""
    settings = plan.config["method"]
    option, values = constant("method", settings["component"], "reads_items") or ("", ())
    return settings.get(option) in values
