import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from permlab.method.base import Method, falling_scores
from permlab.permutation import PermutationSample, Site


class Chosen(Method):
    """Evaluates to a chosen order and shows a chosen soft matrix; draws the reverse of the order."""

    def __init__(self, site, order, soft=None, **options):
        super().__init__(site, **options)
        self.order, self.soft = torch.tensor(order), soft

    def sample(self, items, generator):
        return PermutationSample(order=self.order.flip(-1), soft=None, log_prob=None, estimator="none")

    def best(self, items=None):
        return self.order

    def soft_matrix(self, items=None):
        return self.soft


def site_of(order, num_groups=1):
    return Site(name="site", order=torch.tensor(order), num_groups=num_groups)


def test_phases_and_temperature_follow_the_step():
    schedule = {"kind": "linear", "start": 1.0, "end": 0.2}
    method = Chosen(site_of([0, 1]), [1, 0], temperature=schedule, warmup_fraction=0.2, freeze_fraction=0.3)
    seen = []
    for step in range(10):
        method.advance(step, 10)
        seen.append((method.phase, round(method.temperature, 6)))
    active = [("active", temperature) for temperature in (1.0, 0.8, 0.6, 0.4, 0.2)]
    assert seen == [("warmup", 1.0)] * 2 + active + [("frozen", 0.2)] * 3


def test_a_single_active_step_and_none():
    method = Chosen(site_of([0, 1]), [1, 0], temperature={"start": 1.0, "end": 0.5})
    method.advance(0, 1)
    assert (method.phase, method.temperature) == ("active", 1.0)
    frozen = Chosen(site_of([0, 1]), [1, 0], freeze_fraction=1.0)
    frozen.advance(0, 3)
    assert frozen.phase == "frozen"


def test_each_phase_returns_its_order():
    method = Chosen(site_of([0, 1, 2]), [1, 2, 0])
    orders = []
    for phase in ("warmup", "active", "frozen"):
        method.phase = phase
        orders.append(method().order.tolist())
    assert orders == [[0, 1, 2], [0, 2, 1], [1, 2, 0]]
    method.phase = "warmup"
    assert method.eval()().order.tolist() == [1, 2, 0]


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"0\.6 \+ freeze_fraction 0\.5"):
        Chosen(site_of([0, 1]), [0, 1], warmup_fraction=0.6, freeze_fraction=0.5)
    method = Chosen(site_of([0, 1]), [0, 1])
    with pytest.raises(ValueError, match="step 0 of 0"):
        method.advance(0, 0)
    with pytest.raises(ValueError, match="step -1 of 5"):
        method.advance(-1, 5)


def test_entropy_is_zero_for_one_order_and_one_for_the_uniform_matrix():
    for num_groups in (1, 2):
        size = 4 // num_groups
        uniform = torch.block_diag(*[torch.full((size, size), 1 / size)] * num_groups)
        for soft, expected in ((torch.eye(4), 0.0), (uniform, 1.0)):
            method = Chosen(site_of([0, 1, 2, 3], num_groups), [0, 1, 2, 3], soft)
            assert method.entropy().item() == pytest.approx(expected)
    mixed = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    expected = 2 / 3 * np.log(2) / np.log(3)
    assert Chosen(site_of([0, 1, 2]), [0, 1, 2], mixed).entropy().item() == pytest.approx(expected)


def test_statistics_compare_with_the_start():
    start, order = [3, 1, 4, 0, 2], [1, 3, 4, 2, 0]
    statistics = Chosen(site_of(start), order).statistics()
    ranks = np.argsort(start), np.argsort(order)
    assert statistics["kendall"].item() == pytest.approx(kendalltau(*ranks).statistic)
    assert statistics["displacement"].item() == pytest.approx(np.abs(ranks[0] - ranks[1]).mean())


def test_groups_come_apart_and_together():
    method = Chosen(site_of([2, 0, 1, 4, 5, 3], 2), [2, 0, 1, 4, 5, 3])
    blocks = method.split_order(method.order)
    assert blocks.tolist() == [[2, 0, 1], [1, 2, 0]]
    assert torch.equal(method.merge_orders(blocks), method.order)
    matrices = torch.randn(5, 2, 3, 3)
    merged = method.merge_matrices(matrices)
    assert torch.equal(merged, torch.stack([torch.block_diag(*pair) for pair in matrices]))
    single = Chosen(site_of([0, 1, 2]), [0, 1, 2])
    assert torch.equal(single.merge_matrices(matrices[:, :1]), matrices[:, 0])


@pytest.mark.parametrize("num_groups", [1, 2])
def test_sorting_by_score_keeps_the_start_on_ties(num_groups):
    start = [2, 0, 1, 4, 5, 3]
    method = Chosen(site_of(start, num_groups), start)
    assert method.sort_by_score(torch.zeros(6)).tolist() == start
    scores = torch.randint(0, 3, (50, 6)).float()
    rank = np.argsort(start)
    group = np.arange(6) // (6 // num_groups)
    expected = [np.lexsort((rank, -row, group)) for row in scores.numpy()]
    assert method.sort_by_score(scores).tolist() == np.stack(expected).tolist()


def test_falling_scores_run_along_the_order_of_each_group():
    scores = falling_scores(site_of([2, 0, 1, 4, 5, 3], 2), 0.0, -1.0)
    assert scores[[2, 0, 1]].tolist() == [0.0, -0.5, -1.0]
    assert scores[[4, 5, 3]].tolist() == [0.0, -0.5, -1.0]
    for order in (torch.randperm(8192), torch.tensor([0])):
        site = Site(name="site", order=order)
        assert torch.equal(falling_scores(site, 1.0, -1.0).argsort(descending=True), order)
