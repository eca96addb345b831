"""Scores against their definitions entry by entry, SparseGPT against explicit inverses of the rest of the Hessian."""

import pytest
import torch

from permlab.ops.nm import nm_mask
from permlab.permutation import invert
from permlab.sparsity.importance import magnitude, ria, saliency, sparsegpt, wanda

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layer(num_outputs, width, num_tokens=400, dtype=torch.float64):
    """A weight, and inputs whose channels are correlated and of very different size."""
    weight = torch.randn(num_outputs, width, dtype=torch.float64)
    mixing = torch.randn(max(2, width // 4), width, dtype=torch.float64)
    inputs = torch.randn(num_tokens, len(mixing), dtype=torch.float64) @ mixing
    inputs = inputs + 0.3 * torch.randn(num_tokens, width, dtype=torch.float64)
    inputs = inputs * torch.randn(width, dtype=torch.float64).exp()
    return weight.to(dtype), inputs


def damp(hessian, damping):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def error(weight, pruned, inputs):
    return float(((weight.double() - pruned.double()) @ inputs.T).square().sum())


def surgery(weight, hessian, n, m, damping):
    """SparseGPT by the book: each removal inverts what is left of the Hessian, each row by itself."""
    damped = damp(hessian, damping)
    left = [torch.linalg.inv(damped[j:, j:]) for j in range(len(damped))]
    result, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for row, keep in zip(result, mask, strict=True):
        for j in range(len(row)):
            if j % m == 0:
                cost = {k: float(row[k] ** 2 / left[k][0, 0]) for k in range(j, j + m)}
                keep[sorted(cost, key=cost.__getitem__)[: m - n]] = False
            if not keep[j]:
                row[j:] -= row[j] / left[j][0, 0] * left[j][:, 0]
                row[j] = 0
    return result, mask


def test_magnitude():
    weight = torch.randn(3, 5)
    expected = torch.tensor([[abs(value) for value in row] for row in weight.tolist()])
    assert torch.equal(magnitude(weight), expected)


def test_wanda():
    weight, inputs = layer(3, 5)
    scores = wanda(weight, torch.linalg.vector_norm(inputs, dim=0))
    for i in range(3):
        for j in range(5):
            norm = sum(float(x) ** 2 for x in inputs[:, j]) ** 0.5
            assert float(scores[i, j]) == pytest.approx(abs(float(weight[i, j])) * norm, rel=1e-12)


@pytest.mark.parametrize("power", [0, 0.5, 1.0, 2.0])
def test_ria(power):
    weight, norm = torch.randn(3, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    scores = ria(weight, norm, power=power)
    size = [[abs(value) for value in row] for row in weight.tolist()]
    for i in range(3):
        for j in range(5):
            shares = size[i][j] / sum(size[i]) + size[i][j] / sum(row[j] for row in size)
            assert float(scores[i, j]) == pytest.approx(shares * float(norm[j]) ** power, rel=1e-12)


def test_ria_takes_half_the_power_by_default():
    weight, norm = torch.randn(3, 5), torch.rand(5)
    assert torch.equal(ria(weight, norm), ria(weight, norm, power=0.5))
    assert not torch.equal(ria(weight, norm), ria(weight, norm, power=0.6))


def test_ria_of_zero_rows_and_columns():
    weight = torch.randn(4, 6)
    weight[1] = 0
    weight[:, 2] = 0
    scores = ria(weight, torch.tensor([1.0, 0.0, 0.0, 2.0, 3.0, 4.0]))
    assert (scores[1] == 0).all()
    assert (scores[:, 1:3] == 0).all()
    assert (scores[[0, 2, 3]][:, [0, 3, 4, 5]] > 0).all()
    assert torch.equal(ria(torch.zeros(2, 4), torch.zeros(4)), torch.zeros(2, 4))


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
def test_saliency_is_the_error_left_after_the_best_adjustment(damping):
    weight, inputs = layer(3, 7)
    hessian = inputs.T @ inputs
    scores = saliency(weight, hessian, damping=damping)
    damped = damp(hessian, damping)
    for i in range(3):
        for j in range(7):
            others = [k for k in range(7) if k != j]
            change = torch.zeros(7, dtype=torch.float64)
            change[j] = -weight[i, j]
            change[others] = torch.linalg.solve(damped[others][:, others], -damped[others, j] * change[j])
            assert float(scores[i, j]) == pytest.approx(float(change @ damped @ change), rel=1e-8)


def test_saliency_of_dead_channels_is_zero():
    weight, inputs = layer(3, 7)
    inputs[:, [2, 5]] = 0
    for damping in (0.0, 0.01):
        scores = saliency(weight, inputs.T @ inputs, damping=damping)
        assert (scores[:, [2, 5]] == 0).all()
        assert (scores[:, [0, 1, 3, 4, 6]] > 0).all()
    assert torch.equal(saliency(weight, torch.zeros(7, 7)), torch.zeros(3, 7, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_keep_the_dtype_of_the_weight(dtype):
    weight, inputs = layer(6, 8, dtype=dtype)
    norm, hessian = torch.linalg.vector_norm(inputs, dim=0).float(), (inputs.T @ inputs / 400).float()
    for score in (magnitude, lambda w: wanda(w, norm), lambda w: ria(w, norm), lambda w: saliency(w, hessian)):
        scores, exact = score(weight), score(weight.double())
        assert scores.dtype == dtype
        assert (scores >= 0).all()
        torch.testing.assert_close(scores.double(), exact, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6)


PATTERNS = [
    (8, 2, 4),
    (16, 1, 4),
    (12, 3, 4),
    (16, 4, 8),
    (12, 1, 2),
    (4, 2, 4),
    (264, 5, 12),
    (256, 2, 4),
    (288, 70, 144),
]


@pytest.mark.parametrize(("width", "n", "m"), PATTERNS)
def test_sparsegpt_is_repeated_surgery(width, n, m):
    weight, inputs = layer(3, width)
    hessian = inputs.T @ inputs
    pruned, mask = sparsegpt(weight, hessian, n=n, m=m)
    expected, expected_mask = surgery(weight, hessian, n, m, 0.01)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(pruned, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damping", [0.0, 0.1, 1.0])
def test_damping(damping):
    weight, inputs = layer(4, 16)
    hessian = inputs.T @ inputs
    pruned, mask = sparsegpt(weight, hessian, n=2, m=4, damping=damping)
    expected, expected_mask = surgery(weight, hessian, 2, 4, damping)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(pruned, expected, rtol=1e-8, atol=1e-8)
    assert not torch.equal(pruned, sparsegpt(weight, hessian, n=2, m=4, damping=damping + 0.05)[0])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_sparsegpt_reconstructs_better_than_masks_alone(n, m):
    weight, inputs = layer(32, 64)
    norm = torch.linalg.vector_norm(inputs, dim=0)
    pruned, mask = sparsegpt(weight, inputs.T @ inputs, n=n, m=m)
    scores = {"magnitude": magnitude(weight), "wanda": wanda(weight, norm), "ria": ria(weight, norm)}
    for name, score in scores.items():
        masked = weight * nm_mask(score, n=n, m=m)
        assert error(weight, pruned, inputs) < 0.7 * error(weight, masked, inputs), name
    # The update itself, not only the choice of what to drop.
    assert error(weight, pruned, inputs) < error(weight, weight * mask, inputs)


def test_an_order_is_a_permutation_of_the_inputs():
    weight, inputs = layer(8, 24)
    hessian = inputs.T @ inputs
    order = torch.randperm(24)
    pruned, mask = sparsegpt(weight, hessian, n=2, m=4, order=order)
    by_hand, mask_by_hand = sparsegpt(weight[:, order], hessian[order][:, order], n=2, m=4)
    rank = invert(order)
    torch.testing.assert_close(pruned, by_hand[:, rank], rtol=1e-12, atol=1e-12)
    assert torch.equal(mask, mask_by_hand[:, rank])
    assert (mask[:, order].view(8, 6, 4).sum(-1) == 2).all()
    assert not torch.equal(mask, sparsegpt(weight, hessian, n=2, m=4)[1])
    same = sparsegpt(weight, hessian, n=2, m=4, order=torch.arange(24))
    assert torch.equal(same[0], sparsegpt(weight, hessian, n=2, m=4)[0])


def test_pruned_entries_are_zero_and_inputs_left_alone():
    weight, inputs = layer(8, 24, dtype=torch.float32)
    weight.requires_grad_()
    hessian = inputs.T @ inputs
    before = weight.detach().clone(), hessian.clone()
    pruned, mask = sparsegpt(weight, hessian, n=2, m=4, order=torch.randperm(24))
    assert torch.equal(pruned != 0, mask)
    assert not pruned.requires_grad
    assert pruned.is_contiguous()
    assert mask.is_contiguous()
    assert torch.equal(weight.detach(), before[0])
    assert torch.equal(hessian, before[1])


def test_uncorrelated_inputs_need_no_update():
    """With a diagonal Hessian nothing is handed on, and the choice is Wanda's."""
    weight, norm = torch.randn(5, 16), torch.rand(16) + 0.5
    pruned, mask = sparsegpt(weight, norm.square().diag(), n=2, m=4, damping=0.0)
    assert torch.equal(mask, nm_mask(wanda(weight, norm), n=2, m=4))
    assert torch.equal(pruned, weight * mask)


def test_the_scale_of_the_hessian_does_not_matter():
    weight, inputs = layer(8, 24)
    hessian = inputs.T @ inputs
    pruned, mask = sparsegpt(weight, hessian, n=2, m=4)
    for scale in (2.0**-30, 2.0**30):
        scaled, scaled_mask = sparsegpt(weight, scale * hessian, n=2, m=4)
        assert torch.equal(mask, scaled_mask)
        torch.testing.assert_close(pruned, scaled, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_channels_are_dropped_first_and_change_nothing_else(damping):
    weight, inputs = layer(6, 16)
    dead = [1, 2, 8, 9, 10, 15]
    inputs[:, dead] = 0
    weight[:, dead] *= 100
    pruned, mask = sparsegpt(weight, inputs.T @ inputs, n=2, m=4, damping=damping)
    assert mask[:, :4].tolist() == [[True, False, False, True]] * 6
    assert mask[:, 8:12].tolist() == [[True, False, False, True]] * 6  # one dead channel must stay: the first
    assert not mask[:, 15].any()
    assert torch.equal(pruned[:, 8], weight[:, 8])
    weight[:, dead] = 0
    others = sparsegpt(weight, inputs.T @ inputs, n=2, m=4, damping=damping)[0]
    alive = [j for j in range(16) if j not in dead]
    torch.testing.assert_close(pruned[:, alive], others[:, alive])


def test_a_hessian_of_zeros_leaves_what_is_kept():
    weight = torch.randn(3, 8)
    pruned, mask = sparsegpt(weight, torch.zeros(8, 8), n=2, m=4)
    assert torch.equal(pruned, weight * mask)
    assert torch.equal(mask.sum(1), torch.full((3,), 4))


def test_fewer_tokens_than_channels():
    weight, inputs = layer(4, 32, num_tokens=9)
    pruned, mask = sparsegpt(weight, inputs.T @ inputs, n=2, m=4)
    expected, expected_mask = surgery(weight, inputs.T @ inputs, 2, 4, 0.01)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(pruned, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparsegpt_computes_in_float32_at_least(dtype):
    weight, inputs = layer(16, 64, dtype=dtype)
    hessian = inputs.T @ inputs
    pruned, _ = sparsegpt(weight, hessian.float(), n=2, m=4)
    exact, _ = sparsegpt(weight.double(), hessian, n=2, m=4)
    assert pruned.dtype == dtype
    expected = error(weight, exact, inputs)
    assert error(weight, pruned, inputs) == pytest.approx(expected, rel=max(1e-3, torch.finfo(dtype).eps))


def test_scores_beyond_the_range_of_the_dtype():
    weight, norm = torch.ones(2, 4, dtype=torch.float16), torch.full((4,), 7e4)
    with pytest.raises(ValueError, match=r"7e\+04 is beyond the range of torch.float16"):
        wanda(weight, norm)
    with pytest.raises(ValueError, match=r"beyond the range of torch.float16"):
        saliency(weight, 1e6 * torch.eye(4))
    assert wanda(weight.float(), norm).isfinite().all()


WEIGHT, NORM, HESSIAN = torch.ones(3, 8), torch.ones(8), torch.eye(8)


def broken(tensor, value, *position):
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


def prune(weight=WEIGHT, hessian=HESSIAN, *, n=2, m=4, **options):
    return sparsegpt(weight, hessian, n=n, m=m, **options)


SCORES = [
    magnitude,
    lambda weight: wanda(weight, NORM),
    lambda weight: ria(weight, NORM),
    lambda weight: saliency(weight, HESSIAN),
    lambda weight: prune(weight),
]


@pytest.mark.parametrize("score", SCORES)
def test_bad_weights(score, unchecked):
    cases = [
        (broken(WEIGHT, float("nan"), 1, 2), r"weight at \[1, 2\] is nan"),
        (broken(WEIGHT, -float("inf"), 0, 7), r"weight at \[0, 7\] is -inf"),
        (torch.ones(8), r"shape \(8,\)"),
        (torch.ones(2, 3, 8), r"shape \(2, 3, 8\)"),
        (torch.ones(0, 8), r"shape \(0, 8\)"),
        (torch.ones(3, 8, dtype=torch.int64), "int64"),
    ]
    for weight, message in cases:
        with pytest.raises(ValueError, match=message):
            score(weight)


def test_bad_norms(unchecked):
    cases = [
        (broken(NORM, float("nan"), 3), r"norm at \[3\] is nan"),
        (broken(NORM, -0.5, 3), "not negative, got -0.5"),
        (torch.ones(7), r"norms of shape \(7,\) do not fit a weight of shape \(3, 8\)"),
        (torch.ones(1, 8), r"norms of shape \(1, 8\)"),
        (torch.ones(8, dtype=torch.int64), "int64"),
    ]
    for norm, message in cases:
        for score in (wanda, ria):
            with pytest.raises(ValueError, match=message):
                score(WEIGHT, norm)
    for power in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"power={power}"):
            ria(WEIGHT, NORM, power=power)


def test_bad_hessians(unchecked):
    indefinite = broken(HESSIAN, -1.0, 5, 5)
    singular = torch.ones(8, 8)
    cases = [
        ({"hessian": broken(HESSIAN, float("inf"), 5, 1)}, r"Hessian at \[5, 1\] is inf"),
        ({"hessian": torch.eye(7)}, r"Hessian of shape \(7, 7\) does not fit a weight of shape \(3, 8\)"),
        ({"hessian": torch.ones(8)}, r"Hessian of shape \(8,\)"),
        ({"hessian": torch.eye(8, dtype=torch.int64)}, "int64"),
        ({"hessian": indefinite}, r"not positive definite with damping=0.01"),
        ({"hessian": singular, "damping": 0.0}, r"not positive definite with damping=0.0; raise the damping"),
        ({"damping": -0.1}, "damping=-0.1"),
        ({"damping": float("nan")}, "damping=nan"),
    ]
    for options, message in cases:
        for score in (prune, lambda hessian=HESSIAN, **rest: saliency(WEIGHT, hessian, **rest)):
            with pytest.raises(ValueError, match=message):
                score(**options)


def test_bad_patterns_and_orders(unchecked):
    cases = [
        ({"m": 3}, "m=3 does not divide the width 8; nearest that do: 4"),
        ({"n": 4}, "n=4 of every m=4"),
        ({"order": torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])}, "index 7 is missing"),
        ({"order": torch.arange(4)}, r"order of shape \(4,\) does not fit the 8 columns"),
        ({"order": torch.arange(8).expand(2, 8)}, r"order of shape \(2, 8\)"),
        ({"order": torch.arange(8.0)}, "int64, got torch.float32"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            prune(**options)


# SparseGPT with a mask that is given


@pytest.mark.parametrize("ordered", [False, True])
def test_sparsegpt_given_its_own_mask_is_sparsegpt(ordered):
    weight, inputs = layer(6, 32)
    hessian, order = inputs.mT @ inputs, torch.randperm(32) if ordered else None
    pruned, mask = sparsegpt(weight, hessian, n=2, m=4, order=order)
    again, same = sparsegpt(weight, hessian, n=2, m=4, order=order, mask=mask)
    assert torch.equal(mask, same)
    assert torch.equal(pruned, again)


def test_sparsegpt_with_a_mask_is_least_squares_where_all_that_is_dropped_comes_first():
    """Each row by itself: the weights that are left give the dense output as well as any can."""
    weight, inputs = layer(3, 4)
    hessian = inputs.mT @ inputs
    mask = torch.tensor([[False, False, True, True]] * 3)
    pruned, _ = sparsegpt(weight, hessian, n=2, m=4, damping=0.0, mask=mask)
    best = torch.linalg.lstsq(inputs[:, 2:], inputs @ weight.mT).solution.mT
    assert torch.allclose(pruned[:, 2:], best, rtol=1e-6)
    assert (pruned[:, :2] == 0).all()


def test_sparsegpt_with_another_mask_keeps_it_and_loses_less_than_no_update():
    weight, inputs = layer(6, 32)
    hessian = inputs.mT @ inputs
    mask = nm_mask(torch.rand(6, 32), n=2, m=4)
    pruned, same = sparsegpt(weight, hessian, n=2, m=4, mask=mask)
    assert torch.equal(mask, same)
    assert (pruned[~mask] == 0).all()
    assert error(weight, pruned, inputs) < error(weight, weight * mask, inputs)


def test_sparsegpt_refuses_a_mask_of_another_pattern():
    weight, inputs = layer(2, 8)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, :4] = True
    with pytest.raises(ValueError, match="the mask keeps more than 2 of 4 consecutive channels"):
        sparsegpt(weight, inputs.mT @ inputs, n=2, m=4, mask=mask)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    assert sparsegpt(weight, inputs.mT @ inputs, n=2, m=4, order=order, mask=mask)[1].equal(mask)
