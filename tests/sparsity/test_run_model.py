"""Inputs and outputs of models in all their forms."""

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from permlab.sparsity.run_model import run_model, widen


class Product(nn.Module):
    def forward(self, left: Tensor, right: Tensor | float = 2.0) -> Tensor:
        return left * right


@pytest.mark.parametrize(
    ("inputs", "expected"), [(torch.ones(2), 2.0), ((torch.ones(2), 3.0), 3.0), ({"left": torch.ones(2)}, 2.0)]
)
def test_inputs_come_in_three_forms(inputs: object, expected: float) -> None:
    assert run_model(Product(), inputs).tolist() == [expected] * 2


class Wrapped(nn.Module):
    """Returns what transformers' models return: logits by name, or a base model's features in the first place."""

    def forward(self, x: Tensor) -> object:
        return CausalLMOutput(loss=x.sum(), logits=x) if x.ndim == 1 else (x, None)


def test_the_logits_or_the_first_value_count_in_single_precision_at_least() -> None:
    for x in (torch.ones(2), torch.ones(2, 2)):
        assert torch.equal(run_model(Wrapped(), x), x)
    assert run_model(nn.Identity(), torch.ones(2).bfloat16()).dtype == torch.float32
    assert run_model(nn.Identity(), torch.ones(2).double()).dtype == torch.float64


def test_only_half_precision_is_widened() -> None:
    half, double, tokens = torch.ones(2).half(), torch.ones(2).double(), torch.arange(2)
    wide = widen({"a": half, "b": (double, tokens, 3)})
    assert wide["a"].dtype == torch.float32
    assert wide["b"][0] is double
    assert wide["b"][1] is tokens
    assert wide["b"][2] == 3
