"""N:M masks under a permutation and back, and the gradients that they are given."""

from typing import Any

import pytest
import torch
from torch import Tensor

from permlab.permutation import PermutationSample, order_to_matrix
from permlab.sparsity.mask import hard_mask, keep_best, relaxed_mask, split_sample, straight_through_prune

PATTERNS = [(1, 2), (2, 4), (4, 8), (1, 4), (3, 4), (5, 6)]


def keep_by_sorting(slots: Tensor, n: int, m: int) -> Tensor:
    """Row by row and group by group with python's sort, whose ties keep the first."""
    keep = torch.zeros_like(slots, dtype=torch.bool)
    for row in range(slots.shape[1]):
        for first in range(0, len(slots), m):
            places = sorted(range(first, first + m), key=lambda place: -slots[place, row].item())
            for place in places[:n]:
                keep[place, row] = True
    return keep


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("tied", [False, True])
def test_keep_best_is_a_stable_sort(n: int, m: int, tied: bool) -> None:
    slots = torch.randint(3, (3 * m, 7)).double() if tied else torch.rand(3 * m, 7).double()
    keep = keep_best(slots, n=n, m=m)
    assert torch.equal(keep, keep_by_sorting(slots, n, m))
    assert (keep.view(3, m, 7).sum(1) == n).all()


def test_keep_best_takes_batches_and_long_groups() -> None:
    slots = torch.rand(2, 3, 8, 5)
    keep = keep_best(slots, n=2, m=4)
    assert torch.equal(keep[1, 2], keep_by_sorting(slots[1, 2], 2, 4))
    # Ranks of 300 do not fit into a byte.
    slots = torch.randint(50, (600, 2)).float()
    assert torch.equal(keep_best(slots, n=140, m=300), keep_by_sorting(slots, 140, 300))


def test_equal_scores_keep_the_first() -> None:
    assert keep_best(torch.ones(8, 1), n=2, m=4).flatten().tolist() == 2 * [True, True, False, False]


# Under an order, and back


def random_orders(num_groups: int, size: int) -> Tensor:
    return torch.stack([torch.randperm(size) for _ in range(num_groups)])


def permuted_there_and_back(order: Tensor, scores: Tensor, n: int, m: int) -> Tensor:
    mask = torch.zeros_like(scores)
    keep = keep_by_sorting(scores[order], n, m)
    for slot, item in enumerate(order.tolist()):
        mask[item] = keep[slot]
    return mask


def straight_through_mask(soft: Tensor, order: Tensor, scores: Tensor, **options: Any) -> Tensor:
    """The mask alone, by group: weights of one, and groups one after the other."""
    flat = scores.flatten(0, 1)
    base = torch.arange(len(flat))
    return straight_through_prune(torch.ones_like(flat), flat, soft, order, base, **options).view(scores.shape)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_forward_pass_is_permute_mask_and_permute_back(n: int, m: int) -> None:
    scores, order = torch.rand(3, 2 * m, 5).double(), random_orders(3, 2 * m)
    mask = straight_through_mask(torch.rand(3, 2 * m, 2 * m), order, scores, n=n, m=m, mask_temperature=0.7)
    assert mask.dtype == scores.dtype
    for group in range(3):
        expected = permuted_there_and_back(order[group], scores[group], n, m)
        assert torch.equal(mask[group], expected)
        assert torch.equal(hard_mask(order[group], scores[group], n=n, m=m), expected)


def softmax_of_every_m(slots: Tensor, m: int, mask_temperature: float) -> Tensor:
    unit = mask_temperature * slots.detach().mean()
    return (slots / unit).view(slots.shape[0], -1, m, slots.shape[-1]).softmax(2).view(slots.shape)


def dense_straight_through(soft: Tensor, order: Tensor, scores: Tensor, n: int, m: int, temperature: float) -> Tensor:
    """The estimator in plain torch: hard in the forward pass, its relaxation in the backward pass, twice."""
    matrix = order_to_matrix(order).to(soft.dtype) + (soft - soft.detach())
    slots = matrix @ scores
    share = softmax_of_every_m(slots, m, temperature)
    keep = torch.stack([keep_by_sorting(group, n, m) for group in slots.detach()]).to(soft.dtype)
    return matrix.mT @ (keep + (share - share.detach()))


def dense_permllm(soft: Tensor, order: Tensor, scores: Tensor, n: int, m: int, temperature: float) -> Tensor:
    """As PermLLM's code has it: hard mask and softmax are both mapped back before one stands for the other."""
    matrix = order_to_matrix(order).to(soft.dtype) + (soft - soft.detach())
    slots = matrix @ scores
    keep = torch.stack([keep_by_sorting(group, n, m) for group in slots.detach()]).to(soft.dtype)
    hard_mask, soft_mask = matrix.mT @ keep, matrix.mT @ softmax_of_every_m(slots, m, temperature)
    return (hard_mask - soft_mask).detach() + soft_mask


DENSE = {"hard": dense_straight_through, "softmax": dense_permllm}


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("backward", DENSE)
def test_the_gradient_is_that_of_the_dense_estimator(n: int, m: int, temperature: float, backward: str) -> None:
    scores, order = torch.rand(2, 3 * m, 5).double(), random_orders(2, 3 * m)
    soft = torch.rand(2, 3 * m, 3 * m).double().softmax(-1).requires_grad_()
    cost = torch.randn(2, 3 * m, 5).double()
    options = {"n": n, "m": m, "mask_temperature": temperature, "mask_backward": backward}
    ours = straight_through_mask(soft, order, scores, **options)
    theirs = DENSE[backward](soft, order, scores, n, m, temperature)
    torch.testing.assert_close(ours, theirs.detach())
    # A nonlinear loss, so that the gradient depends on the mask.
    found, expected = (torch.autograd.grad((cost * mask + mask**3 * cost**2).sum(), soft)[0] for mask in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("part", [1, 40, 2**22])
def test_weights_and_a_base_order_in_parts_of_rows(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr("permlab.sparsity.mask._PART", part)
    weights, scores = torch.randn(12, 7).double(), torch.rand(12, 7).double()
    base, order = torch.randperm(12), random_orders(3, 4)
    soft = torch.rand(3, 4, 4).double().softmax(-1).requires_grad_()
    cost = torch.randn(12, 7).double()
    ours = straight_through_prune(weights, scores, soft, order, base, n=2, m=4, mask_temperature=0.8)
    mask = dense_straight_through(soft, order, scores[base].view(3, 4, 7), 2, 4, 0.8).flatten(0, 1)
    theirs = weights * mask[base.argsort()]
    torch.testing.assert_close(ours, theirs.detach())
    found, expected = (torch.autograd.grad((cost * pruned**2).sum(), soft)[0] for pruned in (ours, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_relaxed_mask_is_the_dense_one(n: int, m: int) -> None:
    scores = torch.rand(2, 2 * m, 5).double()
    soft = torch.randn(2, 2 * m, 2 * m).double().softmax(-1).requires_grad_()
    keep, mask = relaxed_mask(soft, scores, n=n, m=m, mask_temperature=0.6)
    slots = soft @ scores
    share = softmax_of_every_m(slots, m, 0.6)
    hard = torch.stack([keep_by_sorting(group, n, m) for group in slots.detach()]).double()
    expected_keep = hard + (share - share.detach())
    expected = soft.mT @ expected_keep
    torch.testing.assert_close(keep, expected_keep)
    torch.testing.assert_close(mask, expected)
    first, second = torch.randn(2, 2, 2 * m, 5).double()
    gradients = [
        torch.autograd.grad((first * k).sum() + (second * v**2).sum(), soft)[0]
        for k, v in ((keep, mask), (expected_keep, expected))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_relaxation_that_is_a_permutation_gives_its_mask() -> None:
    scores, order = torch.rand(2, 8, 5).double(), random_orders(2, 8)
    _, relaxed = relaxed_mask(order_to_matrix(order).double(), scores, n=2, m=4, mask_temperature=1.0)
    hard = straight_through_mask(torch.zeros(2, 8, 8), order, scores, n=2, m=4, mask_temperature=1.0)
    torch.testing.assert_close(relaxed, hard)


def test_the_identity_changes_nothing_and_a_frozen_matrix_gets_no_gradient() -> None:
    scores = torch.rand(1, 8, 5)
    mask = straight_through_mask(torch.eye(8)[None], torch.arange(8)[None], scores, n=2, m=4, mask_temperature=1.0)
    assert torch.equal(mask[0].bool(), keep_by_sorting(scores[0], 2, 4))
    assert not mask.requires_grad
    keep, relaxed = relaxed_mask(torch.eye(8)[None], scores, n=2, m=4, mask_temperature=1.0)
    assert torch.equal(keep, mask)
    assert torch.equal(relaxed, mask)


def test_scores_of_zero_give_a_finite_gradient() -> None:
    soft = torch.rand(1, 4, 4, requires_grad=True)
    mask = straight_through_mask(soft, torch.arange(4)[None], torch.zeros(1, 4, 3), n=2, m=4, mask_temperature=1.0)
    (gradient,) = torch.autograd.grad(mask.sum(), soft)
    assert torch.isfinite(gradient).all()


# Groups


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_split_sample_takes_the_diagonal_blocks(batch: tuple[int, ...]) -> None:
    order = torch.cat([4 * group + torch.rand(*batch, 4).argsort(-1) for group in range(3)], dim=-1)
    soft = torch.rand(*batch, 12, 12)
    orders, blocks = split_sample(PermutationSample(order, soft, None, "relaxed"), 3)
    assert orders.shape == (*batch, 3, 4)
    assert blocks.shape == (*batch, 3, 4, 4)
    for group in range(3):
        part = slice(4 * group, 4 * group + 4)
        assert torch.equal(orders[..., group, :], order[..., part] - 4 * group)
        assert torch.equal(blocks[..., group, :, :], soft[..., part, part])


def test_a_sample_without_a_relaxation_has_none_by_group() -> None:
    orders, blocks = split_sample(PermutationSample(torch.tensor([1, 0, 2, 3]), None, None, "none"), 2)
    assert orders.tolist() == [[1, 0], [0, 1]]
    assert blocks is None
