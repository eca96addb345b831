"""Putting images together: pieces, loss and scores by hand, and a short training."""

import numpy as np
import pytest
import torch
from runs import assemble, configure, train
from scipy.stats import kendalltau

from permlab.config.compose import resolve_train
from permlab.errors import ConfigError
from permlab.permutation import gather_items, invert
from permlab.task.jigsaw.learner import (
    JigsawLearner,
    JigsawScores,
    cut,
    rank_correlation,
    same_pieces,
    true_places,
)

WORDS = ("task=jigsaw",)


def learner_of(*words: str) -> JigsawLearner:
    return assemble(configure([*WORDS, *words])).learner


@pytest.mark.parametrize(("height", "width", "sides"), [(8, 8, 2), (8, 8, 3), (6, 4, 2), (7, 5, 4)])
def test_pieces_are_those_of_a_loop_over_the_padded_image(height: int, width: int, sides: int) -> None:
    images = torch.rand(2, 3, height, width)
    tall, broad = (-(-side // sides) for side in (height, width))
    rows, columns = (np.minimum(np.arange(sides * size), side - 1) for size, side in ((tall, height), (broad, width)))
    padded = images.numpy()[:, :, rows][:, :, :, columns]
    pieces = cut(images, sides)
    assert pieces.shape == (2, sides**2, 3, tall, broad)
    for row in range(sides):
        for column in range(sides):
            expected = padded[:, :, row * tall : (row + 1) * tall, column * broad : (column + 1) * broad]
            np.testing.assert_array_equal(pieces[:, row * sides + column], expected)


def test_a_shuffle_is_undone_by_its_inverse() -> None:
    learner = learner_of()
    whole = cut(torch.rand(6, 1, 8, 8), 4)
    pieces, order = learner._shuffled(whole, torch.Generator().manual_seed(1))
    assert not torch.equal(pieces, whole)
    torch.testing.assert_close(gather_items(pieces.flatten(2), invert(order)), whole.flatten(2))
    belongs = same_pieces(whole.flatten(2), pieces.flatten(2), invert(order))
    torch.testing.assert_close(belongs.float().argmax(-1), invert(order))
    assert (belongs.sum(-1) == 1).all()


def test_equal_pieces_may_stand_for_each_other() -> None:
    wanted = torch.tensor([[[0.0], [5.0], [0.0], [7.0]]])
    assert true_places(wanted[:, [2, 1, 0, 3]], wanted).tolist() == [[0, 1, 2, 3]]
    assert true_places(wanted[:, [3, 1, 2, 0]], wanted).tolist() == [[3, 1, 2, 0]]
    scores = JigsawScores()
    scores.update(wanted, wanted)
    # Two of the four are equal: a slot of theirs holds one of them in half of all orders, another its own in a quarter.
    assert float(scores.compute()["placed_chance"]) == pytest.approx((2 * 2 / 4 + 2 * 1 / 4) / 4)
    belongs = same_pieces(wanted, wanted[:, [3, 2, 1, 0]], torch.tensor([[3, 2, 1, 0]]))
    assert belongs.int().tolist() == [[[0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0]]]


def test_scores_are_those_of_scipy_and_of_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(5, 9, 4, generator=generator)
    orders = torch.rand(5, 9, generator=generator).argsort(-1)
    orders[0] = torch.arange(9)
    placed = gather_items(wanted, orders)
    torch.testing.assert_close(true_places(placed, wanted), orders)
    expected = [kendalltau(range(9), order).statistic for order in orders.tolist()]
    assert rank_correlation(orders).tolist() == pytest.approx(expected, abs=1e-6)
    scores = JigsawScores()
    scores.update(placed, wanted)
    found = {name: float(value) for name, value in scores.compute().items()}
    assert found["placed"] == pytest.approx((orders == torch.arange(9)).double().mean().item())
    assert found["solved"] == pytest.approx(1 / 5)
    assert found["kendall"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert found["placed_chance"] == pytest.approx(1 / 9)
    assert found["error"] == pytest.approx(((placed - wanted) ** 2).mean().item())


@pytest.mark.parametrize("method", ["sinkhorn", "neural_sort"])
def test_the_answer_cannot_be_read_off_where_a_piece_comes(method: str) -> None:
    """The same pieces are put together alike, however they are shuffled."""
    learner = learner_of(f"method={method}").eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learner.method.parameters():
            parameter += torch.randn_like(parameter)
        images = torch.rand(8, 1, 8, 8)
        first = learner.predict(images)
        learner.seed = 5
        torch.testing.assert_close(learner.predict(images), first)


def test_the_gradient_reaches_all_that_learns() -> None:
    learner = learner_of("task.order_weight=0.5").train()
    whole = cut(torch.rand(16, 1, 8, 8), 2)
    sample = learner.method(learner._features(whole), generator=torch.Generator().manual_seed(0))
    (sample.soft @ whole.flatten(2) - whole.flatten(2)).square().mean().backward()
    learned = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    assert [name for name, parameter in learned if parameter.grad is None] == []
    assert not any(name.startswith("model.head") for name, _ in learned)


def test_a_few_steps_place_more_pieces_than_chance(tmp_path) -> None:
    result = train(tmp_path, *WORDS, "data.batch_size=128", "optim.lr=0.01", "method.lr=0.03", steps=60)
    assert result.code == 0, result.err
    assert "putting together 2x2 pieces" in result.out
    assert result.summary["test/placed_chance"] == pytest.approx(0.25, abs=0.01)
    assert result.summary["test/placed"] > 0.4
    assert result.summary["test/kendall"] > 0.2  # 0 by chance


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=fixed"], "method=fixed: task=jigsaw needs a relaxed order of every sample"),
        (["method.cost=table"], "method.cost=table: has one order for all samples of task=jigsaw"),
        (["task.num_sides=9"], "task.num_sides=9: the images have 8 pixels"),
        (["task.error_weight=0"], "task.error_weight=0: there is no loss; needs task.order_weight above 0"),
    ],
)
def test_what_cannot_put_together_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_train([*WORDS, *words])
