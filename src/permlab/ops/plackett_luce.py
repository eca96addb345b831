"""The Plackett-Luce law: items are drawn for slots one after the other, without replacement.

Slot 0 takes item j with probability proportional to `exp(logits[j] / temperature)`, slot 1
takes one of the rest in the same way, and so on. Items with logit -inf come after all others,
in uniformly random order: the limit of a common logit that goes to -inf.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from permlab.ops.schedule import check_temperature
from permlab.ops.threads import is_readable, run_tasks
from permlab.permutation import check_order

# exp(-200) of any sum is below the rounding error of float64.
_FAR_BELOW = 200.0
# Nats between logits up to which the kernel's sums of weights are right.
_SPREAD = 300.0


@torch.no_grad()
def sample(
    logits: Float[Tensor, "*b n"], *, temperature: float, generator: torch.Generator | None = None
) -> Int64[Tensor, "*b n"]:
    """Draw one order per batch entry from the Plackett-Luce law of `logits / temperature`.

    Sorting the logits after adding Gumbel noise times the temperature draws from that law
    exactly. To draw several orders, expand the logits.

    Shapes:
        b: any number of batch axes, possibly none.  n: slots and items.
    Args:
        logits: one per item, in nats; a higher one tends to an earlier slot.
        temperature: positive; towards 0 the order is the descending argsort, towards infinity uniform.
        generator: source of the noise, on the device of the logits; torch's own if None.
    Returns:
        int64 gather indices on the device of the logits; the noise is float64.
    Raises:
        ValueError: if the logits are not floating point or temperature <= 0.
    Source: Yellott 1977, Gumbel noise and Luce's choice axiom; the use here from Kutscher et
        al. 2025, REOrder, arXiv:2505.23751.
    Differs from source: Nothing.
    Cost: O(n log n): one sort on a CPU, unless sums are equal; two elsewhere.
    Example:
        >>> sample(torch.tensor([0.0, 2.0, 1.0]), temperature=0.001)
        tensor([1, 2, 0])
    """
    check_temperature(temperature)
    wide = _check_floating(logits).double()
    uniform = torch.rand(wide.shape, dtype=wide.dtype, device=wide.device, generator=generator)
    noise = uniform.clamp_(min=1e-17).neg_().log1p_().neg_().log_().neg_()
    noisy = wide + temperature * noise
    if is_readable(noisy):
        # NumPy sorts a row in a fifth of torch's time.
        order = torch.from_numpy(np.argsort(-noisy.numpy(), axis=-1))
        ordered = noisy.gather(-1, order)
        if not (ordered[..., 1:] == ordered[..., :-1]).any():
            return order
    # Where the logits swamp the noise or are -inf, equal sums are left in the order of their noise.
    shuffle = noise.argsort(dim=-1, descending=True)
    return shuffle.gather(-1, noisy.gather(-1, shuffle).argsort(dim=-1, descending=True, stable=True))


def log_prob(
    logits: Float[Tensor, "*b n"], order: Int64[Tensor, "*c _n"], *, temperature: float
) -> Float[Tensor, "*e"]:
    """Log-probability of an order under the Plackett-Luce law of `logits / temperature`.

    The temperature belongs to the law, so this is the law that `sample` draws from. An order
    that puts an item of logit -inf before another has probability 0.

    Shapes:
        b, c: any batch axes, broadcast against each other to e.  n: slots and items.
    Args:
        logits: one per item, in nats.
        order: gather indices.
        temperature: positive.
    Returns:
        Log-probability in nats, dtype and device of the logits; computed in float64.
    Raises:
        ValueError: if the logits are not floating point, the order is not int64 or of another
            number of items, or temperature <= 0; on a CPU also if the order is no permutation.
    Source: Plackett 1975, The analysis of permutations; Kutscher et al. 2025, REOrder, arXiv:2505.23751.
    Differs from source: REOrder leaves the temperature out of the log-probability, which is
        then that of another law than the sampled one.
    Cost: O(n) on a CPU, where a compiled kernel computes the gradient along with the value; elsewhere a few
        passes in torch. Whether the order is a permutation is checked on a CPU only.
    Example:
        >>> log_prob(torch.zeros(3), torch.tensor([2, 0, 1]), temperature=0.5).exp()
        tensor(0.1667)
    """
    check_temperature(temperature)
    _check_floating(logits)
    if order.dtype != torch.int64:
        raise ValueError(f"an order is int64, got {order.dtype}")
    if order.shape[-1] != logits.shape[-1]:
        raise ValueError(f"an order of {order.shape[-1]} items does not fit {logits.shape[-1]} logits")
    # In float64, for it costs little and float32 would lose ties among logits far from 0.
    wide, order = torch.broadcast_tensors(logits.double() / temperature, order)
    if is_readable(wide) and is_readable(order):
        spread = wide.detach().amax(-1) - wide.detach().amin(-1)
        if bool((spread < _SPREAD).all()):
            return _CompiledLogProb.apply(wide, order).to(logits.dtype)
        check_order(order)
    return _log_prob(wide, order).to(logits.dtype)


class _CompiledLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, order: Tensor) -> Tensor:  # type: ignore[override]
        from permlab.ops.plackett_luce_kernel import compiled

        shape = (math.prod(logits.shape[:-1]), logits.shape[-1])
        flat, slots = (np.ascontiguousarray(x.detach().numpy()).reshape(shape) for x in (logits, order))
        result, grad, valid = np.empty(len(flat)), np.empty_like(flat), np.empty(len(flat), np.int64)
        run_tasks(compiled(), len(flat), 8 * flat.size, flat, slots, result, grad, valid)
        if not valid.all():
            check_order(order)
        ctx.save_for_backward(torch.from_numpy(grad).view(logits.shape))
        return torch.from_numpy(result).view(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * slopes, None


def _log_prob(wide: Tensor, order: Tensor) -> Tensor:
    """In torch, for any logits, -inf and far apart ones included."""
    placed = wide.gather(-1, order)
    last = placed.isneginf()
    lowest = placed.detach().masked_fill(last, torch.inf).amin(-1, keepdim=True).nan_to_num(posinf=0.0)
    placed = torch.where(last, lowest - _FAR_BELOW, placed)
    remaining = placed.flip(-1).logcumsumexp(-1).flip(-1)
    impossible = (last[..., :-1] & ~last[..., 1:]).any(-1)
    return (placed - remaining).sum(-1).masked_fill(impossible, -torch.inf)


def _check_floating(logits: Tensor) -> Tensor:
    if not logits.is_floating_point():
        raise ValueError(f"logits are floating point, got {logits.dtype}")
    return logits
