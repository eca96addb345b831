"""The selective scan against a token-by-token loop, finite differences, and what it promises about memory and bits."""

import multiprocessing
import sys
import tracemalloc
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from permlab.ops import selective_scan as module
from permlab.ops.selective_scan import selective_scan

# (b, d, l, s): single token, fewer and more channels than the kernel has lanes, lengths around the chunk size.
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 4), (3, 64, 16, 2), (1, 65, 33, 5), (2, 130, 50, 1), (2, 5, 17, 16)]
BACKENDS = ["numba", "torch"]
NAMES = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"]


def example(b: int, d: int, length: int, s: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The eight tensors, with decays between almost none and almost complete."""
    shapes = [(b, d, length), (b, d, length), (d, s), (b, s, length), (b, s, length), (d,), (b, d, length), (d,)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    tensors[2] = -torch.exp(2 * tensors[2])
    return [tensor.requires_grad_() for tensor in tensors]


def sequential(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> np.ndarray:
    """The definition, one sequence, channel and token at a time, in float64."""
    u, delta, A, B, C, D, z, delta_bias = (
        None if x is None else x.detach().double().numpy() for x in (u, delta, A, B, C, D, z, delta_bias)
    )
    y = np.empty(u.shape)
    for i, k in np.ndindex(*u.shape[:2]):
        h = np.zeros(A.shape[1])
        for t in range(u.shape[2]):
            dt = delta[i, k, t] + (0 if delta_bias is None else delta_bias[k])
            dt = np.log1p(np.exp(dt)) if delta_softplus else dt
            h = np.exp(dt * A[k]) * h + dt * B[i, :, t] * u[i, k, t]
            y[i, k, t] = C[i, :, t] @ h + (0 if D is None else D[k] * u[i, k, t])
            y[i, k, t] *= 1 if z is None else z[i, k, t] / (1 + np.exp(-z[i, k, t]))
    return y


def with_gradients(tensors: list[Tensor], backend: str, weight: Tensor | None = None) -> list[Tensor]:
    y = selective_scan(*tensors, delta_softplus=True, backend=backend)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) if weight is None else weight
    return [y.detach(), *torch.autograd.grad(y, tensors, weight)]


@pytest.fixture
def threads():
    """Set the number of threads, and put it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_its_definition(backend: str, shape: tuple[int, ...]) -> None:
    tensors = example(*shape)
    bare = [tensors[0], tensors[1].square(), *tensors[2:5]]
    for given, softplus in ((tensors, True), (bare, False), ([*tensors[:5], None, tensors[6]], True)):
        found = selective_scan(*given, delta_softplus=softplus, backend=backend)
        np.testing.assert_allclose(found.detach(), sequential(*given, delta_softplus=softplus), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("shape", [(1, 2, 19, 2), (2, 3, 1, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_finite_differences(backend: str, shape: tuple[int, ...], softplus: bool) -> None:
    def scan(u: Tensor, delta: Tensor, *rest: Tensor) -> Tensor:
        delta = delta if softplus else delta.square()
        return selective_scan(u, delta, *rest, delta_softplus=softplus, backend=backend)

    tensors = example(*shape)
    assert torch.autograd.gradcheck(scan, tensors)
    assert torch.autograd.gradcheck(scan, tensors[:5])


# Coefficients by token, by token and group of channels, or by channel; and states before and after.

FORMS = {"token": None, "halves": 2, "thirds": 3, "constant": None}  # how many groups
PAIRS = [
    ("token", "constant"),
    ("constant", "thirds"),
    ("constant", "constant"),
    ("halves", "halves"),
    ("thirds", "halves"),
]


def in_form(form: str, b: int, d: int, length: int, s: int) -> Tensor:
    """Coefficients of `d` channels, a multiple of six, in one of the forms that are read."""
    shape = {"token": (b, s, length), "constant": (d, s)}.get(form, (b, FORMS[form], s, length))
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def with_forms(B: str, C: str, b: int = 2, d: int = 6, length: int = 19, s: int = 3) -> list[Tensor]:
    """The eight tensors and an initial state."""
    tensors = example(b, d, length, s)
    tensors[3:5] = in_form(B, b, d, length, s), in_form(C, b, d, length, s)
    return [*tensors, torch.randn(b, d, s, dtype=torch.float64, requires_grad=True)]


def by_channel(coefficients: Tensor, b: int, d: int, length: int) -> Tensor:
    """The same coefficients written out, `[b, d, s, l]`."""
    if coefficients.ndim == 2:
        return coefficients[None, :, :, None].expand(b, -1, -1, length)
    grouped = coefficients.unsqueeze(1) if coefficients.ndim == 3 else coefficients
    return grouped.repeat_interleave(d // grouped.shape[1], dim=1)


def by_definition(u, delta, A, B, C, D, z, delta_bias, state) -> tuple[Tensor, Tensor]:
    """Token by token, all channels at once, with step sizes through softplus; and the last state."""
    b, d, length = u.shape
    B, C = by_channel(B, b, d, length), by_channel(C, b, d, length)
    steps, outputs = torch.nn.functional.softplus(delta + delta_bias[:, None]), []
    for t in range(length):
        dt = steps[..., t, None]
        state = torch.exp(dt * A) * state + dt * B[..., t] * u[..., t, None]
        outputs.append((C[..., t] * state).sum(-1))
    return (torch.stack(outputs, -1) + D[:, None] * u) * torch.nn.functional.silu(z), state


@pytest.mark.parametrize(("B", "C"), [("token", "token"), *PAIRS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_and_every_form_of_coefficients_are_their_definition(backend: str, B: str, C: str) -> None:
    for d, length in ((6, 19), (72, 5)):  # groups smaller than the kernel's lanes, and with a rest of them
        *tensors, initial = with_forms(B, C, d=d, length=length)
        y, last = selective_scan(
            *tensors, delta_softplus=True, backend=backend, initial_state=initial, return_last_state=True
        )
        expected = by_definition(*tensors, initial)
        torch.testing.assert_close((y, last), expected, rtol=1e-10, atol=1e-12)
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in expected]
        found = torch.autograd.grad((y, last), [*tensors, initial], weights)
        wanted = torch.autograd.grad(expected, [*tensors, initial], weights)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("B", "C"), [("token", "token"), *PAIRS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_both_states_are_finite_differences(backend: str, B: str, C: str) -> None:
    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(
            *tensors[:-1], delta_softplus=True, backend=backend, initial_state=tensors[-1], return_last_state=True
        )

    tensors = with_forms(B, C, b=1, length=5, s=2)
    assert torch.autograd.gradcheck(scan, tensors, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: scan(*x)[1], tensors, fast_mode=True)


@pytest.mark.parametrize("sizes", [[1] * 20, [7, 1, 12]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_give_the_whole_sequence_and_its_gradients(backend: str, sizes: list[int]) -> None:
    tensors = example(2, 5, 20, 3)
    u, delta, A, B, C, D, z, bias = tensors
    state, pieces = None, []
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        part = [x[..., start : start + size] for x in (u, delta, B, C, z)]
        y, state = selective_scan(
            *part[:2], A, *part[2:4], D, part[4], bias, True,
            backend=backend, initial_state=state, return_last_state=True,
        )  # fmt: skip
        pieces.append(y)
    whole, last = selective_scan(*tensors, delta_softplus=True, backend=backend, return_last_state=True)
    weight = torch.randn_like(whole)
    torch.testing.assert_close((torch.cat(pieces, -1), state), (whole, last), rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad((torch.cat(pieces, -1), state), tensors, (weight, torch.ones_like(last)))
    wanted = torch.autograd.grad((whole, last), tensors, (weight, torch.ones_like(last)))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_state_keeps_the_precision_of_the_computation(backend: str) -> None:
    *tensors, initial = [x.detach().bfloat16() for x in with_forms("token", "halves")]
    y, last = selective_scan(*tensors, backend=backend, initial_state=initial, return_last_state=True)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)


def test_constant_coefficients_make_no_tensor_of_all_states() -> None:
    b, d, length, s = 2, 36, 256, 16
    tensors = with_forms("constant", "constant", b, d, length, s)[:8]
    with Largest() as largest:
        with_gradients(tensors, "torch")
    assert largest.size <= b * d * length * s // 15


def test_groups_that_do_not_divide_the_channels_are_named() -> None:
    tensors = example(2, 3, 7, 5)
    tensors[4] = torch.zeros(2, 2, 5, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^C has shape \(2, 2, 5, 7\): 2 groups do not divide 3 channels"):
        selective_scan(*tensors)
    with pytest.raises(ValueError, match=r"^initial_state has shape \(2, 3, 4\), expected \(2, 3, 5\)"):
        selective_scan(*example(2, 3, 7, 5), initial_state=torch.zeros(2, 3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_as_good_as_float32_gets(backend: str) -> None:
    tensors = example(2, 70, 300, 16)
    exact = with_gradients(tensors, "numba")
    single = with_gradients([tensor.detach().float().requires_grad_() for tensor in tensors], backend)
    for name, found, expected in zip(["y", *NAMES], single, exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 2e-6 * expected.abs().max(), name


@pytest.mark.parametrize("shape", [*SHAPES, (2, 128, 64, 8)])
def test_both_implementations_agree(shape: tuple[int, ...]) -> None:
    tensors = example(*shape)
    pairs = zip(with_gradients(tensors, "numba"), with_gradients(tensors, "torch"), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    tensors = example(3, 66, 21, 4)
    expected = with_gradients(tensors, backend)
    token_major = [x.detach().mT.contiguous().mT.requires_grad_() if x.ndim > 1 else x for x in tensors]
    sliced = [torch.stack([x.detach(), x.detach()], dim=-1)[..., 0].requires_grad_() for x in tensors]
    for layout in (token_major, sliced):
        assert not layout[0].is_contiguous()
        for found, wanted in zip(with_gradients(layout, backend), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    one = torch.ones(1, dtype=torch.float64).expand_as(expected[0])
    expected = with_gradients(tensors, backend, one.clone())
    for found, wanted in zip(with_gradients(tensors, backend, one), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_complete_decay_leaves_only_the_present_token(backend: str, dtype: torch.dtype) -> None:
    u, delta, A, B, C, D, *_ = (tensor.detach() for tensor in example(2, 3, 20, 4, dtype))
    delta, A = delta.abs() + 0.1, A.abs() * -1e30 - 1e6
    tensors = [tensor.requires_grad_() for tensor in (u, delta, A, B, C, D)]
    y = selective_scan(*tensors, backend=backend)
    torch.testing.assert_close(y, u * (delta * (B * C).sum(1, keepdim=True) + D[:, None]))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_decay_is_a_running_sum(backend: str) -> None:
    u, one = torch.randn(2, 3, 40, dtype=torch.float64), torch.ones(2, 1, 40, dtype=torch.float64)
    y = selective_scan(u, torch.ones_like(u), torch.zeros(3, 1, dtype=torch.float64), one, one, backend=backend)
    torch.testing.assert_close(y, u.cumsum(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_passed_on_to_later_tokens_only(backend: str) -> None:
    for name in ("u", "delta"):
        tensors = dict(zip(NAMES, (x.detach().float() for x in example(2, 3, 20, 4)), strict=True))
        tensors[name][1, 2, 9] = torch.nan
        y = selective_scan(**tensors, delta_softplus=True, backend=backend)
        expected = torch.zeros(2, 3, 20, dtype=torch.bool)
        expected[1, 2, 9:] = True
        assert torch.equal(y.isnan(), expected)


def test_the_same_bits_every_time_and_with_any_number_of_threads(threads) -> None:
    tensors = example(4, 130, 64, 8, torch.float32)
    results = []
    for num_threads in (1, 2, 2, 3):
        threads(num_threads)
        results.append(with_gradients(tensors, "numba"))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def _scan_in_child(tensors: list[Tensor], pipe) -> None:
    pipe.send(selective_scan(*tensors, backend="numba").numpy())


def test_threads_survive_a_fork(threads) -> None:
    tensors = [tensor.detach() for tensor in example(4, 130, 64, 8, torch.float32)]
    threads(2)
    expected = selective_scan(*tensors, backend="numba")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_scan_in_child, args=(tensors, sender))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        np.testing.assert_array_equal(receiver.recv(), expected)
    finally:
        child.kill()
        child.join()


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        self.size = max(self.size, *sizes, 0)
        return results


def test_torch_makes_no_tensor_of_all_states() -> None:
    b, d, length, s = 2, 32, 256, 16
    with Largest() as largest:
        with_gradients(example(b, d, length, s), "torch")
    assert b * d * length <= largest.size <= b * d * length * s // 16


def test_numba_takes_memory_for_a_few_inputs_only() -> None:
    b, d, length, s = 4, 128, 256, 32
    tensors = example(b, d, length, s, torch.float32)
    with_gradients(tensors, "numba")
    tracemalloc.start()
    with_gradients(tensors, "numba")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one_input = 4 * b * d * length
    assert one_input < peak < 8 * one_input < s * one_input


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_few_inputs_are_kept_for_the_backward_pass(backend: str) -> None:
    b, d, length, s = 2, 128, 256, 32
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    tensors = example(b, d, length, s, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = selective_scan(*tensors, delta_softplus=True, backend=backend)
    assert y.numel() < sum(kept.values()) < 16 * y.numel() < s * y.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_short_floats_are_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    short = [tensor.detach().to(dtype).requires_grad_() for tensor in example(2, 5, 20, 3)]
    single = [tensor.detach().float().requires_grad_() for tensor in short]
    weight = torch.ones(2, 5, 20)
    found = with_gradients(short, backend, weight.to(dtype))
    for a, b in zip(found, with_gradients(single, backend, weight), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))
    mixed = [short[0], *single[1:]]
    assert selective_scan(*mixed, backend=backend).dtype == dtype


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("u", (2, 7)),
        ("u", (2, 3, 0)),
        ("delta", (2, 3, 6)),
        ("A", (4, 5)),
        ("A", (3,)),
        ("A", (3, 0)),
        ("B", (2, 5, 1)),
        ("C", (2, 4, 7)),
        ("D", (1,)),
        ("z", (2, 3, 1)),
        ("delta_bias", (3, 1)),
    ],
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...]) -> None:
    tensors = dict(zip(NAMES, example(2, 3, 7, 5), strict=True)) | {name: torch.zeros(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=f"^{name} .*shape {shape}".replace("(", r"\(").replace(")", r"\)")):
        selective_scan(**tensors)


def test_what_cannot_be_computed_is_refused_with_the_reason() -> None:
    tensors = [tensor.detach() for tensor in example(2, 3, 7, 5)]
    with pytest.raises(ValueError, match=r"delta .*torch\.int64"):
        selective_scan(tensors[0], tensors[1].long(), *tensors[2:])
    with pytest.raises(ValueError, match=r"A .*meta"):
        selective_scan(*tensors[:2], tensors[2].to("meta"), *tensors[3:])
    with pytest.raises(ValueError, match="backend='triton' is none of auto, numba, torch, cuda"):
        selective_scan(*tensors, backend="triton")
    with pytest.raises(ValueError, match=r"backend='cuda': .* got cpu"):
        selective_scan(*tensors, backend="cuda")
    with pytest.raises(ValueError, match=r"backend='numba': .* got meta"):
        selective_scan(*(tensor.to("meta") for tensor in tensors), backend="numba")


def test_tensors_without_memory_go_through_torch() -> None:
    tensors = [tensor.detach() for tensor in example(2, 3, 7, 5)]
    assert selective_scan(*(tensor.to("meta") for tensor in tensors)).shape == (2, 3, 7)
    with FakeTensorMode() as mode:
        assert selective_scan(*(mode.from_tensor(tensor) for tensor in tensors)).shape == (2, 3, 7)


def test_function_transforms_go_through_torch() -> None:
    tensors = [tensor.detach() for tensor in example(2, 3, 11, 2)]

    def loss(u: Tensor, *rest: Tensor) -> Tensor:
        return selective_scan(u, *rest, delta_softplus=True).square().sum()

    u = tensors[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(u, *tensors[1:]), u)
    torch.testing.assert_close(torch.func.grad(loss)(*tensors), expected)
    stacked = torch.stack([tensors[0], 2 * tensors[0]])
    found = torch.func.vmap(lambda u: selective_scan(u, *tensors[1:]))(stacked)
    torch.testing.assert_close(found, torch.stack([selective_scan(u, *tensors[1:]) for u in stacked]))


def test_second_derivatives() -> None:
    tensors = example(1, 2, 5, 2)
    assert torch.autograd.gradgradcheck(lambda *x: selective_scan(*x, delta_softplus=True, backend="torch"), tensors)
    y = selective_scan(*tensors, backend="numba")
    with pytest.raises(RuntimeError, match=r"no second derivatives; .* backend='torch'"):
        torch.autograd.grad(y.sum(), tensors, create_graph=True)


# mamba_ssm needs a GPU; a stand-in of the same name shows what becomes of its kernel.


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch):
    """Install a function as mamba_ssm's kernel."""

    def install(function) -> None:
        names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[names[-1]].selective_scan_fn = function
        module._probe.cache_clear()

    yield install
    module._probe.cache_clear()


def honest(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> Tensor:
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend="numba")


def wrong_gradient(u, *rest, **options) -> Tensor:
    return honest(u, *rest, **options) + (u - u.detach())


def broken(*tensors, **options) -> Tensor:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("function", "verdict"), [(honest, None), (wrong_gradient, "another result"), (broken, "no kernel image")]
)
def test_a_kernel_is_trusted_only_after_a_trial(kernel, function, verdict: str | None) -> None:
    kernel(function)
    with torch.no_grad():
        found = module._probe(torch.device("cpu"))
    assert found is None if verdict is None else verdict in found


def test_a_missing_kernel_is_a_reason(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(honest)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", None)
    assert "cannot be imported" in module._probe(torch.device("cpu"))


def test_a_trusted_kernel_is_called_with_what_it_reads(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*arguments) -> Tensor:
        seen.extend(None if x is None else x.dtype for x in arguments[:8])
        return honest(*arguments)

    kernel(spy)
    monkeypatch.setattr(module, "_cuda_refusal", lambda tensors, **_: None)
    u, *rest = (tensor.detach().float() for tensor in example(2, 3, 7, 5))
    found = selective_scan(u.bfloat16(), *rest, delta_softplus=True)
    short, single = torch.bfloat16, torch.float32
    assert seen == [short, short, single, short, short, single, short, single]
    np.testing.assert_allclose(found.float(), sequential(u, *rest, delta_softplus=True), rtol=0.1, atol=0.1)


def test_states_that_the_kernel_does_not_know_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_probe", lambda device: None)
    *tensors, initial = with_forms("thirds", "halves")
    given = {"u": tensors[0], "B": tensors[3], "C": tensors[4]}
    monkeypatch.setattr(Tensor, "device", torch.device("cuda", 0), raising=False)
    monkeypatch.setattr(Tensor, "dtype", torch.float32, raising=False)
    assert "equally many groups" in module._cuda_refusal(given, return_last_state=False)
    assert "no gradient" in module._cuda_refusal(given, return_last_state=True)
    assert "without a state" in module._cuda_refusal(given | {"initial_state": initial}, return_last_state=False)
    with torch.no_grad():
        given["C"] = given["B"]
        assert module._cuda_refusal(given, return_last_state=True) is None


def test_a_trusted_kernel_returns_its_last_state(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*arguments, return_last_state=False):
        seen.extend(x.dtype for x in arguments[3:5])
        return selective_scan(*arguments, backend="torch", return_last_state=return_last_state)

    kernel(spy)
    monkeypatch.setattr(module, "_cuda_refusal", lambda tensors, **_: None)
    *tensors, _ = (tensor.detach().float() for tensor in with_forms("constant", "thirds"))
    tensors[0] = tensors[0].bfloat16()
    y, last = selective_scan(*tensors, delta_softplus=True, return_last_state=True)
    assert seen == [torch.float32, torch.bfloat16]
    assert (y.dtype, last.dtype, last.shape) == (torch.bfloat16, torch.float32, (2, 6, 3))
