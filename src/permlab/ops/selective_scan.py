r"""The selective scan of Mamba: a diagonal linear recurrence whose coefficients depend on the token."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from permlab.ops.cost import note
from permlab.ops.threads import is_stand_in, is_traced, run_tasks

BACKENDS = ("auto", "numba", "torch", "cuda")


@overload
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
    initial_state: Tensor | None = None,
    return_last_state: Literal[False] = False,
) -> Tensor: ...


@overload
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
    initial_state: Tensor | None = None,
    return_last_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


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
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Run every channel's state along the sequence and read it out at every token.

    With dt = softplus(delta + delta_bias), or the bare sum without `delta_softplus`, per channel
    and state: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t from h_{-1} = initial_state or 0, and per
    channel y_t = sum over states of C_t h_t, plus D u_t, times silu(z_t).

    A sequence may be scanned in pieces, down to single tokens: each piece begins with the last state
    of the one before.

    Differentiable in all nine tensors, also through the last state. States are recomputed in chunks for
    the backward pass, so what is kept for it is a few tensors of the size of `u`, never one of all states.

    Backends: `numba` (CPU: fused, multi-threaded, the same bits for any number of threads; first
    derivatives; compiled on first use, in seconds), `torch` (any device, also under torch.compile,
    under torch.func and for second derivatives), `cuda` (mamba_ssm's kernel). `auto` is `cuda` where
    a small scan on that device came out right, else `numba` on a CPU, else `torch`. `cuda` knows no
    initial state, and no gradient through the last one.

    Shapes:
        u, delta, z: `[b, d, l]`.  A, initial_state per sequence: `[d, s]`.  D, delta_bias: `[d]`.
        B, C, each: `[b, s, l]` for every token, `[b, g, s, l]` for every token and group of d / g
        consecutive channels, or `[d, s]` for every channel, the same at all tokens.
        b: sequences.  d: channels.  l: tokens.  s: states per channel.  g: groups, a divisor of d.
    Args:
        u: what enters the states; its dtype is the result's.
        delta: step size before bias and softplus; the scan is stable where dt A <= 0.
        A: decay rate per unit of step size.
        B, C: input and output coefficients.
        D: weight of the direct path, none if absent.
        z: gate before silu, none if absent.
        delta_bias: added to delta.
        delta_softplus: make step sizes positive.
        backend: which implementation; see above.
        initial_state: `[b, d, s]`, the states before the first token; zero if absent.
        return_last_state: return the states after the last token too.
    Returns:
        `[b, d, l]` in the dtype and on the device of `u`; computed in float32, in float64 if `u` is.
        With `return_last_state` a pair of it and the states `[b, d, s]`, these in the dtype of the computation.
    Raises:
        ValueError: on a wrong shape, an integer tensor, tensors on several devices, or a backend
            that is unknown or cannot read these tensors, with the reason.
        RuntimeError: in the backward pass of `numba`, if second derivatives are wanted.
    Source: Gu and Dao 2023, arXiv:2312.00752, algorithm 2; arguments as `selective_scan_fn` of mamba_ssm.
    Differs from source: A is real; an initial state; B and C may have different numbers of groups; the last
        state has a gradient; 2^x with A log2(e) instead of e^x.
    Cost: O(b d l s) time, O(b l (d + s ceil(d / 64))) memory; `torch` takes log(l) times that time and
        O(b d s sqrt(l)) more memory.
    Example:
        >>> one = torch.ones(1, 1, 3)
        >>> selective_scan(one, one, -torch.ones(1, 1), one, one).flatten()
        tensor([1.0000, 1.3679, 1.5032])
        >>> start, one = one[..., :2], one[..., :1]
        >>> _, state = selective_scan(start, start, -torch.ones(1, 1), start, start, return_last_state=True)
        >>> selective_scan(one, one, -torch.ones(1, 1), one, one, initial_state=state).flatten()
        tensor([1.5032])
    """
    given = dict(zip(_NAMES, (u, delta, A, B, C, D, z, delta_bias, initial_state), strict=True))
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    _check_tensors(tensors)
    note("selective_scan", num_flops(u.shape, A.shape[1]), *tensors.values())
    chosen = _choose(backend, tensors, return_last_state)
    if chosen == "cuda":
        return _scan_cuda(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    D, delta_bias = (u.new_zeros(u.shape[1]) if x is None else x for x in (D, delta_bias))
    dtype = torch.promote_types(u.dtype, torch.float32)
    inputs: list[Any] = [
        None if x is None else x.to(dtype) for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)
    ]
    scan = _scan_torch if chosen == "torch" else _scan_numba
    y, state = scan(*inputs, delta_softplus=delta_softplus, return_last_state=return_last_state)
    return (y.to(u.dtype), state) if return_last_state else y.to(u.dtype)


def num_flops(shape: Sequence[int], num_states: int) -> int:
    """Operations of a forward scan: 7 for each state of a token and channel, and 9 beside them.

    For a state they are dt A and its exponential, B times what enters, the recurrence's product and sum, and the
    product and sum of the reading out; beside them softplus and bias of the step size, dt u, direct path and gate.

    Shapes:
        shape: `[b, d, l]` of what is scanned.
    Example:
        >>> num_flops((1, 2, 3), 4)
        222
    """
    return math.prod(shape) * (7 * num_states + 9)


_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    u, A = tensors["u"], tensors["A"]
    if u.ndim != 3 or u.shape[-1] == 0:
        raise ValueError(f"u is [b, d, l] with l >= 1, got shape {tuple(u.shape)}")
    if A.ndim != 2 or A.shape[-1] == 0:
        raise ValueError(f"A is [d, s] with s >= 1, got shape {tuple(A.shape)}")
    (b, d, length), s = u.shape, A.shape[1]
    shapes: dict[str, tuple[int, ...]] = {"A": (d, s), "D": (d,), "delta_bias": (d,), "initial_state": (b, d, s)}
    for name in ("B", "C"):
        shape = tensors[name].shape
        shapes[name] = {2: (d, s), 4: (b, *shape[1:2], s, length)}.get(len(shape), (b, s, length))
        if len(shape) == 4 and (shape[1] == 0 or d % shape[1]):
            raise ValueError(f"{name} has shape {tuple(shape)}: {shape[1]} groups do not divide {d} channels")
    for name, tensor in tensors.items():
        expected = shapes.get(name, (b, d, length))
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is a real floating tensor, got {tensor.dtype}")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device}, u on {u.device}")


def _choose(backend: str, tensors: dict[str, Tensor], return_last_state: bool) -> str:
    """The implementation to run; ValueError if the one asked for cannot."""
    refusals: dict[str, Callable[[dict[str, Tensor]], str | None]] = {
        "cuda": partial(_cuda_refusal, return_last_state=return_last_state),
        "numba": _numba_refusal,
    }
    if backend in refusals:
        if refusal := refusals[backend](tensors):
            raise ValueError(f"backend={backend!r}: {refusal}")
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "torch":
        return backend
    if is_stand_in(tensors["u"]):
        return "stand-in"  # of the size of what `numba` gives and keeps, at once
    return next((name for name, refusal in refusals.items() if refusal(tensors) is None), "torch")


# numba


def _numba_refusal(tensors: dict[str, Tensor]) -> str | None:
    """Why the compiled kernel cannot read these tensors; None if it can."""
    if tensors["u"].device.type != "cpu":
        return f"it reads tensors on a CPU, got {tensors['u'].device}"
    if is_traced() or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors.values()):
        return "it cannot be traced or transformed"
    return None


class _NumbaScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, delta_softplus: bool, with_last: bool, *inputs: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        y, last, checkpoints = _forward_numba(inputs, delta_softplus, with_last, keep=True)
        ctx.save_for_backward(*inputs, checkpoints)
        return y, last

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError("backend='numba' has no second derivatives; with create_graph=True use backend='torch'")
        *inputs, checkpoints = ctx.saved_tensors
        if is_stand_in(inputs[0]):
            return None, None, *map(torch.empty_like, inputs)
        grad = torch.zeros_like(inputs[0]) if grad is None else grad
        grad_last = grad.new_empty(0, 0, 0) if grad_last is None else grad_last
        return None, None, *_backward_numba(inputs, ctx.delta_softplus, checkpoints, grad, grad_last)


def _scan_numba(
    u: Float[Tensor, "b d l"],
    delta: Float[Tensor, "b d l"],
    A: Float[Tensor, "d s"],
    B: Tensor,
    C: Tensor,
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b d l"] | None,
    delta_bias: Float[Tensor, " d"],
    initial_state: Float[Tensor, "b d s"] | None,
    *,
    delta_softplus: bool,
    return_last_state: bool,
) -> tuple[Float[Tensor, "b d l"], Tensor]:
    B, C = _in_equal_groups(B, C)
    absent = u.new_empty(0, 0, 0)
    z, initial_state = (absent if x is None else x for x in (z, initial_state))
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _NumbaScan.apply(delta_softplus, return_last_state, *inputs)
    return _forward_numba(inputs, delta_softplus, return_last_state, keep=False)[:2]


def _in_equal_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C with one axis of groups, as many in both; those that are given by channel as they are."""
    B, C = (x.unsqueeze(1) if x.ndim == 3 else x for x in (B, C))
    if B.ndim == C.ndim == 4 and B.shape[1] != C.shape[1]:
        num_groups = math.lcm(B.shape[1], C.shape[1])
        B, C = (x.repeat_interleave(num_groups // x.shape[1], dim=1) for x in (B, C))
    return B, C


def _num_groups(inputs: Sequence[Any]) -> int:
    return max(x.shape[1] if x.ndim == 4 else 1 for x in inputs[3:5])


def _forward_numba(
    inputs: Sequence[Tensor], softplus: bool, with_last: bool, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the last state if it is wanted, and the state before every chunk if those are to be kept."""
    from permlab.ops.selective_scan_kernel import compiled

    u, num_states, num_groups = inputs[0], inputs[2].shape[1], _num_groups(inputs)
    b, num_channels, num_tokens = u.shape
    per_group = num_channels // num_groups
    lanes, size = 64 if per_group > 32 else 32, _chunk_size(num_tokens, num_states)
    num_blocks, num_checkpoints = num_groups * -(-per_group // lanes), -(-num_tokens // size) if keep else 0
    shapes = (
        (b, num_channels, num_states) if with_last else (0, 0, 0),
        (b, num_blocks, num_checkpoints, num_states, lanes),
    )
    if is_stand_in(u):
        return torch.empty_like(u), u.new_empty(shapes[0]), u.new_empty(shapes[1])
    arrays = [tensor.detach().numpy() for tensor in inputs]
    y, (last, checkpoints) = np.empty_like(arrays[0]), (np.empty(shape, arrays[0].dtype) for shape in shapes)
    forward, _ = compiled(y.dtype, _by_channel(arrays))
    results = (softplus, num_groups, y, last, checkpoints, size)
    run_tasks(forward, b * num_blocks, y.size * num_states, *arrays, *results)
    return torch.from_numpy(y), torch.from_numpy(last), torch.from_numpy(checkpoints)


def _by_channel(inputs: Sequence[Any]) -> tuple[bool, bool]:
    """Whether B and C are given by channel, and not by token."""
    return inputs[3].ndim == 2, inputs[4].ndim == 2


def _backward_numba(
    inputs: Sequence[Tensor], softplus: bool, checkpoints: Tensor, grad: Tensor, grad_last: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the nine inputs; sums over sequences and blocks of channels are done here, in one thread."""
    from permlab.ops.selective_scan_kernel import compiled

    arrays = [tensor.detach().numpy() for tensor in inputs]
    u, num_groups, by_channel = arrays[0], _num_groups(arrays), _by_channel(arrays)
    b, num_blocks, _, num_states, lanes = checkpoints.shape
    _, num_channels, num_tokens = u.shape
    grad_u, grad_delta, grad_z, grad_initial = (np.empty_like(arrays[i]) for i in (0, 1, 6, 8))
    grad_A = np.zeros((b, num_blocks, num_states, lanes), u.dtype)
    grad_B, grad_C = (
        np.zeros((b, num_blocks, 1, num_states, lanes), u.dtype)
        if given
        else np.empty((b, num_blocks, num_states, num_tokens), u.dtype)
        for given in by_channel
    )
    grad_D, grad_bias = np.zeros((2, b, num_blocks, lanes), u.dtype)
    results = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial)
    size = _chunk_size(num_tokens, num_states)
    given = (softplus, num_groups, checkpoints.numpy(), size, grad.numpy(), grad_last.numpy())
    _, backward = compiled(u.dtype, by_channel)
    run_tasks(backward, b * num_blocks, u.size * num_states, *arrays, *given, *results)

    def by_lane(parts: np.ndarray) -> np.ndarray:
        """From parts `[b, blocks, ..., lanes]` to sums `[d, ...]`."""
        lanes_first = np.moveaxis(parts.sum(0), -1, 1)
        groups = lanes_first.reshape(num_groups, -1, *lanes_first.shape[2:])
        return groups[:, : num_channels // num_groups].reshape(num_channels, *lanes_first.shape[2:])

    def by_group(parts: np.ndarray) -> np.ndarray:
        return parts.reshape(b, num_groups, -1, num_states, num_tokens).sum(2)

    sum_B, sum_C = (
        by_lane(parts[:, :, 0]) if of_channel else by_group(parts)
        for parts, of_channel in zip((grad_B, grad_C), by_channel, strict=True)
    )
    sums = (by_lane(grad_A), sum_B, sum_C, by_lane(grad_D), grad_z, by_lane(grad_bias), grad_initial)
    return tuple(torch.from_numpy(gradient) for gradient in (grad_u, grad_delta, *sums))


def _chunk_size(num_tokens: int, num_states: int) -> int:
    """Tokens between checkpoints: at most sqrt(l) of these, together about as large as one input or smaller."""
    return min(num_tokens, max(16, num_states, math.isqrt(num_tokens)))


# torch


def _scan_torch(
    u: Float[Tensor, "b d l"],
    delta: Float[Tensor, "b d l"],
    A: Float[Tensor, "d s"],
    B: Tensor,
    C: Tensor,
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b d l"] | None,
    delta_bias: Float[Tensor, " d"],
    initial_state: Float[Tensor, "b d s"] | None,
    *,
    delta_softplus: bool,
    return_last_state: bool,
) -> tuple[Float[Tensor, "b d l"], Float[Tensor, "b d s"]]:
    """The scan chunk by chunk; where gradients are wanted, only the states between chunks are kept for them."""
    delta = delta + delta_bias.unsqueeze(-1)
    if delta_softplus:
        delta = F.softplus(delta)
    size = max(1, math.isqrt(u.shape[-1]))
    state = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    num_chunks = -(-u.shape[-1] // size)
    recompute = torch.is_grad_enabled() and not is_traced()
    outputs = []
    pieces = ((x,) * num_chunks if x.ndim == 2 else x.split(size, dim=-1) for x in (u, delta, B, C))
    for chunk in zip(*pieces, strict=True):
        if recompute:
            output, state = checkpoint(_scan_chunk, state, A, *chunk, use_reentrant=False, preserve_rng_state=False)
        else:
            output, state = _scan_chunk(state, A, *chunk)
        outputs.append(output)
    y = torch.cat(outputs, dim=-1) + u * D.unsqueeze(-1)
    return y if z is None else y * F.silu(z), state


def _scan_chunk(
    state: Float[Tensor, "b d s"],
    A: Float[Tensor, "d s"],
    u: Float[Tensor, "b d c"],
    delta: Float[Tensor, "b d c"],
    B: Tensor,
    C: Tensor,
) -> tuple[Float[Tensor, "b d c"], Float[Tensor, "b d s"]]:
    """Outputs of consecutive tokens and the state after them, by doubling: O(c log c) work in O(log c) steps."""
    B, C = (_for_every_channel(x, u.shape[1]) for x in (B, C))
    decay = torch.exp(delta.unsqueeze(2) * A.unsqueeze(-1))
    states = (delta * u).unsqueeze(2) * B
    states = torch.cat([states[..., :1] + decay[..., :1] * state.unsqueeze(-1), states[..., 1:]], dim=-1)
    reach = 1
    while reach < u.shape[-1]:
        states = torch.cat([states[..., :reach], states[..., reach:] + decay[..., reach:] * states[..., :-reach]], -1)
        decay = torch.cat([decay[..., :reach], decay[..., reach:] * decay[..., :-reach]], -1)
        reach *= 2
    return (states * C).sum(2), states[..., -1]


def _for_every_channel(coefficients: Tensor, num_channels: int) -> Tensor:
    """Coefficients of one chunk in a shape that broadcasts against `[b, d, s, c]`."""
    if coefficients.ndim == 2:
        return coefficients.unsqueeze(-1)
    if coefficients.ndim == 3:
        return coefficients.unsqueeze(1)
    return coefficients.repeat_interleave(num_channels // coefficients.shape[1], dim=1)


# mamba_ssm


def _cuda_refusal(tensors: dict[str, Tensor], *, return_last_state: bool) -> str | None:
    """Why mamba_ssm's kernel is not used for these tensors; None if it is."""
    u = tensors["u"]
    if u.device.type != "cuda":
        return f"it reads tensors on a CUDA device, got {u.device}"
    if u.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no {u.dtype}"
    if is_traced():
        return "it cannot be traced or transformed"
    if "initial_state" in tensors:
        return "it begins without a state"
    if return_last_state and torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        return "its last state has no gradient"
    if len({tensors[name].shape[1] for name in ("B", "C") if tensors[name].ndim == 4}) > 1:
        return "it reads B and C in equally many groups"
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
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    delta = delta.to(u.dtype)
    # What is given by channel is a weight to it, and in single precision as A is.
    B, C = (x.float() if x.ndim == 2 else x.to(u.dtype) for x in (B, C))
    z = None if z is None else z.to(u.dtype)
    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    inputs = (u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus)
    if not return_last_state:
        return selective_scan_fn(*inputs)
    y, state = selective_scan_fn(*inputs, return_last_state=True)
    return y, state.float()
