"""N:M masks against a Python sort of every group, and against every other choice of n of m."""

from itertools import combinations

import pytest
import torch

from permlab.ops.nm import nm_mask

INF = float("inf")
PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 8), (8, 16), (7, 12), (32, 64), (30, 65), (64, 128), (200, 300)]


def by_sorting(scores, n, m):
    """Highest first, and of equal ones the one that comes first."""
    rows = scores.double().reshape(-1, scores.shape[-1]).tolist()
    mask = []
    for row in rows:
        kept = set()
        for start in range(0, len(row), m):
            kept.update(sorted(range(start, start + m), key=lambda j, row=row: (-row[j], j))[:n])
        mask.append([j in kept for j in range(len(row))])
    return torch.tensor(mask).reshape(scores.shape)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_distinct_scores(batch, n, m):
    scores = torch.randn(*batch, 3 * m, dtype=torch.float64)
    assert torch.equal(nm_mask(scores, n=n, m=m), by_sorting(scores, n, m))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_ties_keep_the_lowest_index(n, m):
    scores = torch.randint(-1, 2, (5, 4 * m)).float()
    scores[scores == 0] *= -1  # a negative zero ties with a positive one
    scores[0, ::3] = 0.0
    assert torch.equal(nm_mask(scores, n=n, m=m), by_sorting(scores, n, m))
    equal = nm_mask(torch.zeros(2 * m), n=n, m=m)
    assert torch.equal(equal, torch.arange(2 * m) % m < n)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 6)])
def test_no_other_choice_keeps_more(n, m):
    scores = torch.rand(20, m)
    kept = (scores * nm_mask(scores, n=n, m=m)).sum(-1)
    choices = torch.stack([scores[:, list(choice)].sum(-1) for choice in combinations(range(m), n)])
    torch.testing.assert_close(kept, choices.amax(0))


@pytest.mark.parametrize("m", [4, 96])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_floating_dtype(dtype, m):
    scores = torch.randn(4, 2 * m).to(dtype)
    mask = nm_mask(scores, n=2, m=m)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, by_sorting(scores, 2, m))


def test_infinite_scores_are_ordered():
    scores = torch.tensor([-INF, -1.0, INF, 0.0, -INF, -INF, -INF, -INF])
    assert nm_mask(scores, n=2, m=4).tolist() == [False, False, True, True, True, True, False, False]


@pytest.mark.parametrize("m", [4, 100])
def test_more_scores_than_are_handled_at_once(m):
    """Three times the chunk and a bit, with a last chunk that is not full."""
    num_groups = 3 * 2**18 // m + 5
    scores = torch.rand(num_groups, m)
    mask = nm_mask(scores.flatten(), n=2, m=m).view(num_groups, m)
    assert torch.equal(mask.sum(-1), torch.full((num_groups,), 2))
    lowest_kept = scores.masked_fill(~mask, INF).amin(-1)
    highest_dropped = scores.masked_fill(mask, -INF).amax(-1)
    assert (lowest_kept >= highest_dropped).all()


def test_layout_in_memory_does_not_matter():
    scores = torch.randn(12, 8).mT
    strided = torch.randn(8, 24)[:, ::2]
    for view in (scores, strided, torch.randn(1, 12).expand(8, 12)):
        assert torch.equal(nm_mask(view, n=2, m=4), by_sorting(view, 2, 4))


def test_input_is_left_alone_and_no_gradient_flows():
    scores = torch.randn(2, 8, requires_grad=True)
    before = scores.detach().clone()
    mask = nm_mask(scores, n=2, m=4)
    assert not mask.requires_grad
    assert torch.equal(scores.detach(), before)


def test_an_empty_batch_gives_an_empty_mask():
    assert nm_mask(torch.zeros(0, 8), n=2, m=4).shape == (0, 8)


@pytest.mark.parametrize(
    ("width", "n", "m", "message"),
    [
        (8, 4, 4, "n=4 of every m=4"),
        (8, 0, 4, "n=0 of every m=4"),
        (8, 5, 4, "n=5 of every m=4"),
        (8, -1, 0, "n=-1 of every m=0"),
        (18, 2, 4, r"m=4 does not divide the width 18; nearest that do: 3, 6"),
        (10, 2, 4, r"m=4 does not divide the width 10; nearest that do: 5"),
        (12, 2, 16, r"m=16 does not divide the width 12; nearest that do: 12"),
        (2, 2, 4, r"m=4 does not divide the width 2; none above n=2 does"),
        (0, 2, 4, r"m=4 does not divide the width 0"),
    ],
)
def test_bad_patterns(width, n, m, message):
    with pytest.raises(ValueError, match=message):
        nm_mask(torch.zeros(3, width), n=n, m=m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_nan_is_named(dtype):
    scores = torch.full((2, 3, 8), INF)
    scores[1, 2, 5] = float("nan")
    with pytest.raises(ValueError, match=r"score at \[1, 2, 5\] is NaN"):
        nm_mask(scores.to(dtype), n=2, m=4)


def test_bad_scores(unchecked):
    for scores, message in [(torch.zeros(8, dtype=torch.int64), "int64"), (torch.tensor(1.0), "at least one axis")]:
        with pytest.raises(ValueError, match=message):
            nm_mask(scores, n=2, m=4)
