"""Pages for strangers keep their word: examples run, commands compose, links lead somewhere."""

import doctest
import importlib.util
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure

from permlab.config.compose import resolve_train
from permlab.config.evaluation import check_evaluation
from permlab.permutation import Site

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


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    found = importlib.util.spec_from_file_location("draw_concepts", ROOT / "scripts" / "draw_concepts.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


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
    for columns, share in ((range(8), "71%"), (drawing.best_grouping(scores).tolist(), "80%")):
        fours = scores[:, list(columns)].reshape(4, 2, 4)
        assert f"{fours.topk(2).values.sum() / scores.sum():.0%}" == share
        assert share in words(drawing.site())
        assert share.replace("%", " %") in text("concepts")


# Commands

# Where the settings that a reader is to supply stand for something of his own.
OWN = re.compile(r"<|\$|photos|books|mine|paths\.data|export=")


def commands(page: str) -> list[str]:
    """Command lines of the scripts at the root, without their comments."""
    lines = re.findall(r"^python (train\.py .*|eval\.py .*)$", "\n".join(blocks(page, "(?:sh|console)?")), re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in lines]


@pytest.mark.parametrize(
    ("page", "command"), [(page, command) for page in PAGES for command in commands(page) if not OWN.search(command)]
)
def test_commands_compose(page: str, command: str) -> None:
    from permlab.study.grid import expand

    script, *rest = shlex.split(command)
    assert script == "train.py"
    jobs = expand([word for word in rest if word != "-m"]) if "-m" in rest else [rest]
    for job in (jobs[0], jobs[-1]):
        assert resolve_train(job)[1] == [], "a setting without effect"
