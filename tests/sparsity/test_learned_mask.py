"""Masks as draws of patterns: the law against its frequencies, the prior, gradients, and what is n:m."""

import itertools

import pytest
import torch

from permlab.ops.nm import nm_mask
from permlab.sparsity.learned_mask import LOGIT_SPREAD, best_mask, num_patterns, patterns, prior_logits, soft_mask

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_patterns_are_all_choices_of_n_of_m(n: int, m: int) -> None:
    found = {tuple(row.nonzero().flatten().tolist()) for row in patterns(n, m)}
    assert found == set(itertools.combinations(range(m), n))
    assert num_patterns(n, m) == len(found) == len(patterns(n, m))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_the_prior_is_the_likeliest_mask_at_the_start(n: int, m: int, strength: float) -> None:
    keep = nm_mask(torch.rand(5, 3 * m), n=n, m=m).mT
    assert torch.equal(best_mask(prior_logits(keep, n=n, m=m, strength=strength), n=n, m=m), keep)


def test_the_prior_counts_what_a_pattern_shares_with_the_mask() -> None:
    keep = torch.tensor([[True], [True], [False], [False]])
    logits = prior_logits(keep, n=2, m=4, strength=3.0)[0, :, 0]
    shared = [2, 1, 1, 1, 1, 0]  # of 12, 13, 14, 23, 24, 34 with 12
    assert logits.tolist() == pytest.approx([3 * LOGIT_SPREAD * (count - 1) for count in shared])
    assert prior_logits(keep, n=2, m=4, strength=0.0).abs().max() == 0


def test_cold_draws_follow_the_law_of_the_scaled_logits() -> None:
    """Frequencies of whole patterns against the softmax, chi-square with 5 degrees of freedom."""
    logits, scale, count = torch.tensor([0.3, 0.0, -0.2, 0.1, 0.25, -0.4]), 5.0, 20000
    generator = torch.Generator().manual_seed(1)
    many = logits.view(1, 6, 1).expand(1, 6, count)
    mask, weights = soft_mask(many, n=2, m=4, scale=scale, temperature=1e-3, generator=generator)
    counts = weights.round()[0].sum(-1)
    expected = (scale * logits).softmax(0) * count
    assert ((counts - expected).square() / expected).sum() < 20.5  # exceeded by one in a thousand
    assert torch.equal(mask.round(), patterns(2, 4).mT @ weights[0].round())


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_a_soft_mask_has_n_in_every_group_and_warms_to_the_mean(n: int, m: int) -> None:
    logits = 0.1 * torch.randn(3, num_patterns(n, m), 2)
    generator = torch.Generator().manual_seed(0)
    mask, _ = soft_mask(logits, n=n, m=m, scale=100.0, temperature=0.7, generator=generator)
    assert torch.allclose(mask.unflatten(0, (-1, m)).sum(1), torch.full((3, 2), float(n)))
    hot, _ = soft_mask(logits, n=n, m=m, scale=1.0, temperature=1e6, generator=generator)
    assert torch.allclose(hot, torch.full_like(hot, n / m), atol=1e-4)
    cold, _ = soft_mask(logits, n=n, m=m, scale=1.0, temperature=1e-5, generator=None)
    assert torch.equal(cold.round().bool(), best_mask(logits, n=n, m=m))


def test_the_same_generator_gives_the_same_draw_and_the_gradient_is_right() -> None:
    logits = (0.1 * torch.randn(1, 6, 2)).double().requires_grad_()

    def draw(values: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return soft_mask(values, n=2, m=4, scale=7.0, temperature=0.5, generator=generator)[0]

    assert torch.equal(draw(logits), draw(logits))
    assert torch.autograd.gradcheck(draw, (logits,))
