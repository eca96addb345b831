"""Models of ours as timm's own: the same outputs."""

import pytest
import torch
from pruned_models import case
from tiny_models import outputs, tiny
from torch import nn

from permlab.sparsity.fold import fold
from permlab.sparsity.interop import as_timm


@pytest.mark.parametrize("choice", [{"select": "foldable"}, {}, {"coupling": "independent"}])
def test_a_vision_model_is_timms_own(choice):
    setting = case("vit", **choice)
    fold(setting["pruned"], setting["sites"], setting["orders"])
    copied = as_timm(setting["pruned"])
    torch.testing.assert_close(copied(setting["inputs"]), outputs(setting["pruned"], setting["inputs"]))
    assert copied.state_dict().keys() == setting["pruned"].state_dict().keys()
    assert copied.blocks[0].mlp.fc2.weight is not setting["pruned"].blocks[0].mlp.fc2.weight


def test_models_that_timm_has_not_are_refused():
    with pytest.raises(ValueError, match="got Vit, position=slot, readout=mean"):
        as_timm(tiny("vit_mean_slot"))
    with pytest.raises(ValueError, match="got Linear"):
        as_timm(nn.Linear(2, 2))
