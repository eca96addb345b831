"""Rules of the repository that no other test would notice being broken."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    ROOT / name
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
] or [path for path in ROOT.rglob("*") if path.is_file() and not {".git", ".venv", "runs"} & set(path.parts)]
TEXTS = [
    path for path in FILES if path.is_file() and path.suffix in {".py", ".yaml", ".md", ".toml", ".lock", ".txt", ""}
]


def matches(pattern: str, paths: list[Path]) -> list[str]:
    expression = re.compile(pattern)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in paths
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if expression.search(line)
    ]


def test_no_file_names_a_package_index() -> None:
    hosts = ["py" + "pi.org", "python" + "hosted", "registry.npm" + "js"]
    assert len(TEXTS) > 50
    assert matches("|".join(map(re.escape, hosts)), TEXTS) == []


def test_the_lock_has_a_hash_for_every_package_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    packages = re.findall(r"^([a-z0-9._-]+)==", text, flags=re.MULTILINE)
    blocks = re.split(r"^(?=[a-z0-9._-]+==)", text, flags=re.MULTILINE)[1:]
    assert {"torch", "lightning", "hydra-core", "timm", "torchvision"} <= set(packages)
    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text


def test_no_unpickling() -> None:
    sources = [path for path in TEXTS if path.suffix == ".py" and path.is_relative_to(ROOT / "src")]
    assert matches(r"weights_only=False|allow_pickle=True|\bimport pickle|yaml\.load\(|yaml\.unsafe", sources) == []


def test_vocabulary() -> None:
    sources = [path for path in TEXTS if path.suffix in {".py", ".yaml"} and not path.is_relative_to(ROOT / "tests")]
    assert matches(r"\btau\b\s*[:=]|\bperm\b\s*[:=]|\bnum_?(iter|step|sample|head)\b\s*[:=]", sources) == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "conf").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_configuration_file_starts_with_its_help_line(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert re.match(r"# \S.{15,}", first)


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_file_has_a_checked_header(path: Path) -> None:
    text = path.read_text()
    for field in ("Source", "Command", "Expected", "Cost", "Deviations"):
        assert re.search(rf"^# {field}: \S", text, flags=re.MULTILINE), field
    assert len(text.splitlines()) <= 30


def test_the_readme_links_to_files_that_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_prints_its_targets() -> None:
    out = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    assert {"make train", "make test", "make setup", "make check", "make lock", "make clean"} <= {
        " ".join(line.split()[:2]) for line in out.splitlines()
    }


def test_ci_calls_make_test() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
