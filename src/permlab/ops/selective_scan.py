r"""The selective scan of Mamba: a diagonal linear recurrence whose coefficients depend on the token."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from permlab.ops.threads import is_traced, run_tasks

BACKENDS = ("auto", "numba", "torch", "cuda")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    backend: str = "auto",
) -> Float[Tensor, "b d l"]:
    r"""Run every channel's state along the sequence and read it out at every token.

    With dt = softplus(delta + delta_bias), or the bare sum without `delta_softplus`, per channel
    and state: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t from h_{-1} = 0, and per channel
    y_t = sum over states of C_t h_t, plus D u_t, times silu(z_t).

    Differentiable in all eight tensors. States are recomputed in chunks for the backward pass, so
    what is kept for it is a few tensors of the size of `u`, never one of all states.

    Backends: `numba` (CPU: fused, multi-threaded, the same bits for any number of threads; first
    derivatives; compiled on first use, in seconds), `torch` (any device, also under torch.compile,
    under torch.func and for second derivatives), `cuda` (mamba_ssm's kernel). `auto` is `cuda` where
    a small scan on that device came out right, else `numba` on a CPU, else `torch`.

    Shapes:
        u, delta, z: `[b, d, l]`.  A: `[d, s]`.  B, C: `[b, s, l]`.  D, delta_bias: `[d]`.
        b: sequences.  d: channels.  l: tokens.  s: states per channel.
    Args:
        u: what enters the states; its dtype is the result's.
        delta: step size before bias and softplus; the scan is stable where dt A <= 0.
        A: decay rate per unit of step size.
        B, C: input and output coefficients of every token.
        D: weight of the direct path, none if absent.
        z: gate before silu, none if absent.
        delta_bias: added to delta.
        delta_softplus: make step sizes positive.
        backend: which implementation; see above.
    Returns:
        `[b, d, l]` in the dtype and on the device of `u`; computed in float32, in float64 if `u` is.
    Raises:
        ValueError: on a wrong shape, an integer tensor, tensors on several devices, or a backend
            that is unknown or cannot read these tensors, with the reason.
        RuntimeError: in the backward pass of `numba`, if second derivatives are wanted.
    Source: Gu and Dao 2023, arXiv:2312.00752, algorithm 2; arguments as `selective_scan_fn` of mamba_ssm.
    Differs from source: A is real, B and C are given per token; 2^x with A log2(e) instead of e^x.
    Cost: O(b d l s) time, O(b l (d + s ceil(d / 64))) memory; `torch` takes log(l) times that time and
        O(b d s sqrt(l)) more memory.
    Example:
        >>> one = torch.ones(1, 1, 3)
        >>> selective_scan(one, one, -torch.ones(1, 1), one, one).flatten()
        tensor([1.0000, 1.3679, 1.5032])
    """
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    _check_tensors(present)
    chosen = _choose(backend, list(present.values()))
    if chosen == "cuda":
        return _scan_cuda(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    D, delta_bias = (u.new_zeros(u.shape[1]) if x is None else x for x in (D, delta_bias))
    dtype = torch.promote_types(u.dtype, torch.float32)
    inputs: list[Any] = [None if x is None else x.to(dtype) for x in (u, delta, A, B, C, D, z, delta_bias)]
    scan = _scan_numba if chosen == "numba" else _scan_torch
    return scan(*inputs, delta_softplus=delta_softplus).to(u.dtype)


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    u, A = tensors["u"], tensors["A"]
    if u.ndim != 3 or u.shape[-1] == 0:
        raise ValueError(f"u is [b, d, l] with l >= 1, got shape {tuple(u.shape)}")
    if A.ndim != 2 or A.shape[-1] == 0:
        raise ValueError(f"A is [d, s] with s >= 1, got shape {tuple(A.shape)}")
    (b, d, length), s = u.shape, A.shape[1]
    shapes = {"A": (d, s), "B": (b, s, length), "C": (b, s, length), "D": (d,), "delta_bias": (d,)}
    for name, tensor in tensors.items():
        expected = shapes.get(name, (b, d, length))
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is a real floating tensor, got {tensor.dtype}")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device}, u on {u.device}")


def _choose(backend: str, tensors: Sequence[Tensor]) -> str:
    """The implementation to run; ValueError if the one asked for cannot."""
    refusals = {"cuda": _cuda_refusal, "numba": _numba_refusal}
    if backend in refusals:
        if refusal := refusals[backend](tensors):
            raise ValueError(f"backend={backend!r}: {refusal}")
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "torch":
        return backend
    return next((name for name, refusal in refusals.items() if refusal(tensors) is None), "torch")


# numba


def _numba_refusal(tensors: Sequence[Tensor]) -> str | None:
    """Why the compiled kernel cannot read these tensors; None if it can."""
    if tensors[0].device.type != "cpu":
        return f"it reads tensors on a CPU, got {tensors[0].device}"
    if is_traced() or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return "it cannot be traced or transformed"
    return None


class _NumbaScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, delta_softplus: bool, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.delta_softplus = delta_softplus
        y, checkpoints = _forward_numba(inputs, delta_softplus, keep=True)
        ctx.save_for_backward(*inputs, checkpoints)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError("backend='numba' has no second derivatives; with create_graph=True use backend='torch'")
        *inputs, checkpoints = ctx.saved_tensors
        return None, *_backward_numba(inputs, ctx.delta_softplus, checkpoints, grad)


def _scan_numba(
    u: Float[Tensor, "b d l"],
    delta: Float[Tensor, "b d l"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b s l"],
    C: Float[Tensor, "b s l"],
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b d l"] | None,
    delta_bias: Float[Tensor, " d"],
    *,
    delta_softplus: bool,
) -> Float[Tensor, "b d l"]:
    inputs = (u, delta, A, B, C, D, u.new_empty(0, 0, 0) if z is None else z, delta_bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _NumbaScan.apply(delta_softplus, *inputs)
    return _forward_numba(inputs, delta_softplus, keep=False)[0]


def _forward_numba(inputs: Sequence[Tensor], softplus: bool, *, keep: bool) -> tuple[Tensor, Tensor]:
    """The result, and the state before every chunk if those are to be kept."""
    from permlab.ops.selective_scan_kernel import compiled

    arrays = [tensor.detach().numpy() for tensor in inputs]
    u, num_states = arrays[0], arrays[2].shape[1]
    b, num_channels, num_tokens = u.shape
    lanes, size = 64 if num_channels > 32 else 32, _chunk_size(num_tokens, num_states)
    num_groups, num_checkpoints = -(-num_channels // lanes), -(-num_tokens // size) if keep else 0
    y = np.empty_like(u)
    checkpoints = np.empty((b, num_groups, num_checkpoints, num_states, lanes), u.dtype)
    forward, _ = compiled(u.dtype)
    run_tasks(forward, b * num_groups, u.size * num_states, *arrays, softplus, y, checkpoints, size)
    return torch.from_numpy(y), torch.from_numpy(checkpoints)


def _backward_numba(inputs: Sequence[Tensor], softplus: bool, checkpoints: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the eight inputs; sums over sequences and channel groups are done here, in one thread."""
    from permlab.ops.selective_scan_kernel import compiled

    arrays = [tensor.detach().numpy() for tensor in inputs]
    u, delta, z = arrays[0], arrays[1], arrays[6]
    b, num_groups, _, num_states, lanes = checkpoints.shape
    _, num_channels, num_tokens = u.shape
    grad_u, grad_delta, grad_z = np.empty_like(u), np.empty_like(delta), np.empty_like(z)
    grad_A = np.zeros((b, num_groups, num_states, lanes), u.dtype)
    grad_B, grad_C = np.empty((2, b, num_groups, num_states, num_tokens), u.dtype)
    grad_D, grad_bias = np.zeros((2, b, num_groups, lanes), u.dtype)
    results = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias)
    given = (*arrays, softplus, checkpoints.numpy(), _chunk_size(num_tokens, num_states), grad.numpy())
    _, backward = compiled(u.dtype)
    run_tasks(backward, b * num_groups, u.size * num_states, *given, *results)
    sum_A = grad_A.sum(0).swapaxes(0, 1).reshape(num_states, -1)[:, :num_channels].T
    sum_D, sum_bias = (part.sum(0).reshape(-1)[:num_channels] for part in (grad_D, grad_bias))
    gradients = (grad_u, grad_delta, sum_A, grad_B.sum(1), grad_C.sum(1), sum_D, grad_z, sum_bias)
    return tuple(torch.from_numpy(gradient) for gradient in gradients)


def _chunk_size(num_tokens: int, num_states: int) -> int:
    """Tokens between checkpoints: at most sqrt(l) of these, together about as large as one input or smaller."""
    return min(num_tokens, max(16, num_states, math.isqrt(num_tokens)))


# torch


def _scan_torch(
    u: Float[Tensor, "b d l"],
    delta: Float[Tensor, "b d l"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b s l"],
    C: Float[Tensor, "b s l"],
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b d l"] | None,
    delta_bias: Float[Tensor, " d"],
    *,
    delta_softplus: bool,
) -> Float[Tensor, "b d l"]:
    """The scan chunk by chunk; where gradients are wanted, only the states between chunks are kept for them."""
    delta = delta + delta_bias.unsqueeze(-1)
    if delta_softplus:
        delta = F.softplus(delta)
    size = max(1, math.isqrt(u.shape[-1]))
    state = u.new_zeros(u.shape[0], *A.shape)
    recompute = torch.is_grad_enabled() and not is_traced()
    outputs = []
    for chunk in zip(*(tensor.split(size, dim=-1) for tensor in (u, delta, B, C)), strict=True):
        if recompute:
            output, state = checkpoint(_scan_chunk, state, A, *chunk, use_reentrant=False, preserve_rng_state=False)
        else:
            output, state = _scan_chunk(state, A, *chunk)
        outputs.append(output)
    y = torch.cat(outputs, dim=-1) + u * D.unsqueeze(-1)
    return y if z is None else y * F.silu(z)


def _scan_chunk(
    state: Float[Tensor, "b d s"],
    A: Float[Tensor, "d s"],
    u: Float[Tensor, "b d c"],
    delta: Float[Tensor, "b d c"],
    B: Float[Tensor, "b s c"],
    C: Float[Tensor, "b s c"],
) -> tuple[Float[Tensor, "b d c"], Float[Tensor, "b d s"]]:
    """Outputs of consecutive tokens and the state after them, by doubling: O(c log c) work in O(log c) steps."""
    decay = torch.exp(delta.unsqueeze(2) * A.unsqueeze(-1))
    states = (delta * u).unsqueeze(2) * B.unsqueeze(1)
    states = torch.cat([states[..., :1] + decay[..., :1] * state.unsqueeze(-1), states[..., 1:]], dim=-1)
    reach = 1
    while reach < u.shape[-1]:
        states = torch.cat([states[..., :reach], states[..., reach:] + decay[..., reach:] * states[..., :-reach]], -1)
        decay = torch.cat([decay[..., :reach], decay[..., reach:] * decay[..., :-reach]], -1)
        reach *= 2
    return (states * C.unsqueeze(1)).sum(2), states[..., -1]


# mamba_ssm


def _cuda_refusal(tensors: Sequence[Tensor]) -> str | None:
    """Why mamba_ssm's kernel is not used for these tensors; None if it is."""
    u = tensors[0]
    if u.device.type != "cuda":
        return f"it reads tensors on a CUDA device, got {u.device}"
    if u.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no {u.dtype}"
    if is_traced():
        return "it cannot be traced or transformed"
    return _probe(u.device)


@cache
def _probe(device: torch.device) -> str | None:
    """Import mamba_ssm's kernel and try it on a device, once per process; None if all is well."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except (ImportError, OSError, RuntimeError) as error:
        return f"mamba_ssm cannot be imported: {error}"
    try:
        got = _try_out(selective_scan_fn, device)
    except (RuntimeError, TypeError) as error:
        return f"mamba_ssm's kernel fails: {error}"
    expected = _try_out(partial(selective_scan, backend="torch"), torch.device("cpu"))
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(got, expected, strict=True)):
        return "mamba_ssm's kernel gives another result than ours"
    return None


def _try_out(scan: Callable[..., Tensor], device: torch.device) -> list[Tensor]:
    """Result and gradients of a tiny scan, on the CPU; the first call may come from inside no_grad or autocast."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 7), (2, 4, 7), (4, 3), (2, 3, 7), (2, 3, 7), (4,), (2, 4, 7), (4,))
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        inputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        inputs[2] = -inputs[2].abs()
        y = scan(*(tensor.requires_grad_() for tensor in inputs), delta_softplus=True)
        return [tensor.detach().cpu() for tensor in (y, *torch.autograd.grad(y.square().sum(), inputs))]


def _scan_cuda(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    delta, B, C = delta.to(u.dtype), B.to(u.dtype), C.to(u.dtype)
    z = None if z is None else z.to(u.dtype)
    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    return selective_scan_fn(u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus)
