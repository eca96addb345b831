"""Shared fixtures; shapes in annotations are checked by beartype throughout the tests."""

import os

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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace) -> None:
    doctest_namespace["torch"] = torch


@pytest.fixture
def unchecked():
    """What a user has: no type checker that catches a wrong dtype or shape before the code does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
