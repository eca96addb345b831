"""The rooms of the package: what a line may import and mention where, read from the sources."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from permlab.config.schema import component_names, components, constant

SOURCE = Path(__file__).resolve().parents[2] / "src"
PACKAGE = SOURCE / "permlab"
# From the roof down, rooms of one storey together. `task/` stands for the folder of any task.
STOREYS = (
    *(("door",), ("cli", "sweep", "timm_models"), ("run",), ("study",), ("callback",), ("task/",), ("task",)),
    *(("method",), ("sparsity",)),
    *(("figure",), ("record",), ("model",), ("config",), ("data",), ("ops",), ("ground",)),
)
# What no line of a room may mention, but for the files that are the place for it.
PRUNING = re.compile(r"\bprun|wanda|N:M|\bdense\b", re.IGNORECASE)
PRUNING_LIVES_IN = ("task/prune/", "sparsity/")
PRUNING_MAY_BE_NAMED = {
    "timm_models/timm_model.py": "timm's names of a method and of its arguments",
    "ops/nm.py": "its masks have no other name in the field",
    "model/convert/onnx.py": "names in another program's file",
    "ops/assignment.py": "the title of the paper that it follows",
}
METRICS = re.compile("accuracy|perplexity", re.IGNORECASE)
# Rooms that know neither a task nor a kind of data by name.
KNOWS_NO_TASK = ("run", "study", "callback")
# What is asked for before torch is imported, which takes longer than a wrong key deserves.
WITHOUT_TORCH = (
    *("__main__.py", "cli.py", "config/*.py", "task/*.py", "task/*/task.py", "record/rundir.py", "record/stored.py"),
    *("data/__main__.py", "data/document.py", "data/fetch.py", "data/source.py", "data/tokenizer.py"),
    *("record/lock.py", "record/provenance.py", "study/grid.py", "study/report.py", "study/table.py"),
)
NEED_TORCH = {"task/guard.py", "task/learner.py", "task/optim.py", "task/place.py", "task/score.py"}


# Reading the sources


@functools.cache
def modules() -> dict[str, Path]:
    """File of every module by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found[".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imported(node: ast.AST) -> Iterator[str]:
    """Dotted names that are imported below a node, inside of functions too, but not for the type checker alone."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        for child in node.orelse:
            yield from imported(child)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def module_of(name: str) -> str:
    """The module that an imported name is, or is in."""
    while name not in modules():
        name = name.rpartition(".")[0]
        assert name, "no module of the package"
    return name


@functools.cache
def arrows() -> dict[str, frozenset[str]]:
    """Modules of the package that every module imports."""
    found = {}
    for name, path in modules().items():
        ours = {module_of(other) for other in imported(ast.parse(path.read_text())) if other.startswith("permlab.")}
        found[name] = frozenset(ours - {name})
    return found


def room(module: str) -> str:
    """Folder of the package that a module is in, or of its task; `door` for a command, `ground` at the root."""
    _, *parts = module.split(".")
    if parts[-1:] == ["__main__"]:
        return "door"
    if not parts or not (PACKAGE / parts[0]).is_dir():
        return {"cli": "cli", "__main__": "door"}.get(parts[0] if parts else "", "ground")
    is_folder = len(parts) > 1 and (PACKAGE / parts[0] / parts[1]).is_dir()
    return f"task/{parts[1]}" if parts[0] == "task" and is_folder else parts[0]


def storey(room: str) -> int:
    """How far a room is below the roof."""
    kind = "task/" if room.startswith("task/") else room
    return next(index for index, rooms in enumerate(STOREYS) if kind in rooms)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes of a circle in a graph, if it has one."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def mentions(pattern: re.Pattern[str], *elsewhere: str) -> list[str]:
    """Lines that match a pattern in files whose path in the package does not begin with one of `elsewhere`."""
    found = []
    for path in modules().values():
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(elsewhere):
            lines = enumerate(path.read_text().splitlines(), start=1)
            found += [f"{name}:{number}: {line.strip()}" for number, line in lines if pattern.search(line)]
    return found


# Imports


def test_every_folder_is_a_room() -> None:
    rooms = {room(name) for name in modules()}
    assert len(rooms) > 12
    for name in rooms:
        storey(name)


def test_an_import_goes_down() -> None:
    upwards = [
        f"{name} ({room(name)}) imports {other} ({room(other)})"
        for name, others in arrows().items()
        for other in others
        if room(name) != room(other) and storey(room(name)) >= storey(room(other))
        and not {room(name), room(other)} <= {"cli", "sweep"}
    ]  # fmt: skip
    assert sum(map(len, arrows().values())) > 300
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle({name: set(others) for name, others in arrows().items()}) == []


def test_no_rooms_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, others in arrows().items():
        graph.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    assert circle(graph) == []


def test_wrong_arrows_would_be_found() -> None:
    """Inside of a function as well, but not for the type checker."""
    source = (
        "def f():\n    from permlab.run import story\nif TYPE_CHECKING:\n    import permlab.cli\nelse:\n    import os\n"
    )
    assert [module_of(name) for name in imported(ast.parse(source)) if name != "os"] == ["permlab.run.story"]
    names = ("task.guard", "option", "cli", "sweep.__main__", "data.__main__", "__main__")
    assert [room(f"permlab.{name}") for name in names] == [
        *("task", "ground", "cli", "door", "door", "door"),
    ]
    assert storey("run") < storey("study") < storey("task/any") < storey("task") < storey("method") < storey("ground")
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_the_root_has_the_ground_and_the_door_alone() -> None:
    """The door has two files, as Python looks for `__main__` at the root and nowhere else."""
    assert len([path for path in PACKAGE.glob("*.py") if path.stem not in ("cli", "__main__")]) <= 4


def test_the_story_of_a_run_fits_in_the_eye() -> None:
    assert len((PACKAGE / "run" / "story.py").read_text().splitlines()) < 200


def test_a_configuration_is_refused_without_torch() -> None:
    paths = [path for pattern in WITHOUT_TORCH for path in PACKAGE.glob(pattern)]
    names = [
        name for name, path in modules().items() if path in paths and str(path.relative_to(PACKAGE)) not in NEED_TORCH
    ]
    assert len(names) > 20
    code = (
        f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n"
        "print(*({'torch', 'lightning', 'timm', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.stdout.strip(), result.stderr) == ("", "")


# Words


def test_pruning_has_a_home() -> None:
    assert mentions(PRUNING, *PRUNING_LIVES_IN, *PRUNING_MAY_BE_NAMED) == []
    for name in (*PRUNING_LIVES_IN, *PRUNING_MAY_BE_NAMED):
        paths = [path for path in modules().values() if str(path.relative_to(PACKAGE)).startswith(name)]
        assert any(PRUNING.search(path.read_text()) for path in paths), f"{name} needs no exception"


def test_metrics_are_named_by_tasks_alone() -> None:
    assert mentions(METRICS, "task/") == []
    assert mentions(METRICS), "the search finds nothing"


@pytest.mark.parametrize("group", ["task", "data"])
def test_runs_and_studies_name_no_task_and_no_kind_of_data(group: str) -> None:
    names = set(component_names(group))
    names |= {constant("data", component, "kind") for component in components("data")} if group == "data" else set()
    assert len(names) > 2
    for path in (path for name in KNOWS_NO_TASK for path in (PACKAGE / name).glob("*.py")):
        constants = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        assert [node.lineno for node in constants if node.value in names] == [], path


def test_runs_and_studies_ask_no_method_and_no_task_what_it_is() -> None:
    asked = 0
    for path in (path for name in KNOWS_NO_TASK for path in (PACKAGE / name).glob("*.py")):
        tree = ast.parse(path.read_text())
        theirs = {name.rpartition(".")[2] for name in imported(tree) if re.match(r"permlab\.(method|task)\.", name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked += 1
                kinds = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
                kinds |= {part.attr for part in ast.walk(node.args[1]) if isinstance(part, ast.Attribute)}
                assert not kinds & theirs, f"{path}:{node.lineno}"
    assert asked > 5
