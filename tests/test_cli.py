"""The command line from outside: what is printed where, exit codes, and that nothing is written on bad input."""

import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from runs import configure

import permlab.__main__
import permlab.cli
from permlab.cli import help_text, main, split_arguments
from permlab.config.compose import compose_config, parse_overrides, resolve_train
from permlab.config.identity import digest, run_directory
from permlab.config.schema import CONF, GROUPS, EvaluationKeys, component_names, constant
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError
from permlab.study.grid import expand

ROOT = CONF.parent


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve_train(overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("method=sinkhron", ["method=sinkhron", "sinkhorn"]),
        ("metod=sinkhorn", ["metod=sinkhorn", "method"]),
        ("optim.lrr=0.1", ["optim.lrr=0.1", "optim.lr"]),
        ("model.widht=3", ["model.widht=3"]),
        ("trainer.max_step=3", ["trainer.max_step=3", "trainer.max_steps"]),
        ("optim.lr=abc", ["optim.lr=abc", "number"]),
        ("optim.lr=-1", ["optim.lr=-1", "> 0"]),
        ("optim.lr=nan", ["optim.lr=nan", "> 0"]),
        ("optim.lr=1e99", ["optim.lr=1e+99", "<= 1000"]),
        ("method.lr=1e99", ["method.lr=1e+99", "<= 1000"]),
        ("optim.weight_decay=1e99", ["optim.weight_decay=1e+99", "<= 1000"]),
        ("optim.schedule=cosin", ["optim.schedule=cosin", "cosine"]),
        ("data.batch_size=0", ["data.batch_size=0", "> 0"]),
        ("data.batch_size=1.5", ["data.batch_size=1.5", "integer"]),
        ("seed=-3", ["seed=-3", ">= 0"]),
        ("model.patch_size=3", ["model.patch_size=3", "1, 2, 4, 8"]),
        ("method.order=hilbrt", ["method.order=hilbrt", "hilbert"]),
        ("method.order=[0,0,1]", ["method.order=[0, 0, 1]", "64 items"]),
        ("method.order=none.npz", ["method.order=none.npz", "no such file"]),
        ("method.temperature={start: 1, ned: 2}", ["method.temperature", "ned"]),
        ("method.temperature=-0.1", ["method.temperature=-0.1"]),
        ("method.freeze_fraction=1.5", ["method.freeze_fraction=1.5", "<= 1"]),
        ("ckpt_path=nowhere/last.ckpt", ["ckpt_path=nowhere/last.ckpt", "no such file"]),
        ("task.teacher=nowhere", ["task.teacher=nowhere", "run directory"]),
        ("task.distill_weight=1", ["task.distill_weight=1", "task.teacher"]),
        ("trainer.max_steps=-1", ["trainer.max_steps=-1", "max_epochs"]),
        ("trainer.logger=true", ["trainer.logger", "set by permlab"]),
        ("logger.mode=onlin", ["logger.mode=onlin", "online"]),
        ("method.component=../../etc", ["method.component=../../etc"]),
        ("model=vim_nano,vit_nano", ["model=vim_nano,vit_nano", "-m"]),
    ],
)
def test_bad_input_is_named_with_key_value_and_remedy(override: str, named: list[str]) -> None:
    (problem,) = problems_of(override)
    for part in named:
        assert part in problem


@pytest.mark.parametrize(
    ("missing", "near"),
    [
        ("a/checkpoints/lasst.ckpt", "nearest valid choices: {0}/a/checkpoints/last.ckpt, {0}/a/checkpoints/best.ckpt"),
        ("a/last.ckpt", "nearest valid choices: {0}/a/checkpoints/last.ckpt, {0}/a/checkpoints/best.ckpt"),
        ("a/checkpoints/orders.npz", "there is no .npz in or below {0}/a/checkpoints"),
        ("a/order.npz", "nearest valid choice: {0}/a/arrays/order.npz"),
        ("b/c/d/last.ckpt", "nor is there its folder"),
    ],
)
def test_a_missing_file_is_answered_with_near_ones_of_its_kind(missing: str, near: str, tmp_path: Path) -> None:
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "arrays/order.npz", "config.yaml", "metrics.jsonl"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).touch()
    key = "ckpt_path" if missing.endswith(".ckpt") else "method.order"
    (problem,) = problems_of(f"{key}={tmp_path / missing}")
    assert problem == f"{key}={tmp_path / missing}: no such file; {near.format(tmp_path)}"


def test_a_model_without_layers_that_the_task_knows_is_refused_before_torch() -> None:
    (problem,) = problems_of("task=prune", "model=ssm_probe")
    assert problem.startswith("model=ssm_probe: has no linear layers that task=prune knows how to prune; ")
    assert "vit_nano" in problem
    assert "ssm_probe" not in problem.partition(";")[2]


def test_steps_of_a_training_that_is_not_made_name_no_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    dense = resolve_train(["task=classify", "method=fixed", "model=vit_nano"])[0]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dict(dense.config)))
    given, other = (
        resolve_train(["task=prune", f"task.dense={tmp_path}", f"task.dense_steps={steps}"])[0] for steps in (5, "null")
    )
    assert given.config["task"]["dense_steps"] is None
    assert given.digest == other.digest


def test_rules_over_several_keys() -> None:
    assert "leave_one_out" in problems_of("method=reorder", "method.num_samples=1")[0]
    assert "exceeds 1" in problems_of("method.warmup_fraction=0.8")[0]
    assert "does not divide" in problems_of("model=vit_nano", "model.num_heads=5")[0]


def test_a_model_and_a_task_that_cannot_read_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    text = DataSpec(kind="text", num_classes=256, channels=1, height=1, width=64)
    monkeypatch.setattr("permlab.config.plan.open_data", lambda settings: (None, text))
    model, task = problems_of("model=vit_nano")
    assert model.startswith("model=vit_nano: reads image data, but data=digits is text")
    assert task.startswith("task=classify: takes image data, but data=digits is text")
    (task,) = problems_of("model=llama_nano")  # reads both
    assert task.startswith("task=classify")


def test_all_problems_are_reported_at_once_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main("train", ["method=sinkhron", "optim.lr=abc", "optim.foo=1", f"paths.runs={tmp_path / 'runs'}"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in ("method=sinkhron", "optim.lr=abc", "optim.foo=1"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("word", ["foo", "a=[1", "method.order=[1,2"])
def test_an_override_that_cannot_be_read(word: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_overrides([word])


def test_unknown_flag() -> None:
    with pytest.raises(ConfigError, match="--multirun"):
        split_arguments(["--multrun"])


def test_paths_with_equal_signs_need_no_quotes() -> None:
    (override,) = parse_overrides(["run=runs/a-b/seed=0-12ab"])
    assert override.value() == "runs/a-b/seed=0-12ab"
    (override,) = parse_overrides(["method.order=random(3)"])
    assert override.value() == "random(3)"


def test_temperature_takes_a_number_or_a_schedule_whatever_the_preset_has() -> None:
    config = configure(["method=reorder", "method.temperature=0.5"])
    assert config["method"]["temperature"] == 0.5
    config = configure(["method=sinkhorn_ste", "method.temperature={start: 1.0, end: 0.1}"])
    assert config["method"]["temperature"] == {"start": 1.0, "end": 0.1}
    config = configure(["method=reorder", "method.temperature.start=0.7"])
    assert config["method"]["temperature"]["start"] == 0.7


def test_a_setting_of_another_component_is_a_warning() -> None:
    plan, warnings = resolve_train(["method=sort_ste", "method.num_iters=5"])
    assert "num_iters" not in plan.config["method"]
    assert warnings == ["method.num_iters=5 has no effect with method=sort_ste"]


def test_values_are_derived_from_the_data() -> None:
    config = configure(["model=vit_nano"])
    assert config["model"]["patch_size"] == 1
    assert config["trainer"]["val_check_interval"] == 150
    assert configure(["trainer.max_steps=2"])["trainer"]["val_check_interval"] == 2
    assert configure(["method=fixed"])["task"]["control"] is False


def test_run_directory_depends_on_what_is_computed_not_on_where() -> None:
    base = configure([])
    elsewhere = configure(["logger.mode=disabled", "data.num_workers=2", "force=true"])
    seeded = configure(["seed=1"])
    other = configure(["optim.lr=0.5"])
    assert run_directory(base) == run_directory(elsewhere)
    assert digest(base) == digest(seeded) != digest(other)
    assert run_directory(base).parts[:-1] == ("runs", "classify", "digits-ssm_probe-sinkhorn_ste")
    assert run_directory(seeded).name == f"seed=1-{digest(base)}"


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in component_names(group)])
def test_every_configuration_file_composes_and_validates(group: str, name: str) -> None:
    if group == "data" and compose_config("train", [f"data={name}"])[0]["data"].get("root"):
        assert "data" in problems_of(f"data={name}", "paths.data=no-such-folder")[0]
        return
    if (
        group == "model" and compose_config("train", [f"model={name}"])[0]["model"].get("width", 0) is None
    ):  # a checkpoint's
        assert problems_of(f"model={name}", "paths.data=no-such-folder")[0].startswith("model.pretrained=")
        return
    plan, warnings = resolve_train([f"{group}={name}", *_company(group, name)])
    assert plan.config[group]["name"] == name
    assert not warnings


def _company(group: str, name: str) -> list[str]:
    """What a choice needs beside it, where the default run has no place for it."""
    if (group, name) in (("data", "pydocs"), ("model", "qwen2_5_vl_3b")):
        return ["task=lm", "model=llama_nano"] if group == "data" else ["task=lm"]
    if group == "method" and "items" not in (constant("method", _component(name), "permutes") or ("items",)):
        return ["task=prune"]
    return []


def _component(method: str) -> str:
    return compose_config("train", [f"method={method}"])[0]["method"]["component"]


def test_expand_is_the_cartesian_product() -> None:
    jobs = expand(["method=sort_ste,reorder", "seed=range(0,2)", "optim.lr=0.1"])
    assert jobs == [
        ["method=sort_ste", "seed=0", "optim.lr=0.1"],
        ["method=sort_ste", "seed=1", "optim.lr=0.1"],
        ["method=reorder", "seed=0", "optim.lr=0.1"],
        ["method=reorder", "seed=1", "optim.lr=0.1"],
    ]


def test_help_has_a_line_for_every_choice() -> None:
    lines = help_text("train").splitlines()
    for group in (*GROUPS, "experiment"):
        for name in component_names(group):
            (line,) = [line for line in lines if line.split() and line.split()[0] == name]
            assert len(line.split()) > 2, f"{group}/{name}.yaml has no comment in its first line"


def test_help_has_the_general_keys_and_where_all_are() -> None:
    text = help_text("train")
    assert "docs/options.md" in text
    for key in ("seed=0", "force=false", "paths.runs=runs", "trainer.max_steps=3000", "data.batch_size=128"):
        (line,) = [line for line in text.splitlines() if line.split() and line.split()[0] == key]
        assert len(line.split()) > 2, "its meaning"


def test_help_of_eval_has_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("eval", ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for field in fields(EvaluationKeys):
        (line,) = [line for line in lines if line.strip().startswith(f"{field.name}=")]
        assert len(line.split()) > 2, "its meaning"
    assert "run=<run directory>" in lines[0]


def test_python_m_permlab_has_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(permlab.cli, "main", lambda name, words: called.append((name, list(words))) or 0)
    assert permlab.__main__.main(["train", "-m", "seed=0,1"]) == 0
    assert permlab.__main__.main(["eval", "run=x"]) == 0
    assert called == [("train", ["-m", "seed=0,1"]), ("eval", ["run=x"])]
    assert permlab.__main__.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("train", "eval", "sweep", "options"))
    assert permlab.__main__.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: trian: no such command; nearest valid choice: train\n"


def test_cfg_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", ["--cfg", "job", "method=fixed"]) == 0
    out = capsys.readouterr().out
    assert "lr: ${" not in out
    assert "patch_size: 1" in out
    assert main("train", ["--cfg", "job", "-p", "optim"]) == 0
    assert capsys.readouterr().out.startswith("name: adamw")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "run: missing"),
        (["run=nowhere"], "run=nowhere: not a run directory"),
        (["run=nowhere", "splt=val"], "split"),
        (["run=nowhere", "split=tset"], "nearest valid choice: test"),
    ],
)
def test_eval_refuses_bad_input(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("eval", arguments) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.alone
def test_a_wrong_choice_ends_before_torch_is_imported() -> None:
    began = time.monotonic()
    result = script("-X", "importtime", "train.py", "method=sinkhron")
    assert result.returncode == 2
    assert result.stdout == ""
    modules = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "hydra" in modules
    assert not modules & {"torch", "lightning", "timm", "transformers", "wandb"}
    lines = [line for line in result.stderr.splitlines() if "|" not in line]
    assert lines == ["error: method=sinkhron: no such choice; nearest valid choice: sinkhorn"]
    assert time.monotonic() - began < 10  # an upper bound for a busy machine; 0.7 s on an idle one


def test_the_traceback_is_there_when_asked_for() -> None:
    result = script("train.py", "method=sinkhron", PERMLAB_DEBUG="1")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_shell_completion_knows_the_choices() -> None:
    environment = {"COMP_LINE": "python train.py method=sinkhorn_", "COMP_POINT": "33"}
    result = script("train.py", "-sc", "query=bash", **environment)
    assert "method=sinkhorn_ste" in result.stdout, result.stderr


def test_an_order_is_counted_in_items_not_in_patches() -> None:
    config = configure(["model=qwen_vl_nano", "model.patch_size=2", "method.order=[3,1,2,0]"])
    assert config["method"]["order"] == [3, 1, 2, 0]
