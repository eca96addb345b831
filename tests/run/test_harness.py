"""Tasks of lm-evaluation-harness on finished runs: what is asked, what is kept, and how it fails."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from runs import Result, train

from permlab.cli import main
from permlab.config.suite import HarnessTask, harness_tasks, suite_names

LM = ("task=lm", "model=llama_nano", "data=pydocs", "data.sequence_length=32")
TASK = """task: sky
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    result = train(tmp_path_factory.mktemp("runs"), *LM)
    assert result.code == 0, result.err
    return result


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    rows = [{"question": "The sky is", "choices": [" blue", " seven"], "answer": index % 2} for index in range(4)]
    data = tmp_path / "sky.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sky.yaml").write_text(TASK.format(data=data))
    return tmp_path / "sky.yaml"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The parts of the library that are used, under their names; what they were asked."""
    asked: list[dict[str, Any]] = []

    def simple_evaluate(model: Any, **words: Any) -> dict[str, Any]:
        asked.append({"model": model, **words})
        numbers = {"alias": "sky", "acc,none": 0.25, "acc_stderr,none": "N/A", "acc,first": 0.5}
        return {"results": {words["tasks"][0]: numbers}}

    class TaskManager:
        all_tasks = ("sky", "rte", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")

        def __init__(self, include_path: list[str] | None) -> None:
            self.include_path = include_path

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **words: words},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def evaluate(run: Result, *words: str) -> int:
    return main("eval", [f"run={run.run_dir}", *words])


def test_results_join_the_summary(run: Result, task_file: Path, stand_in: list[dict[str, Any]], capsys) -> None:
    before = run.summary
    assert evaluate(run, f"tasks=[{task_file}]", "limit=3") == 0
    (asked,) = stand_in
    assert asked["limit"] == 3
    assert asked["num_fewshot"] is None
    assert asked["task_manager"].include_path == [str(task_file.parent)]
    assert type(asked["model"]["pretrained"]).__name__ == "LlamaForCausalLM"
    assert run.summary == before | {"eval/sky/acc": 0.25, "eval/sky/acc,first": 0.5}
    assert "eval/sky/acc" in capsys.readouterr().out


def test_a_suite_is_its_tasks_with_their_examples(run: Result, stand_in: list[dict[str, Any]]) -> None:
    assert evaluate(run, "tasks=permllm") == 0
    assert [asked["tasks"] for asked in stand_in] == [[task.name] for task in harness_tasks("permllm")]
    assert {asked["num_fewshot"] for asked in stand_in} == {0}


def test_what_suites_hold() -> None:
    assert suite_names() == ["lp4ss", "permllm"]
    assert HarnessTask("mmlu", 5) in harness_tasks(["lp4ss"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("tasks=hellaswagg",), "tasks=hellaswagg: no such task; nearest valid choice: hellaswag"),
        (("tasks=[no/sky.yaml]",), "tasks: no/sky.yaml: cannot be read (FileNotFoundError)"),
        (("tasks=[rte,rte]",), "tasks: rte is there twice"),
        (("limit=3",), "limit: needs tasks=[...]"),
        (("tasks=rte", "limit=0"), "limit=0: expected an integer >= 1 or null"),
    ],
)
def test_what_is_wrong_is_one_line(run: Result, stand_in: list, capsys, words: tuple[str, ...], line: str) -> None:
    assert evaluate(run, *words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {line}")


def test_data_out_of_reach_is_one_line(run: Result, stand_in: list, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def out_of_reach(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", out_of_reach, raising=False)
    assert evaluate(run, "tasks=rte") == 2
    assert capsys.readouterr().err == "error: tasks=rte: cannot be run (ConnectionError: no network)\n"


def test_the_library_itself(run: Result, task_file: Path) -> None:
    pytest.importorskip("lm_eval")
    assert evaluate(run, f"tasks=[{task_file}]") == 0
    assert 0 <= run.summary["eval/sky/acc"] <= 1
