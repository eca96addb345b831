import pytest
import torch

from permlab.method.scorer import Scorer
from permlab.method.sort import Sort
from permlab.ops.distance import kendall
from permlab.permutation import PermutationSample, Site, permute

ORDER = torch.tensor([4, 0, 3, 1, 2])


def site_of(num_features=3):
    return Site(name="patches", order=ORDER, num_features=num_features)


def sort_of(scorer, site=None):
    return Sort(
        site or site_of(),
        temperature=0.3,
        lr=0.01,
        warmup_fraction=0.0,
        freeze_fraction=0.0,
        estimator="straight_through",
        surrogate="softmax",
        power=2.0,
        scorer=scorer,
        width=8,
    )


@pytest.mark.parametrize("kind", ["vector", "linear", "mlp"])
def test_starts_exactly_at_the_starting_order(kind):
    scores = Scorer(site_of(), kind=kind, width=8)(torch.randn(7, 5, 3))
    assert torch.equal(scores.argsort(-1, descending=True), ORDER.expand(*scores.shape[:-1], 5))
    assert scores[..., ORDER[0]].eq(1).all()
    assert scores[..., ORDER[-1]].eq(-1).all()


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
def test_the_order_can_follow_the_image(scorer):
    """A few steps towards falling first features bring every image's items nearer to that order."""
    method = sort_of(scorer)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.1)
    weight = torch.linspace(1, -1, 5).unsqueeze(-1)
    for _ in range(60):
        items = torch.randn(32, 5, 3)
        loss = -(weight * permute(items, method(items))[..., :1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    items = torch.randn(200, 5, 3)
    order = method.eval()(items).order
    assert order.shape == (200, 5)
    wanted = items[..., 0].argsort(-1, descending=True)
    assert kendall(ORDER, wanted).mean() < 0.1
    assert kendall(order, wanted).mean() > 0.5
    assert method.needs_items
    assert method.entropy(items) > 0


def test_a_batch_of_orders_is_one_order_for_each_image():
    method = sort_of("linear")
    torch.nn.init.normal_(method.scorer.network[0].weight)
    items = torch.randn(2, 3, 5, 3)
    together: PermutationSample = method(items)
    for i in range(2):
        for j in range(3):
            alone = method(items[i, j])
            assert torch.equal(together.order[i, j], alone.order)
            torch.testing.assert_close(together.soft[i, j], alone.soft)


def test_low_precision_items_are_scored_in_full_precision():
    method = sort_of("mlp")
    assert method(torch.randn(2, 5, 3).bfloat16()).soft.dtype == torch.float32


def test_what_the_scorer_cannot_do_is_refused():
    with pytest.raises(ValueError, match="scorer=linear reads item features, but site patches"):
        sort_of("linear", site_of(num_features=None))
    method = sort_of("mlp")
    with pytest.raises(ValueError, match="needs items of 3 features, got None"):
        method.best()
    with pytest.raises(ValueError, match="needs items of 3 features, got 4"):
        method(torch.randn(2, 5, 4))
