"""What every task promises, checked for every preset found in conf/task.

A new task is a folder and a YAML: nothing here names a task. Its own YAML says what it is tried on; runs
are cut short, those before and beside them as well.

That two ranks agree at every task is tested in `tests/run/test_ddp.py`.
"""

import functools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from runs import SHORT, Result, StopAt, cut_companions, train

import permlab.run.companion
import permlab.run.outlook
import permlab.run.story
import permlab.run.trainer
from permlab.cli import main
from permlab.config.build import component_class
from permlab.config.check import plan_of
from permlab.config.compose import resolve_train
from permlab.config.plan import Plan
from permlab.config.schema import (
    PACKAGE,
    class_name,
    component_names,
    component_options,
    components,
    constant,
    missing,
)
from permlab.errors import ConfigError
from permlab.option import Option, matches
from permlab.record.rundir import is_done
from permlab.record.stored import read_arrays, read_plan
from permlab.study.finished import find_finished
from permlab.study.report import report
from permlab.study.table import job_table, write_table
from permlab.task.learner import Learner
from permlab.task.metric import Metric
from permlab.task.task import Companion, Task

CONF = Path(__file__).resolve().parents[2] / "conf"
TASKS = sorted(path.stem for path in (CONF / "task").glob("*.yaml"))
STEPS, STOP = 4, 2
# Of every training; `limit_*` are batches.
QUICK = {"max_steps": STEPS, "log_every_n_steps": 1, "limit_val_batches": 2, "limit_test_batches": 2}
WORDS = tuple(f"trainer.{key}={value}" for key, value in QUICK.items() if key != "max_steps")
# Summaries also hold what a machine took for it.
MEASURED = re.compile(r"seconds|memory")

short_companion = cut_companions(permlab.run.companion.companion_plan, QUICK)


@pytest.fixture(scope="module", autouse=True)
def _short_companions() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (permlab.run.companion, permlab.run.outlook, permlab.run.story):
            patch.setattr(module, "companion_plan", short_companion)
        patch.setattr(permlab.run.story, "draw_all", lambda run_dir: [])  # pictures take longer than such a training
        yield


@functools.cache
def _finished(task: str, runs: Path) -> Result:
    result = train(runs, f"task={task}", *WORDS, steps=STEPS)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(params=TASKS)
def finished(request: pytest.FixtureRequest, folder: Path) -> Result:
    """A run of the task, with all that it needs."""
    return _finished(request.param, folder)


def plan_in(result: Result) -> Plan:
    return read_plan(result.run_dir)


def companions(plan: Plan) -> dict[str, dict[str, Companion]]:
    """Runs before and beside a finished run, by name."""
    arrays = read_arrays(plan.directory / "arrays" / "order.npz")
    return {"before": plan.task.before(plan), "beside": plan.task.beside(plan, arrays)}


def outcome(result: Result) -> dict[str, Any]:
    """What a run computed, without what the machine took for it."""
    return {key: value for key, value in result.summary.items() if not MEASURED.search(key)} | {"log": result.log}


def task_class(task: str) -> type[Task]:
    settings = yaml.safe_load((CONF / "task" / f"{task}.yaml").read_text())
    return component_class("task", settings.get("component", task))


def component_of(cls: type[Task]) -> str:
    """Folder of a task's class."""
    return cls.__module__.split(".")[-2]


# What is known before torch is imported


def test_every_task_has_a_preset() -> None:
    for path in sorted((PACKAGE / "task").glob("*/task.py")):
        name = path.parent.name
        assert name in components("task"), f"no preset of {name} is found: {missing('task', name)}"


def wrong_value(option: Option) -> str:
    return next(str(value) for value in (-1, "no_such_value", 0.5) if not matches(value, option.type))


def refused(task: str) -> list[tuple[list[str], list[str]]]:
    """Words that are wrong with a task, and what the message has to name of each."""
    cls = task_class(task)
    options = component_options("task", component_of(cls))
    words = [f"task.{key}={wrong_value(option)}" for key, option in options.items()]
    found = [([*words, "task.no_such_option=1"], [*words, "task.no_such_option=1: unknown key"])]
    strange = [
        data
        for data in components("data")
        if constant("data", data, "kind") not in cls.takes
        and data in component_names("data")
        and "root" not in component_options("data", data)
    ]
    found += [([f"data={data}"], [f"task={task}: takes"]) for data in strange[:1]]
    misfits = [
        method
        for method in components("method")
        if cls.permutes not in (constant("method", method, "permutes") or ("items", "weights"))
        and method in component_names("method")
    ]
    return found + [([f"method={method}"], [f"task={task}", f"method={method}"]) for method in misfits[:2]]


RESOLVE = """
import json, sys
from permlab.config.compose import resolve_train
from permlab.errors import ConfigError

for words in json.loads(sys.stdin.read()):
    try:
        resolve_train(words)
        print("accepted")
    except ConfigError as error:
        print(" ".join(str(error).split()))
print({"torch", "lightning"} & set(sys.modules))
"""


def test_problems_are_found_and_named_without_torch() -> None:
    """Of a task's options, all at once."""
    asked = [(task, words, named) for task in TASKS for words, named in refused(task)]
    given = json.dumps([[f"task={task}", *words] for task, words, _ in asked])
    result = subprocess.run([sys.executable, "-c", RESOLVE], input=given, capture_output=True, text=True, timeout=120)
    *messages, modules = result.stdout.splitlines()
    assert (modules, result.stderr) == ("set()", "")
    assert len(asked) > len(TASKS)
    for (task, words, named), said in zip(asked, messages, strict=True):
        silent = [word for word in named if word not in said]
        assert silent == [], f"task={task} {' '.join(words)}: nothing is said of {', '.join(silent)}, only: {said}"


@pytest.mark.parametrize("task", TASKS)
def test_its_constants_are_literals_that_are_read_without_importing_it(task: str) -> None:
    cls = task_class(task)
    component = component_of(cls)
    for name in ("takes", "permutes"):
        literal = constant("task", component, name)
        assert literal == getattr(cls, name), f"{cls.__name__}.{name} must be written as a literal in the class body"
    kinds = {constant("data", data, "kind") for data in components("data")}
    assert set(cls.takes) <= kinds, f"takes names {', '.join(set(cls.takes) - kinds)}, which is no data set's kind"
    known = ("items", "weights", "nothing")
    assert cls.permutes in known, f"permutes must be one of {', '.join(known)}, not {cls.permutes!r}"


@pytest.mark.parametrize("task", TASKS)
def test_its_learner_is_found_by_name(task: str) -> None:
    cls = task_class(task)
    learner = cls.learner()
    assert cls.__name__ == class_name(component_of(cls)), (
        f"the folder is that of a class {class_name(component_of(cls))}"
    )
    home = cls.__module__.removesuffix("task") + "learner"
    assert learner.__name__ == f"{cls.__name__}Learner", f"{home} must have the class {cls.__name__}Learner"
    assert issubclass(learner, Learner), f"{learner.__name__} must derive from Learner of permlab.task.learner"
    assert learner.__module__ == home, f"{learner.__name__} must be written in {home}"
    has = learner.export is not Learner.export
    assert has == cls.exports, f"exports is {cls.exports}, and {learner.__name__} has an export of its own: {has}"


@pytest.mark.parametrize("task", TASKS)
def test_options_are_attributes(task: str) -> None:
    plan = resolve_train([f"task={task}"])[0]
    for key in component_options("task", plan.config["task"]["component"]):
        kept = getattr(plan.task, key, None) == plan.config["task"][key]
        assert kept, f"the constructor must keep its option {key} as the attribute of that name"


# A run and its companions


def test_a_run_has_its_metric_and_what_its_rows_show(finished: Result) -> None:
    plan = plan_in(finished)
    metric: Metric = plan.task.metric
    for key in (metric.key, plan.task.monitor.validation_key):
        value = finished.summary.get(key, math.nan)
        assert math.isfinite(value), f"a run must end with {key}, a finite number: do make_scores() have that name?"
    shown = {row.key for row in plan.task.rows}
    assert metric.key in shown, f"rows must show the task's metric, {metric.key}"
    absent = shown - finished.summary.keys()
    assert not absent, f"rows show {', '.join(absent)}, which no run produces"
    logged = {key for line in finished.metrics for key in line}
    for title, lines in plan.task.panels:
        if title.startswith(metric.name):
            assert logged & set(lines.values()), f"nothing is logged for the panel {title}"


def test_runs_before_and_beside_are_runs_like_any_other(finished: Result) -> None:
    plan = plan_in(finished)
    key = plan.task.metric.key
    for when, found in companions(plan).items():
        for name, companion in found.items():
            other = short_companion(plan, companion)
            assert plan_of(other.config).directory == other.directory
            assert other.digest != plan.digest, f"{when}: the companion {name} is the run itself"
            assert is_done(other.directory), f"{when}: the companion {name} was not finished"
            if when == "beside":
                summary = Result(0, "", "", other.directory).summary
                joined = finished.summary[f"{key}_{name}"]
                assert joined == summary[key], f"the summary's {key}_{name} must be the companion's {key}"


def test_a_finished_run_is_found_and_nothing_is_written(finished: Result, folder: Path) -> None:
    before = times(folder)
    again = train(folder, f"task={plan_in(finished).config['task']['name']}", *WORDS, steps=STEPS)
    assert again.code == 0, again.err
    assert "finished" in again.out
    assert again.out.splitlines()[-1] == f"run: {finished.run_dir}"
    assert times(folder) == before, "a finished run must be found, not written to again"


def test_a_repeated_run_finds_its_companions_and_computes_the_same(finished: Result, folder: Path) -> None:
    before, first = times(folder), outcome(finished)
    again = train(folder, f"task={plan_in(finished).config['task']['name']}", *WORDS, "force=true", steps=STEPS)
    assert again.code == 0, again.err
    touched = {path for path, time in times(folder).items() if before.get(path) != time}
    assert touched, "force=true must run it again"
    others = {path for path in touched if finished.run_dir not in path.parents}
    assert others == set(), "force=true must leave the companions as they are"
    same = outcome(again) == first
    assert same, f"the same run must compute the same numbers again: {outcome(again)} and {first}"


def times(folder: Path) -> dict[Path, int]:
    """When each file of the runs was written, locks aside."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "lock" not in path.name}


def test_its_evaluation_gives_the_same_numbers(finished: Result, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("eval", [f"run={finished.run_dir}"]) == 0
    printed = dict(re.findall(r"^(test/\S+)\s+(\S+)$", capsys.readouterr().out, flags=re.MULTILINE))
    key = plan_in(finished).task.metric.key
    assert key in printed, f"eval.py must print {key}"
    for name, value in printed.items():
        expected = pytest.approx(finished.summary[name], abs=1e-6, rel=1e-6)
        assert float(value) == expected, (
            f"eval.py must give the run's {name}: does best.ckpt hold all that predict() needs?"
        )


def test_it_has_a_report_and_rows_in_tables(finished: Result, tmp_path: Path) -> None:
    plan = plan_in(finished)
    metric, value = plan.task.metric, finished.summary[plan.task.metric.key]
    text = report(plan, finished.summary)
    assert text.startswith(f"test {metric.name}")
    assert metric.show(value) in text
    for row in plan.task.rows:
        fixed = row.label.partition("{")[0]
        assert fixed in text
    table = write_table([find_finished(plan)], tmp_path / "table")
    names = plan.config
    assert f"## {names['task']['name']}: {names['data']['name']}, {names['model']['name']}" in table
    assert metric.title in table
    assert re.search(rf"^\| {re.escape(plan.task.label(plan))} \| {re.escape(metric.show_mean(value))} \|", table, re.M)
    for row in plan.task.rows:
        assert row.format is None or row.heading in table
    assert (tmp_path / "table.csv").read_text().splitlines()[0].split(",")[:3] == ["section", "row", "seed"]
    job = [f"task={names['task']['name']}"]
    assert metric.show_mean(value) in job_table([job], [plan], [0])


# Resuming


def test_a_stopped_run_resumes_bit_for_bit(finished: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (f"task={plan_in(finished).config['task']['name']}", *WORDS)
    build = permlab.run.trainer._callbacks

    def with_stop(plan: Plan, parts: Any) -> list[L.Callback]:
        is_asked_for = plan.directory.relative_to(tmp_path) == finished.run_dir.relative_to(finished.run_dir.parents[2])
        return [*build(plan, parts), *([StopAt(STOP)] if is_asked_for else [])]

    monkeypatch.setattr(permlab.run.trainer, "_callbacks", with_stop)
    stopped = train(tmp_path, *words, steps=STEPS)
    if not any(key.startswith("train/loss") for line in finished.metrics for key in line):
        assert stopped.code == 0  # there is nothing to train, and so nothing to stop
        return
    assert stopped.code == 143
    assert stopped.err.startswith("error: interrupted")
    assert not (stopped.run_dir / "DONE").exists()
    assert len(stopped.metrics) == STOP
    monkeypatch.setattr(permlab.run.trainer, "_callbacks", build)
    resumed = train(tmp_path, *words, steps=STEPS)
    assert resumed.code == 0, resumed.err
    same = outcome(resumed) == outcome(finished)
    assert same, (
        "a run that was stopped must end like one that was not: is all that training_step() keeps in the state?"
    )
    for name in ("last", "best"):
        ours, theirs = (
            torch.load(run.run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
            for run in (resumed, finished)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for path in (finished.run_dir / "arrays").glob("*.npz"):
        with np.load(path) as theirs, np.load(resumed.run_dir / "arrays" / path.name) as ours:
            assert all(np.array_equal(ours[key], theirs[key]) for key in theirs), path.name


# Options


def others(value: Any) -> list[Any]:
    """Values near one of an option, the first of its type that is refused by no rule being as good as any."""
    if value is None:
        return [2, 0.5]
    if isinstance(value, int):
        return [value // 2, 2 * value, value + 1, 1]
    if isinstance(value, Mapping):  # a schedule; a number is one, too
        return [1.0, 0.5]
    return [value + 0.5, value / 2]


def is_numeric(option: Option) -> bool:
    is_flag = matches(True, option.type)
    return not is_flag and any(matches(value, option.type) for value in (1, 0.5, 2))


NUMERIC = [
    (task, key)
    for task in TASKS
    for key, option in component_options("task", component_of(task_class(task))).items()
    if is_numeric(option)
]


@pytest.mark.parametrize(("task", "key"), NUMERIC)
def test_every_number_does_something_or_is_warned_of(
    task: str, key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or needs another option that the preset does not have, and says so."""
    finished, word = _finished(task, folder), f"task.{key}"
    option = component_options("task", finished.config["task"]["component"])[key]
    monkeypatch.setattr(task_class(task), "beside", lambda *_: {})
    usual, refusals = finished.config["task"][key], []
    for value in (other for other in others(usual) if other != usual and matches(other, option.type)):
        words = [*SHORT, *WORDS, f"task={task}", f"paths.runs={folder}", f"trainer.max_steps={STEPS}"]
        try:
            plan, warnings = resolve_train([*words, f"{word}={value}"])
        except ConfigError as error:
            refusals.append(str(error))
            continue
        if any(warning.startswith(f"{word}={value} has no effect") for warning in warnings):
            return
        permlab.run.story.run_once(plan)
        ours, theirs = outcome(Result(0, "", "", plan.directory)), outcome(finished)
        if any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys()):
            return
    assert refusals, f"{word} does nothing, without a warning: leave it out, or name it in idle(plan)"
    silent = [refusal for refusal in refusals if f"{word}=" not in refusal or "needs" not in refusal]
    assert not silent, f"a refusal must name {word} and what it needs: {silent}"
