"""What all searches refuse, said once; that each does refuse it is in the tests of each."""

import pytest
import torch

from permlab.sparsity.search_argument import Clock, check_budget, check_pruning, checked_start


def test_a_pattern_has_to_fit_every_group() -> None:
    check_pruning(torch.ones(2, 16), 2, 4, 2)
    with pytest.raises(ValueError, match="num_groups=3 does not divide 16 channels"):
        check_pruning(torch.ones(2, 16), 2, 4, 3)
    with pytest.raises(ValueError, match="m=8 does not divide"):
        check_pruning(torch.ones(2, 12), 2, 8, 1)
    with pytest.raises(ValueError, match=r"the score at \[0, 1\] is nan"):
        check_pruning(torch.tensor([[1.0, torch.nan]]), 1, 2, 1)


@pytest.mark.parametrize("budget_s", [0.0, -1.0, float("nan")])
def test_a_budget_is_positive(budget_s: float) -> None:
    check_budget(None)
    check_budget(1e-9)
    with pytest.raises(ValueError, match=f"budget_s={budget_s} is not positive"):
        check_budget(budget_s)


def test_a_start_stays_within_its_groups() -> None:
    order = torch.tensor([1, 0, 3, 2])
    assert checked_start(order, 4, 2).tolist() == order.tolist()
    with pytest.raises(ValueError, match="takes channel 3 to slot 1, across 2 groups"):
        checked_start(torch.tensor([0, 3, 2, 1]), 4, 2)
    with pytest.raises(ValueError, match=r"shape \(4,\) does not fit 8 channels"):
        checked_start(order, 8, 2)


def test_a_clock_without_a_budget_is_never_over() -> None:
    assert not Clock(None).is_over()
    assert not Clock(1e6).is_over()
    clock = Clock(1e-9)
    while clock.elapsed_s() == 0:
        pass
    assert clock.is_over()
