"""What flows into the layers of a model, collected by hooks on its real forward pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Forward = Callable[[Tensor], Any]


@dataclass
class InputStatistics:
    """Second moments of a linear layer's input over calibration tokens.

    Args:
        hessian: `X^T X` summed over the tokens, `[in, in]`, float32 at least.
        num_tokens: tokens seen.
    """

    hessian: Float[Tensor, "i i"]
    num_tokens: int

    @property
    def norm(self) -> Float[Tensor, " i"]:
        """L2 norm of each input channel."""
        return self.hessian.diagonal().clamp_min(0).sqrt()


@torch.no_grad()
def collect(
    forward: Forward, modules: Mapping[str, nn.Module], batches: Iterable[Tensor]
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of these layers, in one pass of the model over the batches.

    Works with any module whose first argument is its input `[..., in]`, timm's and transformers'
    included.

    Args:
        forward: runs the model on a batch.
        modules: layers by name.
        batches: inputs of the model.
    Raises:
        ValueError: if there is no batch, a layer is never called, or its inputs are not finite.
    Source: Sun et al. 2024, arXiv:2306.11695 (norms), Frantar and Alistarh 2023, arXiv:2301.00774.
    Differs from source: all layers in one pass of the dense model, not block after pruned block.
    """
    found: dict[str, InputStatistics] = {}

    def add(name: str, module: nn.Module, x: Tensor) -> None:
        tokens = x.detach().flatten(0, -2)
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        product = tokens.mT @ tokens
        if name in found:
            found[name].hessian += product
            found[name].num_tokens += len(tokens)
        else:
            found[name] = InputStatistics(product, len(tokens))

    num_batches = 0
    with _on_inputs(modules, add):
        for batch in batches:
            forward(batch)
            num_batches += 1
    if num_batches == 0:
        raise ValueError("the calibration set is empty")
    for name in modules:
        if name not in found:
            raise ValueError(f"layer {name} was not called in the forward pass")
        if not torch.isfinite(found[name].hessian).all():
            raise ValueError(f"the inputs of layer {name} are not finite")
    return found


@torch.no_grad()
def reconstruction_errors(
    forward: Forward, weights: Mapping[str, tuple[nn.Linear, Tensor]], batches: Iterable[Tensor]
) -> dict[str, float]:
    """Relative error of each layer's output with other weights, on the inputs that the model gives it.

    The error is `||X (W - W')^T|| / ||X W^T||` over all tokens of the batches, without the bias.

    Args:
        forward: runs the dense model on a batch.
        weights: dense layer and other weight, by name.
        batches: inputs of the model, best ones that nothing was fitted to.
    """
    lost = dict.fromkeys(weights, 0.0)
    whole = dict.fromkeys(weights, 0.0)

    def add(name: str, module: nn.Module, x: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        difference = module.weight - weights[name][1].to(module.weight)
        lost[name] += float((x @ difference.mT).double().square().sum())
        whole[name] += float((x @ module.weight.mT).double().square().sum())

    with _on_inputs({name: layer for name, (layer, _) in weights.items()}, add):
        for batch in batches:
            forward(batch)
    return {name: (lost[name] / max(whole[name], 1e-300)) ** 0.5 for name in weights}


@contextmanager
def _on_inputs(modules: Mapping[str, nn.Module], act: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: act(name, module, arguments[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Keep the latest output of each of these modules, by name, from the forward passes made inside.

    A module that returns several tensors is kept with the first of them.
    """
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
