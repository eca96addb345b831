"""Where data sets and models are had: size, licence and hashes, from the comments at the head of their presets."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FIELDS = ("Size", "Licence", "From", "Debian", "Torchvision", "Hub", "Package")
REQUIRED = FIELDS[:3]
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class Source:
    """What is known of a data set or a model before a byte of it is here.

    Args:
        name: of the preset.
        summary: its help line.
        size: of the download, in words that begin with a number and a unit where it is known.
        licence: name of the licence.
        origin: where the files are had, and what has to be done with them.
        debian: name of a Debian package, and the folder in which it installs the files.
        torchvision: class of `torchvision.datasets` that downloads them.
        hub: name of a repository on the Hugging Face hub, or of a model in timm.
        package: a Python package as pip names it, with its version, and the file in it.
        hashes: SHA-256 that a file may have, by its name.
    """

    name: str
    summary: str
    size: str
    licence: str
    origin: str
    debian: tuple[str, str] | None = None
    torchvision: str | None = None
    hub: str | None = None
    package: tuple[str, str] | None = None
    hashes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> float:
        """Size of the download; 0 where it is not known."""
        found = re.match(r"([\d.]+) (kB|MB|GB)", self.size)
        return float(found[1]) * UNITS[found[2]] if found else 0.0

    def problem(self, folder: Path) -> str | None:
        """What is wrong with the first file in a folder that is not what it should be; None if all are whole."""
        for name, allowed in self.hashes.items():
            path = folder / name
            if not path.is_file():
                return f"{path}: no such file"
            if sha256(path) not in allowed:
                return f"{path}: is not the file that was published (SHA-256 {sha256(path)[:12]}...)"
        return None


def read_source(path: Path) -> Source:
    """Facts at the head of a preset.

    Raises:
        ValueError: naming the line that is missing.
    """
    lines = path.read_text().splitlines()
    facts, hashes = {}, dict[str, tuple[str, ...]]()
    for line in lines:
        if found := re.fullmatch(rf"# ({'|'.join(FIELDS)}): (.+)", line):
            facts[found[1]] = found[2]
        if found := re.fullmatch(r"# ([0-9a-f]{64})  (\S+)", line):
            hashes[found[2]] = (*hashes.get(found[2], ()), found[1])
    missing = [name for name in REQUIRED if name not in facts]
    if missing:
        raise ValueError(f"{path}: its comments have no line `# {missing[0]}: ...`")
    return Source(
        path.stem,
        lines[0].lstrip("# "),
        facts["Size"],
        facts["Licence"],
        facts["From"],
        debian=_pair(facts.get("Debian")),
        torchvision=facts.get("Torchvision"),
        hub=facts.get("Hub"),
        package=_pair(facts.get("Package")),
        hashes=hashes,
    )


def _pair(fact: str | None) -> tuple[str, str] | None:
    package, _, place = (fact or "").partition(" ")
    return (package, place) if package else None


def read_settings(path: Path, data: str) -> dict[str, Any]:
    """Settings of a preset and of those that it is made from, without Hydra.

    Args:
        data: what `paths.data` is.
    """
    own = yaml.safe_load(path.read_text())
    merged: dict[str, Any] = {"component": path.stem}
    for parent in own.pop("defaults", []):
        merged |= read_settings(path.with_name(f"{parent}.yaml"), data) if parent != "_self_" else {}
    merged |= own
    return {key: v.replace("${paths.data}", data) if isinstance(v, str) else v for key, v in merged.items()}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_published(path: Path) -> bool:
    """Whether the comments of a preset say how it is had."""
    return any(line.startswith("# From: ") for line in path.read_text().splitlines())
