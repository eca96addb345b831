"""Run a model of any library on inputs in any of the forms in which such models take them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def run_model(model: nn.Module, inputs: Any) -> Tensor:
    """Output of a model as one tensor, in float32 at least.

    Args:
        model: ours, timm's or transformers'; where it returns a mapping, the logits in it count, or its first value.
        inputs: a tensor, a tuple of arguments or a dict of keywords.
    """
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    output = output if isinstance(output, Tensor) else getattr(output, "logits", output[0])
    return output.to(torch.promote_types(output.dtype, torch.float32))


def widen(inputs: Any) -> Any:
    """The same inputs, floating-point tensors of half precision in single."""
    if isinstance(inputs, Mapping):
        return {name: widen(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(widen(value) for value in inputs)
    is_half = isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.dtype.itemsize < 4
    return inputs.float() if is_half else inputs
