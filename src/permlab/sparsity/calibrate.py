"""What flows into the layers of a model, collected by hooks on its real forward pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from permlab.sparsity.importance import inverse_diagonal

Forward = Callable[[Any], Any]


class InputStatistics:
    """Second moments of a linear layer's input over calibration tokens.

    Args:
        hessian: `X^T X` summed over the tokens, `[in, in]`, float32 at least.
        num_tokens: tokens seen.
    """

    def __init__(self, hessian: Float[Tensor, "i i"], num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._hessian: Tensor | None = hessian
        self._norm: Tensor | None = None
        self._inverse_diagonals: dict[float, Tensor] = {}

    def plus(self, other: "InputStatistics") -> "InputStatistics":
        """These, with those of further tokens added in place."""
        self.hessian.add_(other.hessian)
        self.num_tokens += other.num_tokens
        return self

    def copy(self) -> "InputStatistics":
        return InputStatistics(self.hessian.clone(), self.num_tokens)

    @property
    def hessian(self) -> Float[Tensor, "i i"]:
        assert self._hessian is not None, "it was released"
        return self._hessian

    @property
    def tensors(self) -> list[Tensor]:
        """What is held."""
        return [x for x in (self._hessian, self._norm, *self._inverse_diagonals.values()) if x is not None]

    @property
    def is_released(self) -> bool:
        return self._hessian is None

    @property
    def norm(self) -> Float[Tensor, " i"]:
        """L2 norm of each input channel."""
        if self._norm is None:
            self._norm = self.hessian.diagonal().clamp_min(0).sqrt()
        return self._norm

    def inverse_diagonal(self, damping: float) -> Float[Tensor, " i"]:
        """Of the damped Hessian, see `permlab.sparsity.importance.inverse_diagonal`."""
        if damping not in self._inverse_diagonals:
            self._inverse_diagonals[damping] = inverse_diagonal(self.hessian, damping=damping)
        return self._inverse_diagonals[damping]

    def release(self) -> None:
        """Keep the vectors that were asked for, and the norm, and no matrix."""
        _ = self.norm
        self._hessian = None

    def exchange(self, hessian: Float[Tensor, "i i"]) -> None:
        """The same Hessian in another place."""
        self._hessian = hessian

    def to(self, device: torch.device) -> None:
        """Bring the vectors to a device; the Hessian stays where it is."""
        self._norm = self.norm.to(device)
        self._inverse_diagonals = {damping: part.to(device) for damping, part in self._inverse_diagonals.items()}


class Recorder:
    """Sums up the second moments of what layers are given; a tensor that several are given is multiplied once."""

    def __init__(self) -> None:
        # By the layers that were given the same tensors.
        self._sums: dict[tuple[str, ...], InputStatistics] = {}
        self._input: Tensor | None = None
        self._product: InputStatistics | None = None
        self._names: list[str] = []  # of the layers that were given the latest input

    def __call__(self, name: str, module: nn.Module, x: Tensor) -> None:
        if x is self._input:
            self._names.append(name)
            return
        self._add()
        tokens = x.detach().flatten(0, -2)
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        self._input, self._names = x, [name]
        self._product = InputStatistics(tokens.mT @ tokens, len(tokens))

    def _add(self) -> None:
        key = tuple(self._names)
        if self._product is not None:
            self._sums[key] = self._sums[key].plus(self._product) if key in self._sums else self._product
        self._input = self._product = None

    def statistics(self) -> dict[str, InputStatistics]:
        """By layer; layers that were always given the same tensors have the same object.

        Raises:
            ValueError: if the inputs of one are not finite.
        """
        self._add()
        found: dict[str, InputStatistics] = {}
        for names, part in self._sums.items():
            if not torch.isfinite(part.hessian).all():
                raise ValueError(f"the inputs of layer {names[0]} are not finite")
            for name in names:
                found[name] = part if name not in found else found[name].copy().plus(part)
        return found


@torch.no_grad()
def collect(forward: Forward, modules: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, InputStatistics]:
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
    Differs from source: all layers in one pass of the dense model; `permlab.sparsity.walk` goes block after block.
    """
    record, num_batches = Recorder(), 0
    with on_inputs(modules, record):
        for batch in batches:
            forward(batch)
            num_batches += 1
    if num_batches == 0:
        raise ValueError("the calibration set is empty")
    found = record.statistics()
    for name in modules:
        if name not in found:
            raise ValueError(f"layer {name} was not called in the forward pass")
    return {name: found[name] for name in modules}


class OutputErrors:
    """Relative error of each layer's output with other weights, on the inputs that a model gives it.

    The error is `||X (W - W')^T|| / ||X W^T||` over all tokens, without the bias.

    Args:
        weights: dense layer and other weight, by name.
    """

    def __init__(self, weights: Mapping[str, tuple[nn.Linear, Tensor]]) -> None:
        self.weights = weights
        self._lost, self._whole = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)

    @contextmanager
    def summed(self, path: str = "") -> Iterator[None]:
        """Adds up what the layers of a block, or of the model, lose in the forward passes made inside."""
        inside = {name: layer for name, (layer, _) in self.weights.items() if name.startswith(path)}
        with _on_calls(inside, self._add):
            yield

    def _add(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        difference = module.weight - self.weights[name][1].to(module.weight)
        self._lost[name] += _energy(x @ difference.mT)
        if type(module) is nn.Linear:  # what it gives is the product, and the bias
            self._whole[name] += _energy(output if module.bias is None else output - module.bias)
        else:
            self._whole[name] += _energy(x @ module.weight.mT)

    def relative(self) -> dict[str, float]:
        return {name: (self._lost[name] / max(self._whole[name], 1e-300)) ** 0.5 for name in self.weights}


def _energy(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


@torch.no_grad()
def reconstruction_errors(
    forward: Forward, weights: Mapping[str, tuple[nn.Linear, Tensor]], batches: Iterable[Any]
) -> dict[str, float]:
    """The `OutputErrors` of layers in one pass of the model.

    Args:
        forward: runs the dense model on a batch.
        weights: dense layer and other weight, by name.
        batches: inputs of the model, best ones that nothing was fitted to.
    """
    errors = OutputErrors(weights)
    with errors.summed():
        for batch in batches:
            forward(batch)
    return errors.relative()


@contextmanager
def _on_calls(modules: Mapping[str, nn.Module], act: Callable[[str, nn.Module, Tensor, Any], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        return lambda module, arguments, output: act(name, module, arguments[0], output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def on_inputs(modules: Mapping[str, nn.Module], act: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Calls `act` with name, module and input of each of these modules whenever it is called inside."""

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
