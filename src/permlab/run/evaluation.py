"""A finished run tested again, exported or uploaded."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from permlab.config.plan import Plan
from permlab.config.schema import components, constant
from permlab.config.suite import harness_tasks
from permlab.errors import ConfigError
from permlab.figure.draw import draw_all
from permlab.record.checkpoint import load_weights
from permlab.record.pulse import Pulse
from permlab.record.rundir import write_json
from permlab.record.stored import read_plan
from permlab.record.tracking import replay
from permlab.run import trainer as lightning
from permlab.run.assembly import Assembly, assemble
from permlab.run.companion import companion_directory
from permlab.task.learner import Learner, Summary


def evaluate(config: Mapping[str, Any]) -> Summary:
    """Test the picked checkpoint of a finished run again and print its numbers.

    Args:
        config: `run`, a run directory; `split`; `export`, a folder to write the model to, or None;
            `sparse`, whether to time it as semi-structured; `tasks` of lm-evaluation-harness, or None, whose
            results join the summary, and `limit`, samples of each, or None; `figures`, whether to draw the run's
            pictures anew; `upload`, whether to send its files to W&B.
    Raises:
        ConfigError: if the run's checkpoint or dataset cannot be read, or export or upload fail.
    """
    run_dir = Path(config["run"])
    plan = read_plan(run_dir)
    if config["export"] and not plan.task.exports:
        able = " or ".join(name for name in components("task") if constant("task", name, "exports"))
        raise ConfigError(
            f"export={config['export']}: run {run_dir} has nothing to export; export a run of task={able}"
        )
    lightning.quiet_lightning()
    parts = assemble(_without_pretrained(plan))
    lightning.set_threads(plan, parts.model)
    with Pulse("test"):
        summary = evaluate_best(_in_one_process(plan), parts, split=config["split"])
    if config["tasks"]:
        summary |= _measure(config, plan, parts)
    for name, value in summary.items():
        print(f"{name:<28} {value:.8g}")
    if config["export"]:
        before = {name: companion_directory(plan, c) for name, c in plan.task.before(plan).items()}
        with Pulse("export"):
            parts.learner.export(Path(config["export"]), plan, parts.data, before, sparse=config["sparse"])
    if config["figures"]:
        for path in draw_all(run_dir):
            print(f"picture: {path}")
    if config["upload"]:
        _upload(run_dir)
    print(f"run: {run_dir}")
    return summary


def _measure(config: Mapping[str, Any], plan: Plan, parts: Assembly) -> Summary:
    """Results of lm-evaluation-harness, which the run's summary keeps."""
    from permlab.run.harness import measure

    device = "cpu" if plan.config["trainer"]["accelerator"] == "cpu" or not torch.cuda.is_available() else "cuda"
    tasks = harness_tasks(config["tasks"])
    with Pulse("tasks"):
        found = measure(parts.learner.model, parts.data.load_tokenizer(), tasks, limit=config["limit"], device=device)
    path = plan.directory / "summary.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | found)
    return found


def evaluate_best(plan: Plan, parts: Assembly, *, split: str = "test") -> Summary:
    """Metrics of a run's `checkpoints/best.ckpt`, on `test` or `val`.

    Raises:
        ConfigError: if the checkpoint cannot be read or is another model's.
    """
    load_weights(plan.directory / "checkpoints" / "best.ckpt", *parts.learner.tested())
    return lightning.run_test(lightning.testing_trainer(plan), parts, split=split)


def load_learner(run_dir: Path) -> Learner:
    """A finished run's learner with the weights that were picked, in evaluation mode.

    Raises:
        ConfigError: if a file of the run cannot be read.
    """
    parts = assemble(_without_pretrained(read_plan(run_dir)))
    load_weights(run_dir / "checkpoints" / "best.ckpt", *parts.learner.tested())
    return parts.learner.eval()


def _in_one_process(plan: Plan) -> Plan:
    """Wherever the run was trained: its ranks would each print."""
    accelerator = "cpu" if plan.config["trainer"]["accelerator"] == "cpu" else "auto"
    alone = {"accelerator": accelerator, "strategy": "auto", "devices": 1, "num_nodes": 1}
    return replace(plan, config={**plan.config, "trainer": plan.config["trainer"] | alone})


def _without_pretrained(plan: Plan) -> Plan:
    """A plan of a model whose weights are about to be loaded from a run: no others are fetched before."""
    model = plan.config["model"]
    given = model.get("pretrained")
    if not given:
        return plan
    return replace(plan, config={**plan.config, "model": model | {"pretrained": False if given is True else None}})


def _upload(run_dir: Path) -> None:
    try:
        count = replay(run_dir)
    except Exception as error:  # of the network, the account or W&B itself; the run's files are untouched
        raise ConfigError(f"upload=true: {type(error).__name__}: {error}") from error
    print(f"uploaded {count} rows")
