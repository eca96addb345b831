"""The search on the layers' error against a naive replay that computes outputs from the inputs."""

import time

import numpy as np
import pytest
import torch
from orders import assert_within_groups, swapped, swaps

from permlab.sparsity import reconstruction_search as module
from permlab.sparsity.reconstruction_search import reconstruction_search
from permlab.sparsity.retained_search import deal_and_match


def layers(sizes, width, dtype=torch.float64):
    """Weights, inputs with a few common factors, Hessians, and scores as Wanda's."""
    weights, inputs = [], []
    for size in sizes:
        weights.append(torch.randn(size, width).to(dtype))
        factors = torch.randn(3 * width, 3) @ torch.randn(3, width)
        inputs.append(((factors + 0.5 * torch.randn(3 * width, width)) * torch.randn(width).exp()).to(dtype))
    hessians = [x.T @ x for x in inputs]
    scores = [weight.abs() * x.norm(dim=0) for weight, x in zip(weights, inputs, strict=True)]
    return weights, inputs, hessians, scores


def lost(weights, inputs, scores, order, n, m):
    """Squared error of all layers' outputs, from the inputs; the mask by a sort, of equal scores the first kept."""
    total = 0.0
    for weight, x, score in zip(weights, inputs, scores, strict=True):
        removed = torch.zeros(weight.shape, dtype=torch.float64)
        for start in range(0, len(order), m):
            columns = order[start : start + m]
            ranked = columns[score[:, columns].double().argsort(dim=1, descending=True, stable=True)][:, n:]
            removed.scatter_(1, ranked, weight.double().gather(1, ranked))
        total += (removed @ x.double().T).square().sum().item()
    return total


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize(("n", "m", "num_groups"), [(2, 4, 1), (1, 2, 2), (1, 4, 3), (3, 4, 1), (4, 8, 1), (2, 3, 2)])
def test_the_swaps_of_a_naive_search(n, m, num_groups, levels):
    """Every swap tried with the whole error computed from the inputs; `levels` makes many scores equal."""
    width = 6 * m
    weights, inputs, hessians, scores = layers((5, 9), width)
    if levels:
        scores = [(score / score.max() * 4 * levels).clamp(max=levels).round() for score in scores]
    order = torch.cat([torch.randperm(width // num_groups) + g * width // num_groups for g in range(num_groups)])
    found = reconstruction_search(
        weights, hessians, scores, n=n, m=m, num_groups=num_groups, order=order, num_swaps=250, seed=5
    )
    error, num_made = lost(weights, inputs, scores, order, n, m), 0
    generator = np.random.default_rng(5)
    drawn = [module._draw_pairs(width, m, num_groups, count, generator) for count in (64, 64, 64, 58)]
    for i, j in np.concatenate(drawn).tolist():
        trial = swapped(order, i, j)
        if (trial_error := lost(weights, inputs, scores, trial, n, m)) < error * (1 - 1e-11):
            order, error, num_made = trial, trial_error, num_made + 1
    assert num_made >= 3
    assert torch.equal(found, order)
    assert_within_groups(found, num_groups)


def test_proposals_cover_all_swaps_and_no_others():
    pairs = module._draw_pairs(24, 4, 2, 5000, np.random.default_rng(0)).tolist()
    assert {(min(pair), max(pair)) for pair in pairs} == set(swaps(24, 4, 2))
    assert len(module._draw_pairs(8, 4, 2, 10, np.random.default_rng(0))) == 0


def test_starts_from_dealing_and_is_never_worse():
    weights, inputs, hessians, scores = layers((16, 8), 32)
    start = deal_and_match(torch.cat(scores), n=2, m=4)
    assert torch.equal(reconstruction_search(weights, hessians, scores, n=2, m=4, num_swaps=0), start)
    errors = [lost(weights, inputs, scores, start, 2, 4)]
    for num_swaps in (50, 500, 5000):
        order = reconstruction_search(weights, hessians, scores, n=2, m=4, num_swaps=num_swaps)
        errors.append(lost(weights, inputs, scores, order, 2, 4))
    assert errors[0] > errors[1] > errors[2] > errors[3]


def test_shared_and_copied_hessians_give_the_same():
    weights, _, hessians, scores = layers((6, 6), 16)
    settings = {"n": 2, "m": 4, "num_swaps": 200}
    shared = reconstruction_search(weights, [hessians[0]] * 2, scores, **settings)
    copied = reconstruction_search(weights, [hessians[0], hessians[0].clone()], scores, **settings)
    assert torch.equal(shared, copied)
    assert torch.equal(shared, reconstruction_search(weights, [hessians[0]] * 2, scores, **settings))
    other = reconstruction_search(weights, [hessians[0]] * 2, scores, **settings, seed=1)
    assert not torch.equal(shared, other)


@pytest.mark.alone
def test_six_thousand_swaps_in_a_fraction_of_a_second():
    weights, inputs, hessians, scores = layers((128,), 64, torch.float32)
    reconstruction_search(weights, hessians, scores, n=2, m=4, num_swaps=1)
    start = deal_and_match(scores[0], n=2, m=4)
    begin = time.process_time()
    order = reconstruction_search(weights, hessians, scores, n=2, m=4, num_swaps=6000)
    assert time.process_time() - begin < 1
    assert lost(weights, inputs, scores, order, 2, 4) < 0.95 * lost(weights, inputs, scores, start, 2, 4)


@pytest.mark.alone
def test_reconstruction_within_a_budget():
    weights, inputs, hessians, scores = layers((64,), 64)
    start = torch.arange(64)
    reconstruction_search(weights, hessians, scores, n=2, m=4, num_swaps=1)
    begin = time.perf_counter()
    order = reconstruction_search(weights, hessians, scores, n=2, m=4, order=start, num_swaps=5_000_000, budget_s=0.2)
    assert time.perf_counter() - begin < 5
    assert lost(weights, inputs, scores, order, 2, 4) < lost(weights, inputs, scores, start, 2, 4)


# Arguments


def test_bad_layers(unchecked):
    weights, _, hessians, scores = layers((3, 5), 8)
    holed = [weights[0], weights[1].clone()]
    holed[1][0, 0] = float("nan")
    cases = [
        (([], [], []), {}, "at least one"),
        ((weights, hessians[:1], scores), {}, "1 Hessians"),
        ((weights, hessians, scores[::-1]), {}, "layer 0: shapes"),
        ((weights, [hessians[0][:4, :4], hessians[1]], scores), {}, "layer 0: shapes"),
        ((holed, hessians, scores), {}, "layer 1: the weight"),
        ((weights, hessians, [scores[0], -scores[1]]), {}, "neither 0 nor a positive"),
        ((weights, hessians, scores), {"num_swaps": -1}, "num_swaps=-1"),
        ((weights, hessians, scores), {"budget_s": -1.0}, "budget_s=-1.0"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            reconstruction_search(*arguments, n=2, m=4, **settings)
