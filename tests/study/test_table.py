"""The table of a study, against numbers worked out here from the summaries."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from permlab.config.compose import resolve_train
from permlab.config.plan import Plan
from permlab.record.rundir import write_json
from permlab.study.finished import find_finished
from permlab.study.table import write_table

TEXT = ("data=pydocs", "model=llama_nano")


def finished(runs: Path, *words: str, **summary: float) -> Plan:
    """Plan of a run whose directory says what it has measured."""
    plan, _ = resolve_train([f"paths.runs={runs}", *words])
    folder = plan.directory
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "DONE").touch()
    write_json(folder / "summary.json", {key.replace("__", "/"): value for key, value in summary.items()})
    write_json(folder / "provenance.json", {"device": "cpu, 1 threads"})
    return plan


def table_of(plans: list[Plan], path: Path, before: Sequence[Plan] = ()) -> str:
    return write_table([find_finished(plan) for plan in plans], path, [find_finished(plan) for plan in before])


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells of every row by its label, of the only section."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert len({len(line) for line in lines}) == 1, "every row has all columns"
    labels = [line[0] for line in lines]
    assert len(set(labels)) == len(labels), "rows can be told apart"
    return {line[0]: line[1:] for line in lines}


ACCURACY = {"wanda": [0.5, 0.6, 0.4], "hybrid": [0.8, 0.7, 0.7], "magnitude": [0.3, 0.55, 0.1]}
WORDS = {
    "wanda": ("method=fixed",),
    "hybrid": ("method=hybrid", "method.search=none"),
    "magnitude": ("method=fixed", "task.pruner=magnitude"),
}


def accuracies(runs: Path) -> list[Plan]:
    """Seeds of a configuration need not come together, nor plain Wanda first."""
    plans = []
    for seed in range(3):
        for name in ("magnitude", "hybrid", "wanda"):
            values = {"test__accuracy": ACCURACY[name][seed], "test__accuracy_dense": 0.9 + 0.01 * seed}
            values |= {"prune__retained": 0.8 + 0.02 * seed, "prune__seconds": 1.5 * (seed + 1)}
            extra = {"prune__num_parameters": 64.0} if name == "hybrid" else {}
            plans.append(finished(runs, "task=prune", *WORDS[name], f"seed={seed}", **values, **extra))
    return plans


def test_means_spreads_and_gains_of_every_row(tmp_path: Path) -> None:
    text = table_of(accuracies(tmp_path / "runs"), tmp_path / "results" / "study")
    assert text.startswith("## prune: digits, vit_nano, 2:4\n")
    rows = rows_of(text)
    header = rows.pop("")
    assert header == [
        "accuracy, %", "against plain, points (worst)", "retained", "seconds", "parameters", "seeds",
    ]  # fmt: skip
    del rows["---"]
    assert list(rows) == ["dense", "magnitude", "wanda + hybrid", "wanda"]
    for label, name in (("magnitude", "magnitude"), ("wanda + hybrid", "hybrid"), ("wanda", "wanda")):
        values = [100 * value for value in ACCURACY[name]]
        cells = dict(zip(header, rows[label], strict=True))
        assert cells["accuracy, %"] == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        gains = [100 * (ours - theirs) for ours, theirs in zip(ACCURACY[name], ACCURACY["wanda"], strict=True)]
        expected = "" if name == "wanda" else f"{statistics.mean(gains):+.1f} ({min(gains):+.1f})"
        assert cells["against plain, points (worst)"] == expected
        assert (cells["retained"], cells["seconds"], cells["seeds"]) == ("0.8200", "3.0", "3")
        assert cells["parameters"] == ("64" if name == "hybrid" else "")
    assert rows["wanda + hybrid"][1] == "+23.3 (+10.0)"
    assert rows["dense"] == ["91.0 ± 1.0", "", "", "", "", ""]
    assert text.splitlines()[-1] == "Mean ± standard deviation over seeds. Computed on: cpu, 1 threads."


def test_the_files_hold_the_table_and_every_run(tmp_path: Path) -> None:
    path = tmp_path / "results" / "study"
    text = table_of(accuracies(tmp_path / "runs"), path)
    assert path.with_suffix(".md").read_text() == text
    with path.with_suffix(".csv").open() as file:
        records = list(csv.DictReader(file))
    found = {(record["row"], int(record["seed"])): float(record["test/accuracy"]) for record in records}
    labels = {"wanda": "wanda", "hybrid": "wanda + hybrid", "magnitude": "magnitude"}
    assert found == {(labels[name], seed): ACCURACY[name][seed] for name in ACCURACY for seed in range(3)}
    assert {record["section"] for record in records} == {"prune: digits, vit_nano, 2:4"}
    assert {record["prune/num_parameters"] for record in records} == {"", "64.0"}


def test_a_baseline_without_a_seed_leaves_it_out_of_the_gains(tmp_path: Path) -> None:
    plans = [
        finished(tmp_path, "task=prune", "method=fixed", "seed=0", test__accuracy=0.5),
        finished(tmp_path, "task=prune", *WORDS["hybrid"], "seed=0", test__accuracy=0.6),
        finished(tmp_path, "task=prune", *WORDS["hybrid"], "seed=1", test__accuracy=0.1),
    ]
    rows = rows_of(table_of(plans, tmp_path / "table"))
    assert rows["wanda + hybrid"] == ["35.0 ± 35.4", "+10.0 (+10.0)", "2"]
    assert rows["wanda"] == ["50.0", "", "1"]
    assert "dense" not in rows


def test_rows_are_compared_with_what_they_share_model_sites_and_samples_with(tmp_path: Path) -> None:
    learned = ("task=prune", "method=sort_ste")
    long, block = "task.dense_steps=9", "task.sites=[blocks.0.mlp.fc2]"
    plans = [
        finished(tmp_path, "task=prune", "method=fixed", test__accuracy=0.5, test__accuracy_dense=0.8),
        finished(tmp_path, "task=prune", "method=fixed", long, test__accuracy=0.7, test__accuracy_dense=0.9),
        finished(tmp_path, *learned, test__accuracy=0.6),
        finished(tmp_path, *learned, long, test__accuracy=0.75),
        # Without a run of plain Wanda at this site: what the run itself has measured of it.
        finished(tmp_path, *learned, block, test__accuracy=0.65, test__accuracy_unpermuted=0.64),
        # Another importance without a baseline.
        finished(tmp_path, *learned, block, "task.pruner=ria", "task.num_samples=3", test__accuracy=0.6),
    ]
    rows = rows_of(table_of(plans, tmp_path / "table"))
    gains = {label: cells[1] for label, cells in rows.items() if "sort_ste" in label}
    assert list(gains.values()) == ["+10.0 (+10.0)", "+5.0 (+5.0)", "+1.0 (+1.0)", ""]
    assert {label: cells[0] for label, cells in rows.items() if label.startswith("dense")} == {
        "dense dense_steps=600": "80.0",
        "dense dense_steps=9": "90.0",
    }


def test_perplexity_is_compared_in_per_cent_and_its_worst_is_the_largest(tmp_path: Path) -> None:
    plain, learned = [10.0, 20.0], [8.0, 19.0]
    plans = []
    for seed in range(2):
        for method, values in (("fixed", plain), ("sort_ste", learned)):
            summary = {"test__perplexity": values[seed], "test__perplexity_dense": 5.0, "test__accuracy": 0.3}
            plans.append(finished(tmp_path, "task=prune", *TEXT, f"method={method}", f"seed={seed}", **summary))
    text = table_of(plans, tmp_path / "table")
    assert text.startswith("## prune: pydocs, llama_nano, 2:4\n")
    rows = rows_of(text)
    assert rows[""] == ["perplexity", "against plain, % (worst)", "seeds"]
    assert rows["wanda + sort_ste"] == ["13.500 ± 7.778", "-12.5 (-5.0)", "2"]
    assert rows["dense"] == ["5.000 ± 0.000", "", ""]


def test_a_section_for_every_pattern_model_and_dataset(tmp_path: Path) -> None:
    plans = [
        finished(tmp_path, "task=prune", "method=fixed", test__accuracy=0.5),
        finished(tmp_path, "task=prune", "method=fixed", "task.n=1", test__accuracy=0.4),
        finished(tmp_path, "task=prune", "method=fixed", "model=vim_nano", test__accuracy=0.3),
        finished(tmp_path, "task=prune", "method=fixed", *TEXT, test__perplexity=7.0),
        finished(tmp_path, "task=classify", "method=fixed", "model=vit_nano", test__accuracy=0.2),
    ]
    titles = [line for line in table_of(plans, tmp_path / "table").splitlines() if line.startswith("## ")]
    assert titles == [
        "## prune: digits, vit_nano, 2:4",
        "## prune: digits, vit_nano, 1:4",
        "## prune: digits, vim_nano, 2:4",
        "## prune: pydocs, llama_nano, 2:4",
        "## classify: digits, vit_nano",
    ]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("task.num_groups", ("1", "2")),
        ("task.pruner", ("wanda", "ria")),
        ("trainer.max_steps", ("10", "20")),
        ("optim.beta1", ("0.9", "0.8")),
        ("data.batch_size", ("16", "32")),
        ("method.temperature", ("0.5", "{kind: linear, start: 1.0, end: 0.1}")),
    ],
)
def test_rows_name_what_differs_between_them(key: str, values: tuple[str, str], tmp_path: Path) -> None:
    words = ("task=prune", "method=sort_ste", "trainer.val_check_interval=5")
    plans = [finished(tmp_path, *words, f"{key}={value}", test__accuracy=0.5) for value in values]
    rows = rows_of(table_of(plans, tmp_path / "table"))
    labels = [label for label in rows if label not in ("", "---")]
    assert len(labels) == 2
    name = key.removeprefix("method.")
    assert all(value in label for value, label in zip(values[:1], labels, strict=False))
    if key != "task.pruner":
        assert all(label.startswith("wanda + sort_ste ") and name in label for label in labels)
    else:
        assert labels == ["wanda + sort_ste", "ria + sort_ste"]


def test_orders_of_a_classification(tmp_path: Path) -> None:
    plans = [
        finished(tmp_path, "method=fixed", "task.control=false", test__accuracy=0.5),
        finished(tmp_path, "method=sort_ste", "task.control=false", test__accuracy=0.6),
    ]
    rows = rows_of(table_of(plans, tmp_path / "table"))
    assert rows["fixed"] == ["50.0", "", "1"]
    assert rows["sort_ste"] == ["60.0", "+10.0 (+10.0)", "1"]


def test_hours_count_what_runs_needed_before_them(tmp_path: Path) -> None:
    plans = accuracies(tmp_path / "runs")[:2]
    for plan, seconds in zip(plans, (1800.0, 5400.0), strict=True):
        write_json(plan.directory / "summary.json", {"test/accuracy": 0.5, "train/seconds": seconds})
    dense = finished(tmp_path / "runs", "task=classify", "method=fixed", **{"train/seconds": 3600.0})
    assert table_of(plans, tmp_path / "table").endswith(" 2 runs, 2.00 hours in all.\n")
    assert table_of(plans, tmp_path / "table", before=[dense]).endswith(" 3 runs, 3.00 hours in all.\n")


def test_nothing_finished_is_an_empty_table(tmp_path: Path) -> None:
    assert table_of([], tmp_path / "table").strip().endswith("Computed on: unknown.")
    assert (tmp_path / "table.csv").read_text().strip() == ""
