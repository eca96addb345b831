"""A configuration as words: whoever pastes them gets the same run."""

import shlex

import numpy as np
import pytest

from permlab.config.compose import resolve_train
from permlab.config.words import command, words
from permlab.run.companion import companion_plan

ORDER = {"order": np.arange(64)[::-1]}


@pytest.mark.parametrize(
    "given",
    [
        ["paths.runs=a folder/b", "seed=3", "logger.tags=[a,b c]", "optim.lr=0.1", "model.lr=0.2"],
        ["task=prune", "method=reorder", "data.val_fraction=0.1", "trainer.precision=bf16-mixed"],
        ["task=prune", "model=llama_nano", "data=pydocs", "data.sequence_length=32"],
    ],
    ids=["beside", "before", "text"],
)
def test_the_command_of_a_run_and_of_its_companions_gives_the_same_run(given: list[str]) -> None:
    plan, _ = resolve_train(given)
    others = {**plan.task.before(plan), **plan.task.beside(plan, ORDER)}
    assert others
    for each in (plan, *(companion_plan(plan, other) for other in others.values())):
        program, script, *overrides = shlex.split(command(each.config))
        assert (program, script) == ("python", "train.py")
        again, _ = resolve_train(overrides)
        assert (again.directory, again.config) == (each.directory, each.config)


def test_a_schedule_and_a_value_that_reads_like_another_are_kept() -> None:
    plan, _ = resolve_train(["method.temperature={start: 1.0, end: 0.5, kind: cosine}", "logger.project='1e5'"])
    again, _ = resolve_train(words(plan.config))
    assert again.config == plan.config
    assert again.config["logger"]["project"] == "1e5"
