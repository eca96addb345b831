"""A task, a kind of data and a model that are not ours: files in their folders are all that it takes.

The files are in `tests/toy`. They join a copy of the package, of which not a line is changed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy"
WORDS = ("task=sort_numbers", "logger.mode=disabled", "trainer.max_steps=100")
# Both doors in one process, as it takes longer to import torch than to learn what a rank is.
TRAIN_AND_EVALUATE = """
import contextlib, io, runpy, sys

for script in ("train", "eval"):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(f"{script}.py", run_name="__main__")
        except SystemExit as error:
            code = error.code
    print(out.getvalue())
    if code:
        sys.exit(code)
    sys.argv = ["eval.py", out.getvalue().splitlines()[-1].replace("run: ", "run=")]
    print("----")
"""


class Copy:
    """A copy of the package with the toy's files among its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        for name in ("src", "conf", "sweeps"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        for name in ("train.py", "eval.py"):
            shutil.copy(ROOT / name, folder)
        before = self.files()
        for name in ("task", "data", "model"):
            shutil.copytree(TOY / name, folder / "src" / "permlab" / name, dirs_exist_ok=True)
        for name in ("conf", "sweeps"):
            shutil.copytree(TOY / name, folder / name, dirs_exist_ok=True)
        after = self.files()
        assert {path: after[path] for path in before} == before, "a file of the package is written over"

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*.*") if path.is_file()
        }

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=environment, timeout=240)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy"))


@dataclass
class Trained:
    run_dir: Path
    report: str
    evaluation: str

    @property
    def summary(self) -> dict[str, float]:
        return json.loads((self.run_dir / "summary.json").read_text())


@pytest.fixture(scope="module")
def trained(copy: Copy) -> Trained:
    result = copy.python("-c", TRAIN_AND_EVALUATE, *WORDS)
    assert result.returncode == 0, result.stderr
    assert "arning" not in result.stderr, result.stderr
    report, evaluation, _ = (part.strip() for part in result.stdout.split("----"))
    return Trained(copy.folder / report.splitlines()[-1].removeprefix("run: "), report, evaluation)


def test_it_trains_and_reports(trained: Trained) -> None:
    run_dir, out, summary = trained.run_dir, trained.report, trained.summary
    assert run_dir.parent.relative_to(run_dir.parents[2]) == Path(
        "sort_numbers", "five_numbers-pair_reader-sort_softmax"
    )
    assert summary["test/displacement"] < 0.2 < 1 < summary["test/displacement_unsorted"], "it learns to sort"
    assert summary["val/displacement"] < 0.2, "the metric is what checkpoints are picked by"
    assert "sort_numbers: five_numbers (5 ranks), pair_reader (33 parameters) reading 5 numbers" in out
    assert f"{summary['test/displacement']:.3f}" in out
    assert re.search(r"^test displacement, 1 seed +slots +difference$", out, re.MULTILINE)
    assert re.search(
        r"^as they come +\d\.\d{3}\n(?:order learned by sort_softmax) +0\.\d{3} +-\d\.\d{3}$", out, re.MULTILINE
    )
    assert re.search(r"^samples in order +[01]", out, re.MULTILINE)


def test_its_figure_is_drawn_beside_ours(trained: Trained) -> None:
    drawn = {path.stem for path in (trained.run_dir / "figures").iterdir()}
    assert {"sorted_numbers", "training", "order"} <= drawn


def test_it_is_evaluated_to_the_same_numbers(trained: Trained) -> None:
    printed = re.findall(r"^(test/\S+) +(\S+)$", trained.evaluation, re.MULTILINE)
    tested = {name: trained.summary[name] for name in ("test/displacement", "test/in_order")}
    assert {name: float(value) for name, value in printed} == pytest.approx(tested, abs=1e-6)


def test_a_sweep_makes_a_table_of_it(copy: Copy, trained: Trained) -> None:
    """With a table's own columns, and the baseline that a run beside another has been trained as."""
    result = copy.python(
        "-m", "permlab.sweep", "sort_numbers", "--processes", "1", "--set", WORDS[1], "--set", WORDS[2]
    )
    assert result.returncode == 0, result.stderr
    table = (copy.folder / "results" / "sort_numbers.md").read_text()
    assert table.strip() in result.stdout
    assert "## sort_numbers: five_numbers, pair_reader" in table
    assert "| displacement, slots | against plain, slots (worst) | in order | seeds |" in table
    rows = dict(re.findall(r"^\| (fixed|sort_softmax)[^|]* \| ([\d.]+) ", table, re.MULTILINE))
    summary = trained.summary
    assert rows == {
        "fixed": f"{summary['test/displacement_unsorted']:.3f}",
        "sort_softmax": f"{summary['test/displacement']:.3f}",
    }
    assert len(list(copy.runs.rglob("DONE"))) == 2, "runs that exist are found"


def test_help_and_options_know_it(copy: Copy) -> None:
    shown = copy.python("train.py", "--help").stdout
    for line in ("sort_numbers +sort five numbers", "five_numbers +five numbers", "pair_reader +reads a row"):
        assert re.search(f"^  {line}", shown, re.MULTILINE)
    page = copy.python("-c", "from permlab.config.reference import page; print(page())").stdout
    assert "| `task.pair_weight` | a number >= 0 | `1.0` | of the squared error of what the model reads. |" in page
    assert "### data=five_numbers" in page
    assert "### model=pair_reader" in page


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("task.pair_weight=-1", "task.pair_weight=-1: expected a number >= 0"),
        ("task.pair_wait=1", "task.pair_wait=1: unknown key; nearest valid choice: task.pair_weight"),
        ("method.scorer=vector", "method.scorer=vector: has one order for all samples; expected linear or mlp"),
        ("data=digits", "takes numbers data, but data=digits is image; valid choices: five_numbers"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(word: str, message: str, copy: Copy) -> None:
    """Found before torch is imported."""
    code = (
        "import sys; from permlab.cli import main; code = main('train'); sys.exit(code + 10 * ('torch' in sys.modules))"
    )
    result = copy.python("-c", code, *WORDS, word)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
