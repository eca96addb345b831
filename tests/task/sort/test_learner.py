"""Sorting numbers that are shown as images: samples, loss and scores by hand, and a short training."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from runs import assemble, configure, train

from permlab.config.compose import resolve_train
from permlab.errors import ConfigError
from permlab.ops.sorting import neural_sort
from permlab.permutation import order_to_matrix
from permlab.task.sort.learner import SortLearner, SortScores, chance_in_order, order_loss

WORDS = ("task=sort", "task.num_numbers=3")


def learner_of(*words: str) -> SortLearner:
    return assemble(configure([*WORDS, *words])).learner


def test_a_batch_is_cut_into_numbers_digit_by_digit() -> None:
    learner = learner_of("task.num_digits=2")
    labels = torch.tensor([1, 2, 0, 7, 9, 9, 4, 0, 0, 0, 3, 1, 5, 5])  # two samples, and two images that are left
    assert learner.numbers(labels).tolist() == [[12, 7, 99], [40, 0, 31]]
    images = torch.rand(14, 1, 8, 8)
    with torch.no_grad():
        items = learner.items(images)
        alone = learner.model.encode(learner.model.embed(images[8:10]))
    assert items.shape == (2, 3, 64)
    torch.testing.assert_close(items[1, 1], alone.flatten())


def test_without_equal_numbers_the_loss_is_the_published_cross_entropy() -> None:
    generator = np.random.default_rng(0)
    scores = torch.from_numpy(generator.normal(size=(5, 4)))
    numbers = torch.from_numpy(np.stack([generator.permutation(9)[:4] for _ in range(5)]))
    soft = neural_sort(scores, temperature=1.0)
    true = order_to_matrix(numbers.argsort(-1, descending=True), dtype=torch.float64)
    expected = -(true * soft.log()).sum((-2, -1)).mean() / 4
    torch.testing.assert_close(order_loss(soft, numbers), expected)


def test_any_order_of_equal_numbers_is_right() -> None:
    numbers = torch.tensor([[5, 7, 5]])
    for order in ([1, 0, 2], [1, 2, 0]):
        assert order_loss(order_to_matrix(torch.tensor([order])), numbers) == pytest.approx(0, abs=1e-6)
    tied = torch.tensor([[[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.5, 0.0, 0.5]]])
    assert order_loss(tied, numbers) == pytest.approx(0, abs=1e-6)
    wrong = order_to_matrix(torch.tensor([[0, 1, 2]]))
    assert order_loss(wrong, numbers) == pytest.approx(-2 / 3 * math.log(1e-20))


def test_scores_count_samples_and_slots() -> None:
    scores = SortScores()
    scores.update(torch.tensor([[9, 4, 4], [9, 1, 4]]), torch.tensor([[4, 9, 4], [1, 4, 9]]))
    scores.update(torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3, dtype=torch.int64))
    found = {name: float(value) for name, value in scores.compute().items()}
    assert found == pytest.approx({"exact": 1 / 2, "elementwise": 4 / 6, "exact_chance": (1 / 3 + 1 / 6) / 2})


@pytest.mark.parametrize("numbers", [[3, 1, 2, 9], [3, 3, 2, 9], [3, 3, 9, 9], [5, 5, 1, 5], [4, 4, 4, 4]])
def test_chance_is_the_share_of_all_orders_that_sort(numbers: list[int]) -> None:
    orders = list(itertools.permutations(numbers))
    expected = sum(list(order) == sorted(numbers) for order in orders) / len(orders)
    assert chance_in_order(torch.tensor([numbers])).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("method", ["neural_sort", "sort_ste", "sinkhorn"])
def test_where_a_number_comes_makes_no_difference(method: str) -> None:
    """To the order that is found; a score that fell along the sample would tell the slots without looking."""
    learner = learner_of(f"method={method}").eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learner.method.parameters():
            parameter += torch.randn_like(parameter)
        items = torch.randn(20, 3, 32)
        moved = torch.tensor([2, 0, 1])
        one, other = learner.method.best(items), learner.method.best(items[:, moved])
    torch.testing.assert_close(moved[other], one)


def test_the_gradient_reaches_all_that_learns() -> None:
    parts: Any = assemble(configure([*WORDS, "task.num_digits=2"]))
    learner = parts.learner
    labels = torch.arange(24) % 10
    sample = learner.method.train()(learner.items(torch.rand(24, 1, 8, 8)))
    order_loss(sample.soft, learner.numbers(labels)).backward()
    learned = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    assert learned
    assert [name for name, parameter in learned if parameter.grad is None or not parameter.grad.any()] == []
    assert not any(name.startswith("model.head") for name, _ in learned)


def test_a_few_steps_sort_better_than_chance(tmp_path) -> None:
    result = train(tmp_path, *WORDS, "data.batch_size=128", "optim.lr=0.01", steps=60)
    assert result.code == 0, result.err
    assert "sorting 3 numbers of 1 digit" in result.out
    assert result.summary["test/exact_chance"] == pytest.approx(0.22, abs=0.02)  # 0.72 / 6 + 0.27 / 3 + 0.01
    assert result.summary["test/exact"] > 0.4
    assert "a random order" in result.out
    assert result.summary["test/elementwise"] > result.summary["test/exact"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=fixed"], "method=fixed: task=sort needs a relaxed order of every sample"),
        (["method=reorder"], "method=reorder: task=sort needs a relaxed order"),
        (["method.scorer=vector", "method.start=order"], "method.scorer=vector: has one order for all samples"),
        (["method=sort_ste", "method.surrogate=product"], "method.surrogate=product: is no relaxation"),
        (
            ["method=neural_sort", "method.order=compressible"],
            "method.order=compressible: task=sort orders whole images",
        ),
        (["method.freeze_fraction=0.3"], "method.freeze_fraction=0.3: nothing of task=sort learns"),
        (["data.batch_size=2"], "data.batch_size=2: a sample of task=sort has 3 x 1 images"),
    ],
)
def test_what_cannot_sort_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_train([*WORDS, *words])


def test_a_start_that_ties_all_items_for_good_is_refused() -> None:
    with pytest.raises(ConfigError, match="start=zero: scorer=vector would tie all items"):
        assemble(configure(["task=classify", "method=neural_sort", "method.start=zero"]))
