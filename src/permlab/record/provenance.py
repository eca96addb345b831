"""Where a run's code came from and what it ran on; nothing that names the host or its user."""

import hashlib
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from permlab.config.secret import redact

PACKAGE = Path(__file__).resolve().parents[1]
NAME = "provenance.json"
# fmt: off
PACKAGES = (
    "permlab", "torch", "torchvision", "lightning", "torchmetrics", "timm", "transformers", "numpy", "scipy",
    "scikit-learn", "hydra-core", "wandb", "mamba-ssm", "causal-conv1d",
)
# fmt: on


def collect(*, device: str | None, command: str | None = None) -> dict[str, Any]:
    """Facts that tell whether two runs are comparable, as plain containers.

    Keys are `git_sha`, `git_dirty`, `git_diff_sha256` (None outside a checkout, the last also
    where nothing differs from the commit), `lock_sha256` (None without a lock), `versions` of
    the installed main packages, `python`, `platform`, `device` and `command`.

    Args:
        device: what the run computes on, see `device_name`.
        command: None for that of this process.
    """
    root = _checkout()
    lock = PACKAGE.parents[1] / "requirements.lock"
    return {
        **_git_state(root),
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None,
        "versions": versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "command": redact(command or shlex.join(["python", *_program(Path(sys.argv[0])), *sys.argv[1:]])),
    }


def _program(path: Path) -> list[str]:
    """What stands behind `python`: a script, or a package with -m."""
    return ["-m", path.parent.name] if path.name == "__main__.py" else [path.name]


def read_provenance(run_dir: Path) -> dict[str, Any]:
    """Where a run's code came from and what it ran on; empty where that was not recorded."""
    path = run_dir / NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def versions() -> dict[str, str]:
    """Installed versions of the main packages, from their metadata: nothing is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(accelerator: str) -> str:
    """What Lightning's `accelerator` means on this machine: `2 x NVIDIA A100`, or `cpu, 4 threads`. Imports torch."""
    import torch

    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"cpu, {torch.get_num_threads()} threads"


def peak_memory_mib() -> float:
    """Highest use of memory so far: of the GPU's where there is one, else of the process. Imports torch."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _checkout() -> Path | None:
    """Root of the git checkout that tracks this very package; None for an installed copy, or without git."""
    if _git(PACKAGE, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    root = _git(PACKAGE, "rev-parse", "--show-toplevel")
    return Path(os.fsdecode(root).rstrip("\n")) if root else None


def _git_state(root: Path | None) -> dict[str, Any]:
    if root is None:
        return {"git_sha": None, "git_dirty": None, "git_diff_sha256": None}
    sha = _git(root, "rev-parse", "HEAD") or b""
    difference = (_git(root, "diff", "HEAD", "--binary", "--no-ext-diff") or b"") + _untracked(root)
    return {
        "git_sha": sha.decode().strip() or None,
        "git_dirty": bool(difference),
        "git_diff_sha256": hashlib.sha256(difference).hexdigest() if difference else None,
    }


def _untracked(root: Path) -> bytes:
    """Names and contents of new code and configuration: a new method is a file that git does not know yet."""
    patterns = [f"{PACKAGE.relative_to(root)}/*.py", "conf/*.yaml"]
    listed = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *patterns) or b""
    paths = [os.fsdecode(name) for name in sorted(listed.split(b"\0")) if name]
    return b"".join(os.fsencode(path) + b"\0" + (root / path).read_bytes() for path in paths if (root / path).is_file())


def _git(folder: Path, *arguments: str) -> bytes | None:
    """Output of a git command; None where git is missing or refuses."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
