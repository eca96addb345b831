"""The studies of real models compose: every option that their sweeps name exists and has an effect.

Models and data that are not in the repository have stand-ins of the same kind.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from permlab.config.check import checked
from permlab.config.compose import compose_config
from permlab.study.grid import read_sweep, studies, sweep_names

SWEEPS = sweep_names("real_")
STAND_INS = {
    "model=smollm2_135m": "model=llama_nano",
    "data.tokenizer=${model.pretrained}": "data.tokenizer=byte",
    "model=dinov2_s": "model=vit_nano model.patch_size=14",
    "data.num_val=1000": "data.num_val=3",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each of ten classes, of 28x28 pixels, in idx files."""
    root = tmp_path_factory.mktemp("data")
    (root / "fashion_mnist").mkdir()
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", np.zeros((20, 28, 28))), ("labels-idx1", np.arange(20) % 10)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (root / "fashion_mnist" / f"{part}-{kind}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
    return root


def words_of(job: list[str]) -> Iterator[str]:
    for word in job:
        yield from STAND_INS.get(word, word).split(" ")


@pytest.mark.parametrize("name", SWEEPS)
def test_its_jobs_compose_without_a_warning(name: str, data: Path) -> None:
    seen: set[str] = set()
    for job in read_sweep(name):
        new = {word for word in job if not word.startswith("seed=")} - seen
        seen |= new
        if not new:
            continue
        words = [*words_of(job), f"paths.data={data}"]
        composed, problems = compose_config("train", words)
        assert not problems, problems
        plan, warnings = checked(composed)
        # A sweep over methods sets keys that some of them do not have.
        assert [w for w in warnings if not w.startswith("method.")] == [], words
        assert plan.task.before(plan).keys() <= {"dense"}


def test_seeds_share_text_and_model() -> None:
    """So that what differs between them is the choice of samples for calibration."""
    for name in sweep_names("real_llm_"):
        assert {"data.split_seed=0"} == {word for job in read_sweep(name) for word in job if "split_seed" in word}
        assert {word for job in read_sweep(name) for word in job if word.startswith("seed=")} == {
            f"seed={seed}" for seed in range(3)
        }


def test_they_are_studies_of_their_own() -> None:
    found = studies()
    assert set(found["real_llm"]) | set(found["real_vit"]) == set(SWEEPS) == set(found["real"])
    assert found["real_llm"] == sorted(found["real_llm"])
    assert "ablate" in found
    assert "ablate_prune" not in found  # the same sweeps by a longer name
