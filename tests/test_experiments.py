"""Experiment files against what they promise: commands that run, and rows that the papers have."""

import math
import re
import shlex
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from permlab.config.build import build
from permlab.config.check import checked
from permlab.config.compose import compose_config
from permlab.config.plan import Plan
from permlab.config.schema import CONF, added_later, component_names
from permlab.model.base import Backbone
from permlab.study.grid import expand
from permlab.task.prune.sites import fitting_sites

EXPECTED = yaml.safe_load((CONF.parent / "results" / "expected.yaml").read_text())
NUMBERS = EXPECTED["numbers"]
NAMES = component_names("experiment")
COMPARED = [name for name in NAMES if name.split("/")[0] in EXPECTED["sources"]]

METHODS = {
    **{"fixed": "unpermuted", "swap_search": "channel_permutation", "deal_and_match": "channel_permutation"},
    **{"sinkhorn": "learned", "sinkhorn_ste": "learned"},
}
# Weights of cross-entropy and distillation that are not zero.
LOSSES = {(True, False): "cross_entropy", (False, True): "distillation", (True, True): "both"}


@dataclass(frozen=True)
class Job:
    """One run of a command in a header, and the tables that the command is said to be for."""

    words: tuple[str, ...]
    tables: tuple[str, ...]
    plan: Plan
    warnings: list[str]


def header(name: str, field: str) -> list[str]:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    return re.findall(rf"^# {field}: (.*)", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What validation asks of a dataset's folder, whatever its kind."""
    root = tmp_path_factory.mktemp("data")
    for name in ("imagenet", "fmow", "c4_wikitext2", "wikitext2"):
        for split in ("train", "val", "test"):
            for label in ("one", "two"):
                (root / name / split / label).mkdir(parents=True)
                (root / name / split / label / "image.png").touch()
            (root / name / f"{split}.txt").write_text("text")
    (root / "mnist").mkdir()
    for part, count in (("train", 6000), ("t10k", 100)):  # the sizes of images, and labels
        sizes = struct.pack(">BBBB3I", 0, 0, 8, 3, count, 28, 28)
        (root / "mnist" / f"{part}-images-idx3-ubyte").write_bytes(sizes)
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, count) + bytes(index % 10 for index in range(count))
        (root / "mnist" / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return root


@cache
def jobs(name: str, root: Path) -> list[Job]:
    found = []
    for command in header(name, "Command"):
        line, _, tables = command.partition("  # ")
        words = shlex.split(line)[2:] if line.startswith("python train.py ") else [f"experiment={name}"]
        words = [word.replace("data.root=data/", f"data.root={root}/") for word in words]
        assert ("-m" in words) == (len(expand([word for word in words if word != "-m"])) > 1), command
        for job in _chosen(expand([word for word in words if word != "-m"]), every=bool(tables)):
            composed, problems = compose_config("train", [*job, f"paths.data={root}"])
            assert not problems, problems
            plan, warnings = checked(composed)
            found.append(Job(tuple(job), tuple(tables.split()), plan, warnings))
    return found


def _chosen(all_jobs: list[list[str]], *, every: bool) -> Iterator[list[str]]:
    """All jobs, or enough of them to see every value of every key but the seed."""
    seen: set[str] = set()
    for job in all_jobs:
        new = {word for word in job if not word.startswith("seed=")} - seen
        if every or new:
            seen |= new
            yield job


# Commands


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_of_their_own_file_and_valid(name: str, data: Path) -> None:
    for command in header(name, "Command"):
        if command.startswith("make "):
            target = command.removeprefix("make ").split()[0]
            assert re.search(rf"^{target}:", (CONF.parent / "Makefile").read_text(), flags=re.MULTILINE), command
        else:
            assert command.startswith("python train.py ")
            assert f"experiment={name}" in command.split()
    for job in jobs(name, data):
        assert "experiment" not in job.plan.config
        # A sweep over methods sets keys that some of them do not have.
        method_is_swept = any(word.startswith("method=") for word in job.words)
        assert [w for w in job.warnings if not (method_is_swept and w.startswith("method."))] == [], job.words


def test_reorders_released_code_is_its_experiment_but_for_defects_that_are_off_by_default(data: Path) -> None:
    fair, released = (jobs(name, data)[0].plan.config for name in ("reorder/arm_b", "reorder/arm_b_released"))
    differing = {
        f"{group}.{key}": value
        for group in ("model", "method", "task", "data", "optim", "trainer")
        for key, value in released[group].items()
        if fair[group][key] != value
    }
    assert differing == {
        "model.class_token": "front",
        "method.num_temperature_steps": 30,
        "method.inverse_initial_order": True,
        "method.baseline_from_zero": True,
        "task.control_schedule": "without_hold",
        "task.warmup_position": "slot",
    }
    assert released["method"]["temperature_in_log_prob"] is False
    for key in differing:
        group, option = key.split(".")
        assert added_later(group, released[group]["component"])[option] == fair[group][option]


@pytest.mark.parametrize("name", COMPARED)
def test_pattern_and_groups_fit_the_model(name: str, data: Path) -> None:
    for job in jobs(name, data):
        kinds = {site.kind for site in fitting_sites(_one_block(name, data), job.plan.task)[0]}
        assert len(kinds) == 4, job.words  # inputs of attention and of the MLP, and of their last layers


@cache
def _one_block(name: str, data: Path) -> Backbone:
    """The experiment's model with one block and without memory."""
    plan = jobs(name, data)[0].plan
    config = plan.config
    pretrained = False if config["model"]["component"] == "vit" else None
    with torch.device("meta"):
        return build("model", config["model"] | {"depth": 1, "pretrained": pretrained}, plan.spec)


# Against the papers


@pytest.mark.parametrize("name", COMPARED)
def test_every_run_of_a_command_is_a_row_of_a_table_it_names(name: str, data: Path) -> None:
    paper, model = name.split("/")
    (promise,) = header(name, "Expected")
    match = re.match(r"results/expected\.yaml (\w+)((?: T\d+)+)\b", promise)
    assert match, promise
    assert match[1] == paper
    promised = match[2].split()
    of_model = [number for number in NUMBERS if number["paper"] == paper and number["row"].get("model") == model]
    assert set(promised) <= {number["table"] for number in of_model}
    for job in jobs(name, data):
        assert set(job.tables) <= set(promised), job.words
        rows = [number["row"] for number in of_model if number["table"] in job.tables]
        ours = measured_on(job.plan.config)
        assert any(row.items() <= (ours | {"model": model}).items() for row in rows), job.words
    assert {table for job in jobs(name, data) for table in job.tables} == set(promised)


def measured_on(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings under the keys of `results/expected.yaml`."""
    task, trainer = config["task"], config["trainer"]
    row = {
        "pattern": f"{task['n']}:{task['m']}",
        "pruner": task["pruner"],
        "method": METHODS[config["method"]["name"]],
        "loss": LOSSES[task["task_weight"] > 0, task["distill_weight"] > 0],
        "calibration": config["data"]["name"],
        "blocks": task["sites"],
        "epochs": trainer["max_epochs"],
        "iterations": config["method"].get("num_iters"),
    }
    return row | ({"groups": task["num_groups"]} if task["num_groups"] else {"block_size": task["block_size"]})


def test_a_run_is_told_from_one_with_other_settings(data: Path) -> None:
    job = next(job for job in jobs("lp4ss/llama_2_7b", data) if "task.num_groups=8" in job.words)
    assert value("lp4ss", "T5", "perplexity", **only(measured_on(job.plan.config), "groups")) == 10.25
    job = next(job for job in jobs("permllm/llama_2_7b", data) if "task.block_size=128" in job.words)
    assert value("permllm", "T6", "perplexity", **only(measured_on(job.plan.config), "block_size")) == 9.07


def only(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: row[key] for key in keys}


# The numbers


def value(paper: str, table: str, metric: str, **row: Any) -> float:
    """The one number of a table in whose row these keys have these values."""
    found = [
        number["value"]
        for number in NUMBERS
        if (number["paper"], number["table"], number["metric"]) == (paper, table, metric)
        and row.items() <= number["row"].items()
    ]
    assert len(found) == 1, (paper, table, metric, row, found)
    return found[0]


def test_numbers_have_the_same_form_and_no_two_are_the_same_entry() -> None:
    seen = set()
    for number in NUMBERS:
        assert list(number) == ["paper", "table", "row", "metric", "value"]
        assert isinstance(number["value"], int | float)
        assert math.isfinite(number["value"])
        assert number["value"] >= 0
        assert all(isinstance(part, str | int) and not isinstance(part, bool) for part in number["row"].values())
        entry = (number["paper"], number["table"], frozenset(number["row"].items()), number["metric"])
        assert entry not in seen
        seen.add(entry)
    assert {number["metric"] for number in NUMBERS} == set(EXPECTED["metrics"])


def test_every_table_is_there() -> None:
    tables = {paper: {n["table"] for n in NUMBERS if n["paper"] == paper} for paper in EXPECTED["sources"]}
    lp4ss, permllm = ({f"T{number}" for number in range(1, last + 1)} for last in (7, 8))
    assert tables == {"lp4ss": lp4ss, "permllm": permllm, "apex": {"permutation_tests"}}


def test_metrics_and_inconsistencies_say_what_a_reader_needs() -> None:
    for metric in EXPECTED["metrics"].values():
        assert list(metric) == ["unit", "better", "key", "scale"]
        assert metric["better"] in ("higher", "lower")
        assert (metric["key"] is None) == (metric["scale"] is None)
    for entry in EXPECTED["inconsistencies"]:
        assert list(entry) == ["source", "where", "text"]
        assert set(entry["source"].split(", ")) <= set(EXPECTED["sources"])
        assert entry["text"].endswith(".")


def test_what_two_tables_of_a_paper_share_is_the_same_in_both() -> None:
    learned = {"model": "llama_2_7b", "pattern": "2:4", "pruner": "wanda", "method": "learned"}
    for metric in ("perplexity", "zero_shot_7"):
        shared = value("lp4ss", "T2", metric, **learned)
        assert value("lp4ss", "T5", metric, groups=4) == value("lp4ss", "T6", metric, **learned) == shared
        for pruner in ("magnitude", "wanda", "ria"):
            row = learned | {"pruner": pruner, "method": "unpermuted"}
            assert value("lp4ss", "T2", metric, **row) == value("lp4ss", "T6", metric, **row)
    assert value("lp4ss", "T4", "perplexity", epochs=20) == value("lp4ss", "T2", "perplexity", **learned)
    one = learned | {"model": "llama_3_2_1b"}
    assert value("lp4ss", "T7", "perplexity", loss="both") == value("lp4ss", "T2", "perplexity", **one)
    shared = value("permllm", "T1", "perplexity", **learned)
    assert value("permllm", "T5", "perplexity", calibration="c4") == shared
    assert value("permllm", "T6", "perplexity", block_size=64) == shared
    assert value("permllm", "T6", "zero_shot_5", block_size=64) == value("permllm", "T2", "zero_shot_5", **learned)
    for model in ("llama_3_1_8b", "qwen2_5_7b"):
        row = learned | {"model": model}
        assert value("permllm", "T4", "perplexity", model=model, iterations=5) == value(
            "permllm", "T1", "perplexity", **row
        )
    for method, blocks in (("channel_permutation", {}), ("learned", {"blocks": "all"})):
        row = learned | {"pruner": "ria", "method": method}
        assert value("permllm", "T7", "perplexity", **row, **blocks) == value("permllm", "T1", "perplexity", **row)


def test_speedups_are_those_of_the_times() -> None:
    for layer in ("attention", "gate_up", "down"):
        times = [value("permllm", "T3", "milliseconds", layer=layer, weights=w) for w in ("dense", "sparse")]
        assert times[0] / times[1] == pytest.approx(value("permllm", "T3", "speedup", layer=layer), abs=0.006)


def test_the_matrix_of_apex_has_the_published_sums() -> None:
    matrix = np.random.RandomState(1).rand(128, 64)
    groups = np.sort(matrix.reshape(128, 16, 4), axis=-1)
    sums = {
        "unpruned": matrix.sum(),
        "half_of_all": np.sort(matrix, axis=None)[128 * 32 :].sum(),
        "half_of_every_row": np.sort(matrix, axis=-1)[:, 32:].sum(),
    }
    for mask, total in sums.items():
        assert value("apex", "permutation_tests", "retained", mask=mask) == pytest.approx(total, abs=1e-3)
    # The library adds in another precision: its sum is one thousandth less.
    (given,) = [n["value"] for n in NUMBERS if n["row"] == {"mask": "2:4"} and n["metric"] == "retained"]
    assert given == pytest.approx(groups[..., 2:].sum(), abs=2e-3)
    row50 = sums["half_of_every_row"]
    for number in NUMBERS:
        if number["metric"] == "retained" and "search" in number["row"]:
            efficacy = value("apex", "permutation_tests", "efficacy", **number["row"])
            assert 100 * (number["value"] - given) / (row50 - given) == pytest.approx(efficacy, abs=0.06)
