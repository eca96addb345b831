"""Shared fixtures; shapes in annotations are checked by beartype throughout the tests."""

import fcntl
import os
from collections.abc import Iterator

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping

jaxtyping.install_import_hook(
    ["permlab.ops", "permlab.permutation", "permlab.method", "permlab.model", "permlab.sparsity"],
    # An int where a float is annotated is what YAML gives; it is right.
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import pytest
import torch

# The tests' tensors are small: a second thread gains nothing and loses much on a busy machine.
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """A test that is marked `alone`, as it measures time, runs while no other process of the session runs one.

    Tests hold a file's lock together, such a one by itself. It keeps the door closed while it waits,
    so that those that are over do not make way for new ones.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    folder = item.config._tmp_path_factory.getbasetemp().parent  # type: ignore[attr-defined]
    mode = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    with (folder / "door").open("w") as door, (folder / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, mode)
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def _one_format() -> Iterator[None]:
    """Runs draw their figures once, not thrice: tests/figure/test_draw.py looks at the other formats."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("permlab.figure.draw.FORMATS", ("png",))
        yield


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a run leaves its own


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace) -> None:
    doctest_namespace["torch"] = torch


@pytest.fixture
def unchecked():
    """What a user has: no type checker that catches a wrong dtype or shape before the code does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
