import numpy as np
import pytest
import torch
from tiny_models import tiny

from permlab.sparsity.pattern import read_patterns, verify_pattern
from permlab.sparsity.site import read_sites


def test_patterns_against_counting_by_hand():
    weight = torch.randn(6, 16) * (torch.rand(6, 16) < 0.4)
    worst = max(int((weight[r, c : c + 8] != 0).sum()) for r in range(6) for c in (0, 8))
    assert verify_pattern({"w": weight}, {"w": {"n": worst, "m": 8}}) == {
        "num_tensors": 1, "num_groups": 12, "nonzero_fraction": pytest.approx(np.count_nonzero(weight.numpy()) / 96),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"w is not {worst - 1}:8 in columns"):
        verify_pattern({"w": weight}, {"w": {"n": worst - 1, "m": 8}})


def test_broken_patterns_are_named():
    good, bad = torch.eye(4), torch.eye(4)
    bad[2, 0] = 1
    with pytest.raises(ValueError, match="b is not 1:4 in columns 0 to 3 of row 2, which hold 2 values"):
        verify_pattern({"a": good, "b": bad}, {"a": {"n": 1, "m": 4}, "b": {"n": 1, "m": 4}})
    assert verify_pattern({"b": bad}, {"b": {"n": 1, "m": 4, "rows": [[0, 2], [3, 4]]}})["num_groups"] == 3
    with pytest.raises(ValueError, match="there is no tensor c"):
        verify_pattern({"a": good}, {"c": {"n": 1, "m": 4}})
    with pytest.raises(ValueError, match="a: groups of 3 do not divide 4 columns"):
        verify_pattern({"a": good}, {"a": {"n": 1, "m": 3}})


def test_patterns_of_sites_name_rows_only_where_some_are_dense():
    model = tiny("vit")
    whole = {f"blocks.{i}.attn.qkv.weight": {"n": 1, "m": 2} for i in range(2)}
    assert read_patterns(read_sites(model, select=["attn.qkv"]), n=1, m=2) == whole
    sites = read_sites(model, select=["attn.k", "attn.v"], coupling="independent")
    assert read_patterns(sites, n=1, m=2) == {
        name: {"n": 1, "m": 2, "rows": [[16, 32], [32, 48]]} for name in whole
    }  # fmt: skip
