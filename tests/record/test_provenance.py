"""Where a run's code came from: read from git, without secrets and without imports."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from permlab.record import provenance


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout whose package provenance believes to be part of."""
    package = tmp_path / "src" / "permlab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (tmp_path / "requirements.lock").write_text("numpy==2\n")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q", "-b", "trunk"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    monkeypatch.setattr(provenance, "PACKAGE", package)
    return tmp_path


def state() -> tuple[bool, str | None]:
    facts = provenance.collect(device=None)
    return facts["git_dirty"], facts["git_diff_sha256"]


def test_a_clean_checkout(checkout: Path) -> None:
    facts = provenance.collect(device="cpu, 2 threads")
    assert facts["git_sha"] == (checkout / ".git" / "refs" / "heads" / "trunk").read_text().strip()
    assert (facts["git_dirty"], facts["git_diff_sha256"]) == (False, None)
    assert facts["lock_sha256"] == hashlib.sha256(b"numpy==2\n").hexdigest()
    assert facts["device"] == "cpu, 2 threads"


def test_every_change_of_code_changes_the_hash(checkout: Path) -> None:
    hashes = set()
    for path, text in (
        ("src/permlab/__init__.py", "x = 2\n"),
        ("src/permlab/method/new.py", "class New: ...\n"),
        ("src/permlab/method/new.py", "class New: pass\n"),
        ("conf/method/new.yaml", "order: row\n"),
    ):
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(text)
        dirty, digest = state()
        assert dirty
        hashes.add(digest)
    assert len(hashes) == 4
    assert state() == state()


def test_results_and_ignored_files_are_no_change(checkout: Path) -> None:
    (checkout / "runs").mkdir()
    (checkout / "runs" / "config.yaml").write_text("seed: 0\n")
    (checkout / "src" / "permlab" / "ignored.py").write_text("x = 1\n")
    assert state() == (False, None)


def test_an_installed_copy_inside_a_foreign_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = checkout / ".venv" / "lib" / "permlab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    facts = provenance.collect(device=None)
    assert [facts[key] for key in ("git_sha", "git_dirty", "git_diff_sha256", "lock_sha256")] == [None] * 4


def test_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert provenance.collect(device=None)["git_sha"] is None


def test_versions_are_those_that_would_be_imported() -> None:
    found = provenance.versions()
    assert found["numpy"] == np.__version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "permlab" in found


def test_the_command_without_the_environment_or_the_script_folder(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hidden-in-the-environment")
    monkeypatch.setattr(sys, "argv", ["/srv/lab/train.py", "method.order=random(3)", "seed=1"])
    facts = provenance.collect(device=None)
    assert facts["command"] == "python train.py 'method.order=random(3)' seed=1"
    text = json.dumps(facts)
    assert "hidden-in-the-environment" not in text
    assert "somebody" not in text


def test_the_command_of_a_package_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/srv/lab/src/permlab/__main__.py", "train", "seed=1"])
    assert provenance.collect(device=None)["command"] == "python -m permlab train seed=1"


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_device_name_of_a_cpu(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert provenance.device_name(accelerator) == f"cpu, {torch.get_num_threads()} threads"


def test_device_name_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert provenance.device_name("gpu") == "2 x Some GPU"
    assert provenance.device_name("cpu").startswith("cpu")
