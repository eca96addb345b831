"""Compiled kernels: machine code is kept, but not beyond the code that it was made from."""

import importlib.util
from pathlib import Path

import pytest
from numba import int64

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
