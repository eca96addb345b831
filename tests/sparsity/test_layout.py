"""Who opens the folder of an export."""

import json

import pytest
from torch import nn
from transformers import AutoConfig

from permlab.sparsity.layout import OWN_WEIGHTS, WEIGHTS, closed, find_layout


def test_a_model_of_no_library_is_ours_alone_and_says_so(tmp_path):
    layout = find_layout(nn.Sequential(nn.Linear(2, 2)))
    assert layout.weights == WEIGHTS
    assert layout.rename("0.weight") == "0.weight"
    layout.write(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": layout.opens}
    with pytest.raises(ValueError, match=r"Sequential, which permlab\.sparsity\.export\.load_export reads"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_closed_folder_hides_its_weights(tmp_path):
    assert closed("mine").weights == OWN_WEIGHTS
