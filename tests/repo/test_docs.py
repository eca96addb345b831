"""Pages for strangers keep their word: examples run, commands compose, links lead somewhere."""

import doctest
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from permlab.config.compose import resolve_train
from permlab.data.spec import DataSpec
from permlab.option import options_of
from permlab.permutation import Site, order_to_matrix
from permlab.study.grid import expand

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = ("concepts", "tutorial", "own_data", "faq")


def text(page: str) -> str:
    return (DOCS / f"{page}.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [path.stem for path in sorted(DOCS.glob("*.md"))])
def test_links_and_pictures_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text(page))
    assert [link for link in links if not (DOCS / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_the_readme_leads_to_the_page(page: str) -> None:
    assert f"(docs/{page}.md)" in (ROOT / "README.md").read_text()


# Concepts


def test_examples_of_the_concepts_are_true() -> None:
    source = "\n".join(blocks("concepts", "python"))
    examples = doctest.DocTestParser().get_doctest(source, {}, "concepts.md", str(DOCS / "concepts.md"), 0)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples, out=said.append)
    assert result.attempted > 15
    assert result.failed == 0, "".join(said)


def load_module(path: Path) -> ModuleType:
    """The module in a file that is no part of the package."""
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    return load_module(ROOT / "scripts" / "draw_concepts.py")


def words(figure: Figure) -> str:
    """All that is written in a figure."""
    import matplotlib.text

    return "\n".join(part.get_text() for part in figure.findobj(matplotlib.text.Text))


def test_every_concept_is_drawn_in_both_formats(drawing: ModuleType) -> None:
    for name in drawing.PICTURES:
        assert f"(images/concept_{name}.png)" in text("concepts")
        assert (DOCS / "images" / f"concept_{name}.svg").is_file()


def test_what_the_pictures_say_is_true(drawing: ModuleType) -> None:
    said = words(drawing.order())
    order = [int(number) for number in re.findall(r"\d", re.findall(r"order = \[(.*?)\]", said)[0])]
    rank = [int(number) for number in re.findall(r"\d", re.findall(r"rank = \[(.*?)\]", said)[0])]
    assert rank == sorted(range(5), key=order.__getitem__) != order
    scores = torch.tensor(drawing.WEIGHTS)
    said = words(drawing.site())
    for columns, share in ((range(8), "71%"), (drawing.best_grouping(scores).tolist(), "80%")):
        fours = scores[:, list(columns)].reshape(4, 2, 4)
        assert f"{fours.topk(2).values.sum() / scores.sum():.0%}" == share
        assert share in said
        assert share.replace("%", " %") in text("concepts")


# Commands

# Where a reader puts in something of his own.
OWN = re.compile(r"<|photos|books|mine|tempreature")


def commands(page: str) -> list[str]:
    """What follows `python train.py`, without comments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].removeprefix("python train.py").strip() for line in lines if "train.py" in line]


@pytest.mark.parametrize(
    ("page", "command"), [(page, command) for page in PAGES for command in commands(page) if not OWN.search(command)]
)
def test_commands_compose(page: str, command: str) -> None:
    words = shlex.split(command)
    jobs = expand([word for word in words if word != "-m"]) if "-m" in words else [words]
    for job in (jobs[0], jobs[-1]):
        assert resolve_train(job)[1] == [], "a setting without effect"


def test_samples_say_what_printed_them() -> None:
    """So that they are found when the output changes: each is of a command on the page, or one that it shows."""
    for page in ("tutorial", "own_data"):
        marked = re.findall(r"^<!-- sample: python (.*) -->\n```$", text(page), flags=re.MULTILINE)
        assert len(marked) >= 2
        given = [" ".join(line.split()) for line in "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()]
        shown = [line.partition(" #")[0].strip() for line in given] + ["python train.py"]
        for command in marked:
            line = re.sub(r"run=\S+", "run=<run directory>", f"python {command}")
            assert " ".join(line.split()) in shown, f"{page}.md: {command}"


# Code


def files(page: str) -> dict[str, str]:
    """Contents by the path that stands above them."""
    found = re.findall(
        r"^`((?:src|conf|tests)/[\w/.]+)`:\n\n```\w+\n(.*?)^```$", text(page), flags=re.MULTILINE | re.DOTALL
    )
    return dict(found)


def written(page: str, path: str, folder: Path) -> ModuleType:
    """The module of a page, as a reader would write it."""
    place = folder / Path(path).name
    place.write_text(files(page)[path])
    return load_module(place)


def test_the_method_of_the_tutorial_works(tmp_path: Path) -> None:
    """The whole battery passes with it; here are its beginnings."""
    values = files("tutorial")["conf/method/mine.yaml"]
    assert values.startswith("# ")
    module = written("tutorial", "src/permlab/method/mine.py", tmp_path)
    settings = yaml.safe_load(values)
    assert settings.pop("order") == "row"
    assert options_of(tmp_path / "mine.py", "Mine").keys() == settings.keys()
    order = torch.tensor([4, 0, 3, 1, 5, 2])
    method = module.Mine(Site(name="patches", order=order), **settings)
    assert torch.equal(method.best(), order)
    sample = method()
    assert torch.equal(sample.order, order)
    assert torch.allclose(sample.soft.sum(-1), torch.ones(6))
    sample.soft[0, 3].backward()
    assert method.scorer.vector.grad.abs().sum() > 0
    method.temperature = 1e-3
    assert torch.allclose(method.soft_matrix(), order_to_matrix(order), atol=1e-3)
    method.scorer.vector.data.neg_()
    assert torch.equal(method.best(), order.flip(0))


def test_the_data_set_of_the_page_works(tmp_path: Path) -> None:
    module = written("own_data", "src/permlab/data/mine.py", tmp_path)
    settings = yaml.safe_load(files("own_data")["conf/data/mine.yaml"])
    written("own_data", "tests/data/test_mine.py", tmp_path).make_files(tmp_path)
    assert {"batch_size", "num_workers"} | options_of(tmp_path / "mine.py", "Mine").keys() == settings.keys()
    data = module.Mine(root=str(tmp_path), val_fraction=0.2, test_fraction=0.2)
    assert data.spec() == DataSpec("image", 3, channels=1, height=8, width=8, patch_size=1)
    parts = {split: data.dataset(split, 0).inputs.flatten(1).tolist() for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [36, 12, 12]
    assert len({tuple(sample) for part in parts.values() for sample in part}) == 60
    (tmp_path / "images.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"images\.npz"):
        data.spec()


def test_files_of_a_run_are_read_as_the_tutorial_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "arrays").mkdir()
    np.savez(tmp_path / "arrays" / "order.npz", order=np.arange(64)[::-1])
    summary = {"test/accuracy": 0.75, "test/accuracy_refit": 0.8, "test/accuracy_control": 0.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": 50, "train/loss": 1.0}, {"step": 100, "val/accuracy": 0.7}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (code,) = (block for block in blocks("tutorial", "python") if "<run directory>" in block)
    exec(code.replace("<run directory>", str(tmp_path)), {})  # noqa: S102 (the page's own)
    out = capsys.readouterr().out
    assert "0.750, refit over control +0.300" in out
    assert "read first: [63 62 61 60" in out
    assert "[[63 62" in out
    assert "[(100, 0.7)]" in out


def test_weights_are_read_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("faq", "python")
    (tmp_path / "arrays").mkdir()
    (tmp_path / "checkpoints").mkdir()
    np.savez(tmp_path / "arrays" / "order.npz", order=np.arange(4))
    torch.save({"state_dict": {"model.weight": torch.ones(2)}}, tmp_path / "checkpoints" / "best.ckpt")
    found: dict[str, object] = {}
    exec(code.replace("<run directory>", str(tmp_path)), found)  # noqa: S102 (the page's own)
    assert list(found["state"]) == ["model.weight"]  # type: ignore[call-overload]


# Citation


def test_the_citation_is_whole_and_in_step() -> None:
    """With what the format, version 1.2.0, asks for, and no person who is not one."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    assert cited["authors"] == [{"name": "The permlab authors"}]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert "(CITATION.cff)" in (ROOT / "README.md").read_text()
