"""Shared fixtures; shapes in annotations are checked by beartype throughout the tests."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook(["permlab.ops", "permlab.permutation", "permlab.method", "permlab.model"], "beartype.beartype")

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace) -> None:
    doctest_namespace["torch"] = torch
