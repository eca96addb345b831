"""Compiled kernels: machine code is kept, but not beyond the code that it was made from."""

import fcntl
import importlib.util
import time
from pathlib import Path
from threading import Timer

import pytest
from numba import int64
from numba.core.caching import FunctionCache

from permlab.ops import kernel


def test_machine_code_made_with_another_version_of_this_package_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "twice.py").write_text("def twice(x):\n    return 2 * x\n")
    spec = importlib.util.spec_from_file_location("twice", tmp_path / "twice.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def hits() -> int:
        compiled = kernel.compile_kernel(module.twice, int64(int64))
        assert compiled(21) == 42
        return sum(compiled.stats.cache_hits.values())

    assert [hits(), hits()] == [0, 1]
    monkeypatch.setattr(kernel, "_THIS_FILE", "another")
    assert hits() == 0


def test_of_processes_that_start_together_one_compiles_and_the_others_wait() -> None:
    def fourfold(x):
        return 4 * x

    cache = kernel._Cache(fourfold)
    folder = Path(cache._cache_path)
    folder.mkdir(parents=True, exist_ok=True)
    other = (folder / f"{cache._impl.filename_base}.lock").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)
    Timer(0.3, other.close).start()
    began = time.monotonic()
    assert kernel.compile_kernel(fourfold, int64(int64))(3) == 12
    assert time.monotonic() - began >= 0.25


class NoPlace(FunctionCache):
    def __init__(self, function) -> None:
        raise RuntimeError("cannot cache function: no locator available")


class FullDisk(FunctionCache):
    def save_overload(self, *arguments) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("cache", [NoPlace, FullDisk])
def test_compilation_does_without_a_cache_where_none_can_be_written(
    cache: type[FunctionCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    def thrice(x):
        return 3 * x

    monkeypatch.setattr(kernel, "_Cache", cache)
    compiled = kernel.compile_kernel(thrice, int64(int64))
    assert compiled(14) == 42
    assert not compiled.stats.cache_hits
