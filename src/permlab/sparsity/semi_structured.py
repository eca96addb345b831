"""Give the pruned layers of a model torch's kernels for 2:4 sparsity, and time them."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from permlab.sparsity.fold import GatheredLinear
from permlab.sparsity.pattern import Pattern, under_names_of, verify_pattern
from permlab.sparsity.run_model import run_model


class SemiStructuredLinear(nn.Module):
    """Linear layer whose pruned rows are stored as values and 2-bit places, for 2:4 kernels; inference only.

    Args:
        linear: on CUDA, its pruned rows contiguously 2:4; a `GatheredLinear` keeps its gather.
        rows: half-open ranges of pruned rows; the other rows stay dense.
    Raises:
        RuntimeError: from torch, where it has no kernel for the shape or dtype.
    """

    def __init__(self, linear: nn.Linear, rows: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.parts, self.orders = nn.ModuleList(), []
        ends = [0, *torch.tensor(getattr(linear, "splits", [linear.out_features])).cumsum(0).tolist()]
        edges = sorted({*ends, *(edge for stretch in rows for edge in stretch)})
        for start, stop in itertools.pairwise(edges):
            weight = linear.weight.detach()[start:stop].contiguous()
            if any(first <= start and stop <= last for first, last in rows):
                weight = torch.sparse.to_sparse_semi_structured(weight)
            part = nn.Linear(self.in_features, stop - start, bias=linear.bias is not None, device="meta")
            part.weight = nn.Parameter(weight, requires_grad=False)
            if linear.bias is not None:
                part.bias = nn.Parameter(linear.bias.detach()[start:stop], requires_grad=False)
            self.parts.append(part)
            if isinstance(linear, GatheredLinear):
                index = sum(end <= start for end in ends) - 1
                self.orders.append(linear.input_order.view(-1, self.in_features)[index])

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        gathered = self.gather(input)
        outputs = [part(x) for x, part in zip(gathered, self.parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def gather(self, input: Float[Tensor, "*b i"]) -> list[Float[Tensor, "*b i"]]:
        """Input of every part; the sparse kernels want it contiguous."""
        if not self.orders:
            return [input.contiguous()] * len(self.parts)
        return [input.index_select(-1, order) for order in self.orders]


@torch.no_grad()
def to_semi_structured(model: nn.Module, patterns: Mapping[str, Pattern]) -> dict[str, str]:
    """Give pruned linear layers torch's 2:4 kernels, in place; inference only.

    Args:
        model: on CUDA, in a layout in which the pruned weights are contiguously 2:4, as from `load_export`.
        patterns: of the pruned weights, `tensors` of `sparsity.json`.
    Returns:
        For each weight that torch has no kernel for, its reason by name; these stay dense.
    Raises:
        ValueError: without CUDA, or if a pattern is not 2:4 or is not kept.
    Source: torch.sparse.to_sparse_semi_structured.
    """
    _check_cuda(model)
    for name, pattern in patterns.items():
        if (pattern["n"], pattern["m"]) != (2, 4):
            raise ValueError(f"{name} is {pattern['n']}:{pattern['m']}; torch has kernels for 2:4 only")
    verify_pattern(model.state_dict(), patterns)
    reasons = {}
    patterns = under_names_of(model.state_dict(), patterns)
    for name, pattern in patterns.items():
        path = name.removesuffix(".weight")
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear) or type(linear) not in (nn.Linear, GatheredLinear):
            # A class of its own computes something of its own.
            reasons[name] = f"{path} is a {type(linear).__name__}"
            continue
        parent, _, leaf = path.rpartition(".")
        try:
            sparse = SemiStructuredLinear(linear, pattern.get("rows", [[0, linear.out_features]]))
        except RuntimeError as error:
            reasons[name] = str(error)
        else:
            setattr(model.get_submodule(parent), leaf, sparse)
    return reasons


@torch.no_grad()
def time_layers(model: nn.Module, inputs: Any, *, num_repeats: int = 50) -> dict[str, dict[str, float]]:
    """Time of each sparse layer next to a dense one of its shape, on the inputs that the model gives it.

    The dense layer gathers nothing, as the model's own before it was pruned.

    Args:
        model: after `to_semi_structured`.
        inputs: of the model: a tensor, a tuple of arguments or a dict of keywords.
        num_repeats: calls of each layer that are timed together, after a fifth as many that are not.
    Returns:
        By layer: `dense_ms`, `sparse_ms` with the gather, and `gather_ms` alone.
    Raises:
        ValueError: without CUDA, or if no layer is sparse.
    """
    _check_cuda(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SemiStructuredLinear)}
    if not layers:
        raise ValueError("no layer of the model is sparse; call to_semi_structured first")
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: seen.update({name: arguments[0]})

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _time_layer(layers[name], x, num_repeats) for name, x in seen.items()}


def _time_layer(layer: SemiStructuredLinear, x: Tensor, num_repeats: int) -> dict[str, float]:
    weight = torch.randn(layer.out_features, layer.in_features, dtype=x.dtype, device=x.device)
    bias = None if layer.parts[0].bias is None else weight[:, 0].contiguous()
    return {
        "dense_ms": _time(lambda: F.linear(x, weight, bias), num_repeats),
        "sparse_ms": _time(lambda: layer(x), num_repeats),
        "gather_ms": _time(lambda: layer.gather(x), num_repeats) if layer.orders else 0.0,
    }


def _time(call: Callable[[], Any], num_repeats: int) -> float:
    """Milliseconds per call, from events on the device."""
    for _ in range(max(1, num_repeats // 5)):
        call()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(num_repeats):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / num_repeats


def _check_cuda(model: nn.Module) -> None:
    if not torch.cuda.is_available():
        raise ValueError("torch's 2:4 kernels run on CUDA, and this machine has none")
    if not all(parameter.is_cuda for parameter in model.parameters()):
        raise ValueError("torch's 2:4 kernels run on CUDA; move the model there first")
