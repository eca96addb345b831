"""The convention, and how permutations are applied, against autograd through the dense matrices."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from permlab.ops.sorting import soft_sort
from permlab.permutation import PermutationSample, Site, check_order, gather_items, invert, order_to_matrix, permute

BATCHES = [(), (2,), (2, 3)]
# Batch axes of the sample, then those of the items.
PAIRS = [((), ()), ((), (4,)), ((1,), (4,)), ((4,), (4,)), ((3, 1), (4,)), ((3, 4), (4,)), ((4,), ()), ((1, 4), (3, 1))]


class Recorder(TorchDispatchMode):
    """Names of the kernels that ran, and the number of elements of the largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result

    @property
    def products(self):
        return [name for name in self.names if "mm" in name or "matmul" in name or "einsum" in name or "dot" in name]


def random_order(*shape):
    return torch.rand(*shape).argsort(-1)


def make_sample(batch, n, estimator, dtype=torch.float64):
    soft = torch.rand(*batch, n, n, dtype=dtype).softmax(-1).requires_grad_()
    return PermutationSample(order=random_order(*batch, n), soft=soft, log_prob=None, estimator=estimator)


def dense(x, sample):
    """The straight-through estimator as it is written: (hard + soft - stop(soft)) @ x."""
    hard = order_to_matrix(sample.order, dtype=x.dtype)
    return (hard + sample.soft - sample.soft.detach()) @ x


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_order_rank_and_matrix_agree(batch, n):
    order = random_order(*batch, n)
    rank, matrix = invert(order), order_to_matrix(order, dtype=torch.float64)
    slots = torch.arange(n).expand_as(order)
    assert torch.equal(rank.gather(-1, order), slots)
    assert torch.equal(order.gather(-1, rank), slots)
    assert torch.equal(invert(rank), order)
    assert torch.equal(matrix.argmax(-1), order)
    assert torch.equal(matrix.argmax(-2), rank)
    assert torch.equal(matrix @ matrix.mT, torch.eye(n, dtype=torch.float64).expand_as(matrix))
    x = torch.randn(*batch, n, 4, dtype=torch.float64)
    assert torch.equal(gather_items(x, order), matrix @ x)
    assert torch.equal(gather_items(gather_items(x, order), rank), x)


def test_gather_is_indexing():
    x, order = torch.randn(5, 3), random_order(5)
    assert torch.equal(gather_items(x, order), x[order])


@pytest.mark.parametrize(("sample_batch", "item_batch"), PAIRS)
def test_straight_through_is_the_gather_with_the_dense_gradients(sample_batch, item_batch):
    sample = make_sample(sample_batch, 6, "straight_through")
    x = torch.randn(*item_batch, 6, 5, dtype=torch.float64, requires_grad=True)
    y, expected = permute(x, sample), dense(x, sample)
    hard = order_to_matrix(sample.order, dtype=x.dtype) @ x
    assert y.shape == expected.shape
    assert torch.equal(y, hard)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, sample.soft), upstream)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, (x, sample.soft), upstream), strict=True):
        assert gradient.shape == reference.shape
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("wanted", ["x", "soft"])
def test_straight_through_with_one_gradient_wanted(wanted):
    sample = make_sample((), 4, "straight_through")
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    leaf, other = (x, sample.soft) if wanted == "x" else (sample.soft, x)
    other.requires_grad_(False)
    (gradient,) = torch.autograd.grad(permute(x, sample).square().sum(), leaf)
    (expected,) = torch.autograd.grad(dense(x, sample).square().sum(), leaf)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("sample_batch", "item_batch"), PAIRS)
def test_no_matrix_product_in_the_forward_pass(sample_batch, item_batch):
    sample = make_sample(sample_batch, 6, "straight_through")
    x = torch.randn(*item_batch, 6, 5, dtype=torch.float64, requires_grad=True)
    with Recorder() as forward:
        y = permute(x, sample)
    assert forward.names
    assert forward.products == []
    with Recorder() as reference:
        dense(x, sample)
    assert reference.products != []
    with Recorder() as backward:
        torch.autograd.grad(y.sum(), sample.soft)
    assert len(backward.products) == 1


@pytest.mark.parametrize("sample_batch", [(), (1,), (3, 1)])
def test_backward_makes_no_matrix_per_batch_entry(sample_batch):
    n, b, d = 12, 16, 2
    sample = make_sample(sample_batch, n, "straight_through")
    y = permute(torch.randn(b, n, d, dtype=torch.float64), sample)
    with Recorder() as backward:
        torch.autograd.grad(y.sum(), sample.soft)
    assert 0 < backward.largest <= max(y.numel(), sample.soft.numel())


@pytest.mark.parametrize(("sample_batch", "item_batch"), PAIRS)
def test_relaxed_multiplies(sample_batch, item_batch):
    sample = make_sample(sample_batch, 6, "relaxed")
    x = torch.randn(*item_batch, 6, 5, dtype=torch.float64, requires_grad=True)
    y = permute(x, sample)
    torch.testing.assert_close(y, torch.einsum("...ij,...jd->...id", sample.soft, x))
    upstream = torch.randn_like(y)
    grad_x, grad_soft = torch.autograd.grad(y, (x, sample.soft), upstream)
    torch.testing.assert_close(grad_x, (sample.soft.mT @ upstream).sum_to_size(x.shape))
    torch.testing.assert_close(grad_soft, (upstream @ x.mT).sum_to_size(sample.soft.shape))


@pytest.mark.parametrize("estimator", ["score_function", "none"])
@pytest.mark.parametrize(("sample_batch", "item_batch"), PAIRS)
def test_the_other_estimators_gather(estimator, sample_batch, item_batch):
    order = random_order(*sample_batch, 6)
    sample = PermutationSample(order=order, soft=None, log_prob=None, estimator=estimator)
    x = torch.randn(*item_batch, 6, 5, dtype=torch.float64, requires_grad=True)
    y, expected = permute(x, sample), order_to_matrix(order, dtype=x.dtype) @ x
    assert torch.equal(y, expected)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(result, x, upstream)[0] for result in (y, expected)))


def test_tied_scores_still_give_a_true_permutation():
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0], requires_grad=True)
    order = scores.argsort(descending=True, stable=True)
    soft = soft_sort(scores, temperature=0.1)
    x = torch.arange(5.0).unsqueeze(-1)
    y = permute(x, PermutationSample(order=order, soft=soft, log_prob=None, estimator="straight_through"))
    assert y.flatten().tolist() == [1, 3, 4, 0, 2]
    (gradient,) = torch.autograd.grad((y * torch.randn(5, 1)).sum(), scores)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_bad_item_stays_in_its_slot(value):
    """A product with the hard matrix would spread it: 0 * inf is NaN."""
    sample = make_sample((), 4, "straight_through", dtype=torch.float32)
    x = torch.randn(4, 2)
    x[1] = value
    y = permute(x, sample)
    assert torch.equal(y.isfinite().all(-1), sample.order != 1)


@pytest.mark.parametrize("estimator", ["relaxed", "straight_through"])
def test_bfloat16_items_with_a_float32_matrix(estimator):
    sample = make_sample((), 8, estimator, dtype=torch.float32)
    x = torch.randn(3, 8, 4).to(torch.bfloat16).requires_grad_()
    y = permute(x, sample)
    assert y.dtype == torch.bfloat16
    if estimator == "straight_through":
        assert torch.equal(y, x[:, sample.order])
    else:
        torch.testing.assert_close(y.float(), sample.soft @ x.float(), atol=0.02, rtol=0.02)
    grad_x, grad_soft = torch.autograd.grad(y.float().square().sum(), (x, sample.soft))
    assert (grad_x.dtype, grad_soft.dtype) == (torch.bfloat16, torch.float32)
    assert grad_soft.isfinite().all()


def test_one_item():
    sample = make_sample((), 1, "straight_through")
    x = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
    y = permute(x, sample)
    assert torch.equal(y, x)
    grad_x, grad_soft = torch.autograd.grad(y.sum(), (x, sample.soft))
    assert torch.equal(grad_x, torch.ones_like(x))
    torch.testing.assert_close(grad_soft, x.sum().reshape(1, 1))


def test_permute_refuses_what_does_not_fit(unchecked):
    order = torch.arange(3)
    plain = PermutationSample(order=order, soft=None, log_prob=None, estimator="none")
    with pytest.raises(ValueError, match=r"\(4, 2\) do not fit an order of 3"):
        permute(torch.zeros(4, 2), plain)
    with pytest.raises(ValueError, match=r"\(3,\) do not fit"):
        permute(torch.zeros(3), plain)
    for estimator in ("relaxed", "straight_through"):
        with pytest.raises(ValueError, match=f"a {estimator} sample needs a soft matrix"):
            permute(torch.zeros(3, 1), PermutationSample(order=order, soft=None, log_prob=None, estimator=estimator))


@pytest.mark.parametrize("check", [check_order, invert, order_to_matrix])
@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.tensor([0, 0, 1]), r"0\.\.2, index 2 is missing: \[0, 0, 1\]"),
        (torch.tensor([-1, 0, 1]), r"index 2 is missing: \[-1, 0, 1\]"),
        (torch.tensor([1, 2, 3]), r"index 0 is missing: \[1, 2, 3\]"),
        (torch.tensor([[[0, 1], [1, 0]], [[1, 1], [0, 0]]]), r"index 0 is missing: \[1, 1\]"),
        (torch.zeros(20, dtype=torch.int64), r"index 1 is missing: \[0(, 0){15}, \.\.\.\]"),
        (torch.tensor([0.0, 1.0]), "float32"),
        (torch.tensor([1, 0], dtype=torch.int32), "int32"),
        (torch.zeros(2, 0, dtype=torch.int64), r"shape \(2, 0\)"),
        (torch.tensor(0), r"shape \(\)"),
    ],
)
def test_what_is_no_order(check, order, message, unchecked):
    with pytest.raises(ValueError, match=message):
        check(order)


def test_site_keeps_items_in_their_groups():
    site = Site("channels", torch.tensor([1, 0, 2, 3, 5, 4]), num_groups=3)
    assert site.num_items == 6
    with pytest.raises(ValueError, match="num_groups=4 does not divide 6"):
        Site("channels", torch.arange(6), num_groups=4)
    with pytest.raises(ValueError, match="num_groups=0"):
        Site("channels", torch.arange(6), num_groups=0)
    with pytest.raises(ValueError, match="channels crosses its 2 groups"):
        Site("channels", torch.tensor([0, 1, 3, 2, 4, 5]), num_groups=2)
    with pytest.raises(ValueError, match=r"\[0, 0\]"):
        Site("channels", torch.tensor([0, 0]))
