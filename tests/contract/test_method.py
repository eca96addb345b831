"""What every method promises, checked for every preset found in conf/method.

A new method is one file and one YAML: nothing here names a method. What a preset can do (has it
parameters, a soft matrix, a log-probability, is its sample left to chance) is read from it.
"""

import contextlib
import functools
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from presets import without_preset
from scipy.stats import chi2_contingency, chisquare
from torch.func import functional_call

from permlab.config.build import build
from permlab.config.schema import component_options
from permlab.errors import ConfigError
from permlab.method.base import Method
from permlab.method.training_items import TrainingItems
from permlab.ops.ridge_search import ridge_loss
from permlab.option import choices, matches
from permlab.permutation import PermutationSample, Site, invert, order_to_matrix, permute
from permlab.sparsity.search_inputs import SearchInputs

CONF = Path(__file__).resolve().parents[2] / "conf"
PRESETS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
NUM_FEATURES = 4
# None of the first three is its own inverse, so an inverted start cannot pass for the right one.
STARTS = {
    "shifted": [1, 2, 3, 4, 5, 0],
    "mixed": [4, 0, 3, 1, 5, 2],
    "two_groups": [1, 2, 0, 5, 3, 4],
    "reversed": [5, 4, 3, 2, 1, 0],
    "kept": [0, 1, 2, 3, 4, 5],
}


# Building


@functools.cache
def _composed(preset: str) -> str:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_yaml(compose(overrides=[f"+method={preset}"]).method, resolve=True)


def settings_of(preset: str) -> dict[str, Any]:
    """The preset as plain values, its parents merged in."""
    settings = OmegaConf.to_container(OmegaConf.create(_composed(preset)))
    return {"name": preset, "component": preset} | settings


def make(preset: str, order: int | list[int], *, num_groups: int = 1, **changes: Any) -> Method:
    """The preset at a site of this order (or of so many items in a fixed mixed order), options changed.

    Its temperature is that of the middle of the schedule, which may start and end cold.
    """
    if isinstance(order, int):
        order = torch.randperm(order, generator=torch.Generator().manual_seed(order)).tolist()
    site = Site(name="site", order=torch.tensor(order), num_groups=num_groups, num_features=NUM_FEATURES)
    torch.manual_seed(0)
    method = build("method", settings_of(preset) | changes, site)
    method.temperature = method.schedule.at(0.5)
    return method


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def items_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, NUM_FEATURES, generator=seeded(seed))


def disturb(method: Method, scale: float, seed: int = 0) -> Method:
    """Move every parameter, as training would."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return method


def counts(preset: str, **wanted: int) -> dict[str, int]:
    """Those of the wanted counts (`num_iters`, `num_samples`) that the preset has as an option."""
    return {key: value for key, value in wanted.items() if key in settings_of(preset)}


def same(a: PermutationSample, b: PermutationSample) -> bool:
    return all(
        (x is None and y is None) or torch.equal(x, y)
        for x, y in ((a.order, b.order), (a.soft, b.soft), (a.log_prob, b.log_prob))
    )


def loss_of(method: Method, items: torch.Tensor, sample: PermutationSample) -> torch.Tensor:
    """A loss that depends on which item is in which slot, with the policy term where there is one."""
    y = permute(items, sample)
    weight = torch.linspace(-1, 1, y.shape[-2], dtype=y.dtype).cos().cumsum(0).unsqueeze(-1)
    per_image = (weight * y).tanh().sum((-2, -1))
    loss = per_image.mean()
    if sample.log_prob is not None:
        loss = loss - (method.advantage(-per_image.detach()) * sample.log_prob).mean()
    return loss


def step(method: Method, loss: torch.Tensor, size: float) -> tuple[torch.Tensor, ...]:
    """One step down the gradient, which is returned."""
    gradients = torch.autograd.grad(loss, list(method.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(method.parameters(), gradients, strict=True):
            parameter -= size * gradient
    return gradients


# What the presets can do


def _first_sample(preset: str, seed: int = 0) -> PermutationSample:
    return make(preset, 6)(items_of(6), generator=seeded(seed))


def those(question: Callable[[str], bool]) -> list[str]:
    """Presets of which it is true; of one that cannot be asked `test_it_can_be_built_and_drawn_from` says why."""
    found = []
    for preset in PRESETS:
        with contextlib.suppress(Exception):
            found += [preset] if question(preset) else []
    return found


LEARNED = those(lambda preset: bool(list(make(preset, 6).parameters())))
RELAXED = those(lambda preset: _first_sample(preset).soft is not None)
LAWS = those(lambda preset: _first_sample(preset).log_prob is not None)
CHANCE = those(lambda preset: any(not same(_first_sample(preset), _first_sample(preset, seed)) for seed in range(9)))
PICTURED = those(lambda preset: make(preset, 6).soft_matrix(items_of(6)) is not None)
# A surrogate may have the hard matrix's values and only a gradient of its own; finite differences cannot see that.
CONSTANT = those(
    lambda preset: torch.equal(_first_sample(preset).soft, order_to_matrix(_first_sample(preset).order))
)  # fmt: skip


# Files


def test_every_method_has_a_preset():
    assert without_preset("method", lambda cls: isinstance(cls, type) and issubclass(cls, Method)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_it_can_be_built_and_drawn_from(preset):
    sample = make(preset, 6).train()(items_of(2, 6), generator=seeded(0))
    assert isinstance(sample, PermutationSample), "sample() must return a PermutationSample, of permlab.permutation"
    needed = {"relaxed": "soft", "straight_through": "soft", "score_function": "log_prob", "none": "order"}
    assert sample.estimator in needed, f"estimator must be one of {', '.join(needed)}, not {sample.estimator!r}"
    name = needed[sample.estimator]
    assert getattr(sample, name) is not None, f"a {sample.estimator} sample must have {name}, through which it learns"


# A true permutation, exactly at the start


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("num_items", [1, 2, 3, 17])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_order_is_a_permutation(preset, num_items, batch):
    method = disturb(make(preset, num_items), 0.5)
    items = items_of(*batch, num_items)
    for training in (True, False):
        sample = method.train(training)(items, generator=seeded(1))
        source = "the order of sample()" if training else "best()"
        assert sample.order.dtype == torch.int64, f"{source} must be int64, not {sample.order.dtype}"
        is_permutation = torch.equal(sample.order.sort(-1).values, torch.arange(num_items).expand_as(sample.order))
        assert is_permutation, f"{source} must have each of {num_items} items once: {sample.order.tolist()}"
        shape = torch.broadcast_shapes(sample.order.shape[:-1], batch)
        assert permute(items, sample).shape == (*shape, num_items, NUM_FEATURES), "permute() must keep the items' shape"
        if sample.log_prob is not None:
            assert sample.log_prob.shape == sample.order.shape[:-1], "log_prob must have one number for each order"
        if sample.soft is not None:
            shape = (*sample.order.shape, num_items)
            assert sample.soft.shape == shape, "soft must be [*b, n, n] for an order [*b, n], row = slot"


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_starting_order_is_reproduced_exactly(preset, start):
    order = torch.tensor(STARTS[start])
    num_groups = 2 if start == "two_groups" else 1
    method = make(preset, STARTS[start], num_groups=num_groups)
    items = items_of(2, 6)
    found = method.best(items)
    starts = torch.equal(found.expand(2, 6), order.expand(2, 6))
    is_rank = torch.equal(found.expand(2, 6), invert(order).expand(2, 6))
    assert starts, f"best() must return site.order before training, which is {STARTS[start]}, not {found.tolist()}" + (
        ": that is its rank; an order holds gather indices, y[i] = x[order[i]]" if is_rank else ""
    )
    scores = method.scores(items)
    if scores is not None and scores.shape == (num_groups, 6 // num_groups, 6 // num_groups):
        starts = torch.equal(method.merge_orders(scores.argmax(-1)), order)
        assert starts, "scores() [slot, item] must be largest at site.order before training"
    elif scores is not None:
        falling = method.merge_orders(method.split_scores(scores).argsort(-1, descending=True))
        starts = torch.equal(falling.expand(2, 6), order.expand(2, 6))
        assert starts, (
            "scores() must fall along site.order before training: falling_scores() of method/base.py gives such"
        )
    statistics = method.statistics(items)
    assert statistics["kendall"] == 1, "statistics() must say that nothing has moved before training"
    assert statistics["displacement"] == 0, "statistics() must say that nothing has moved before training"


@pytest.mark.parametrize("preset", PRESETS)
def test_groups_are_never_left(preset):
    method = disturb(make(preset, [2, 0, 1, 4, 5, 3, 7, 8, 6], num_groups=3), 2.0)
    items = items_of(9)
    group = torch.arange(9) // 3
    for seed in range(5):
        sample = method(items, generator=seeded(seed))
        stays = torch.equal(sample.order // 3, group.expand_as(sample.order))
        assert stays, f"sample() must leave items in their group (site.num_groups; merge_orders): {sample.order}"
        if sample.soft is not None:
            outside = sample.soft[..., group[:, None] != group]
            assert (outside == 0).all(), "soft must be zero between groups: merge_matrices() puts blocks together"
    found = method.best(items)
    assert torch.equal(found // 3, group), f"best() must leave items in their group (site.num_groups): {found}"


@pytest.mark.parametrize("preset", PRESETS)
def test_warmup_keeps_the_start_and_frozen_and_evaluation_are_hard_and_deterministic(preset):
    method = disturb(make(preset, 6), 1.0)
    items = items_of(6)
    method.phase = "warmup"
    assert torch.equal(method(items).order, method.site.order), "in warmup, forward() must give site.order"
    method.phase = "frozen"
    frozen = method(items)
    method.phase = "active"
    evaluated = method.eval()(items)
    for when, sample in (("frozen", frozen), ("evaluated", evaluated)):
        kept = torch.equal(sample.order, method.best(items))
        assert kept, f"when {when}, forward() must give the order of best()"
        others = (sample.soft, sample.log_prob, sample.estimator)
        assert others == (None, None, "none"), f"when {when}, forward() must give an order and nothing that learns"


@pytest.mark.parametrize("preset", PRESETS)
def test_items_may_be_left_out_unless_they_are_needed(preset):
    method = disturb(make(preset, 6), 1.0)
    items = items_of(6)
    if method.needs_items:
        with pytest.raises(ValueError, match="items"):
            method.best()
        return
    unneeded = "must not depend on the items: needs_items is False"
    assert torch.equal(method.best(), method.best(items)), f"best() {unneeded}"
    assert same(method.eval()(), method(items)), f"forward() {unneeded}"
    assert method.train()(generator=seeded(0)).order.shape[-1] == 6, f"sample() {unneeded}"


@pytest.mark.parametrize("preset", PRESETS)
def test_whether_items_are_needed_is_known_from_the_options(preset):
    """A run tells how many trainings it makes before torch is imported; without one order there is one less."""
    option, values = type(make(preset, 6)).reads_items or ("", ())
    type_ = component_options("method", settings_of(preset)["component"])[option].type if option else None
    for value in choices(type_) if option else [None]:
        method = make(preset, 6, **({option: value} if option else {}))
        assert method.needs_items == (value in values)


@pytest.mark.parametrize("preset", PRESETS)
def test_statistics_are_finite_and_in_range(preset):
    method = disturb(make(preset, 6), 1.0)
    for number in range(4):
        method.advance(number, 4)
        statistics = method.statistics(items_of(3, 6))
        expected = {"entropy", "temperature", "kendall", "displacement"}
        assert expected <= statistics.keys(), f"statistics() lacks {', '.join(expected - statistics.keys())}"
        wrong = [name for name, value in statistics.items() if value.ndim or not value.isfinite()]
        assert not wrong, f"statistics() must be finite numbers, and {', '.join(wrong)} is not"
        entropy = statistics["entropy"].item()
        assert -1e-6 <= entropy <= 1 + 1e-6, f"entropy() goes from 0 (one order) to 1 (a uniform law): {entropy:.3g}"
        assert statistics["temperature"] == pytest.approx(method.temperature), "advance() sets the temperature"


# The relaxation


def _row_and_column_error(soft: torch.Tensor) -> tuple[float, float]:
    return (soft.sum(-1) - 1).abs().max().item(), (soft.sum(-2) - 1).abs().max().item()


@pytest.mark.parametrize("num_items", [1, 2, 3, 17])
@pytest.mark.parametrize("preset", RELAXED)
def test_rows_or_columns_of_the_soft_matrix_sum_to_one(preset, num_items):
    method = disturb(make(preset, num_items), 0.3)
    for temperature in (0.01, 0.3, 3.0):
        method.temperature = temperature
        soft = method(items_of(num_items), generator=seeded(0)).soft
        assert (soft >= 0).all(), (
            f"soft must have no negative entry; at temperature {temperature} it has {soft.min():.3g}"
        )
        rows, columns = _row_and_column_error(soft)
        assert min(rows, columns) < 1e-5, (
            f"rows or columns of soft must sum to one; at temperature {temperature} rows are off by {rows:.2g}, "
            f"columns by {columns:.2g}"
        )
        if num_items == 1:
            assert soft.item() == 1, "soft of a single item must be 1"


@pytest.mark.parametrize("preset", [preset for preset in RELAXED if "num_iters" in settings_of(preset)])
def test_enough_iterations_bring_rows_and_columns_to_one(preset):
    method = disturb(make(preset, 17, num_iters=1000), 0.3)
    method.temperature = 0.3
    rows, columns = _row_and_column_error(method.soft_matrix(items_of(17)))
    assert max(rows, columns) < 1e-4, f"num_iters=1000 must bring rows and columns to one: {rows:.2g}, {columns:.2g}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("preset", PICTURED)
def test_cold_limit_is_the_hard_matrix_of_the_best_order(preset, seed):
    method = disturb(make(preset, 5, **counts(preset, num_iters=1000)), 0.1, seed)
    items = items_of(5)
    target = order_to_matrix(method.best(items))
    error = []
    for temperature in (1.0, 0.001):
        method.temperature = temperature
        error.append((method.soft_matrix(items) - target).abs().max().item())
    warm, cold = error
    assert cold < 0.02, f"soft_matrix() must be the matrix of best() when it is cold, and is off by {cold:.2g}"
    assert warm > 0.02, f"soft_matrix() must be soft when it is warm; at temperature 1 it is within {warm:.2g} of hard"
    method.temperature = 0.001
    assert method.entropy(items) < 0.02, "entropy() must be near 0 when the method is cold"


@pytest.mark.parametrize("preset", [preset for preset in LEARNED if preset not in CONSTANT])
def test_gradients_agree_with_finite_differences(preset):
    method = disturb(make(preset, 4).double(), 0.2)
    items = items_of(4).double()
    names = [name for name, _ in method.named_parameters()]

    def outputs(*parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sample = functional_call(method, dict(zip(names, parameters, strict=True)), (items,), {"generator": seeded(0)})
        return tuple(part for part in (sample.soft, sample.log_prob) if part is not None)

    # Of a network's hundreds of parameters, random directions are tried in place of each.
    many = sum(parameter.numel() for parameter in method.parameters()) > 40
    try:
        torch.autograd.gradcheck(outputs, tuple(method.parameters()), fast_mode=many)
    except torch.autograd.gradcheck.GradcheckError as error:
        pytest.fail(
            "the gradient of soft and log_prob must agree with finite differences in float64, under the same "
            f"generator: {str(error).splitlines()[0]}"
        )


@pytest.mark.parametrize("preset", LEARNED)
def test_a_training_step_changes_every_parameter_that_counts(preset):
    method = disturb(make(preset, 6), 0.1)
    items = items_of(5, 6)
    loss_of(method, items, method(items, generator=seeded(1))).backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part in a sample: build it only where it does"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} must be finite"
    # The running baseline of a law starts at the first reward, whose advantage is then zero.
    loss_of(method, items, method(items, generator=seeded(2))).backward()
    idle = [name for name, parameter in method.named_parameters() if not (parameter.grad != 0).any()]
    assert not idle, f"the gradient of {', '.join(idle)} is zero: does the sample carry it (no detach, no argmax)?"


@pytest.mark.parametrize("state", ["start", "tied", "huge"])
@pytest.mark.parametrize("preset", LEARNED)
def test_no_temperature_of_the_schedule_gives_nan(preset, state):
    method = make(preset, 6)
    # Scores of a table may become infinite; a network of infinite weights has no scores to bound.
    scale = {"start": 1.0, "tied": 0.0, "huge": 1e3 if method.needs_items else 1e30}[state]
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.mul_(scale).mul_(scale)
    items = items_of(5, 6)
    schedule = [method.schedule.at(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for temperature in (*schedule, 1e-3, 1e3):
        method.temperature = temperature
        method.zero_grad()
        sample = method(items, generator=seeded(0))
        here = f"must be finite for parameters that are {state}, at temperature {temperature:g}"
        for name in ("soft", "log_prob"):
            part = getattr(sample, name)
            finite = part is None or bool(part.isfinite().all())
            assert finite, f"{name} {here}: clamp scores to MAX_SCORE of method/base.py"
        loss_of(method, items, sample).backward()
        for name, parameter in method.named_parameters():
            finite = bool(parameter.grad.isfinite().all())
            assert finite, f"the gradient of {name} {here}"
        assert method.entropy(items).isfinite(), f"entropy() {here}"
        found = method.best(items).sort(-1).values.reshape(-1, 6)[0]
        assert torch.equal(found, torch.arange(6)), f"best() must have each item once for parameters that are {state}"


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_items(preset):
    method = disturb(make(preset, 6), 0.1)
    items = items_of(3, 6)
    full = permute(items, method(items, generator=seeded(0)))
    low = items.bfloat16().requires_grad_()
    half = permute(low, method(low, generator=seeded(0)))
    assert half.dtype == torch.bfloat16, f"items in bfloat16 must come back in bfloat16, not {half.dtype}"
    torch.testing.assert_close(half.float(), full, rtol=0.02, atol=0.02)
    half.sum().backward()
    assert low.grad.isfinite().all(), "the gradient of items in bfloat16 must be finite"


# Chance


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_generator_gives_the_same_bits(preset):
    method = disturb(make(preset, 17), 0.1)
    items = items_of(2, 17)
    draws = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        draws.append(method(items, generator=seeded(7)))
    assert same(*draws), "all chance in sample() must come from its generator: torch's own seed changed the sample"
    again = []
    for _ in range(2):
        torch.manual_seed(3)
        again.append(method(items))
    assert same(*again), "without a generator, chance must come from torch's own: the same seed gave another sample"


def frequencies(method: Method, items: torch.Tensor, num_draws: int) -> tuple[Counter, dict]:
    """How often each order was drawn, and its log-probability where there is one."""
    drawn: Counter = Counter()
    log_prob = {}
    generator = seeded(0)
    with torch.no_grad():
        while drawn.total() < num_draws:
            sample = method(items, generator=generator)
            orders = sample.order.reshape(-1, sample.order.shape[-1]).tolist()
            drawn.update(map(tuple, orders))
            if sample.log_prob is not None:
                log_prob |= zip(map(tuple, orders), sample.log_prob.flatten().tolist(), strict=True)
    return drawn, log_prob


def law_of(preset: str, temperature: float, **changes: Any) -> tuple[Counter, dict]:
    """Frequencies over four items, away from the start; draws come by the hundred where they can."""
    method = disturb(make(preset, 4, **changes, **counts(preset, num_samples=200)), 0.3)
    method.temperature = temperature
    return frequencies(method, items_of(4), 8000)


def agreement(drawn: Counter, log_prob: dict) -> float:
    """p-value of a chi-square test of the frequencies against the claimed probabilities."""
    orders = sorted(log_prob)
    claimed = torch.tensor([log_prob[order] for order in orders], dtype=torch.float64).softmax(0)
    return chisquare([drawn[order] for order in orders], (claimed * drawn.total()).tolist()).pvalue


@pytest.mark.parametrize("preset", LAWS)
def test_log_prob_is_that_of_the_law_that_is_drawn_from(preset):
    omits_temperature = settings_of(preset).get("temperature_in_log_prob") is False
    drawn, log_prob = law_of(preset, 1.0 if omits_temperature else 0.6)
    assert len(log_prob) == math.factorial(4), f"a law must reach all 24 orders of 4 items, and reached {len(log_prob)}"
    total = sum(map(math.exp, log_prob.values()))
    assert total == pytest.approx(1, abs=1e-5), f"exp(log_prob) over all orders must sum to one: {total:.6f}"
    p_value = agreement(drawn, log_prob)
    assert p_value > 1e-3, f"orders must be drawn as often as log_prob says (p = {p_value:.2g}): temperature included?"


@pytest.mark.parametrize("preset", [name for name in LAWS if "temperature_in_log_prob" in settings_of(name)])
def test_without_the_temperature_log_prob_is_that_of_another_law(preset):
    assert agreement(*law_of(preset, 0.6, temperature_in_log_prob=False)) < 1e-6


# Relabelling: numbering the items otherwise changes nothing but the numbers


RELABEL = torch.tensor([3, 5, 0, 1, 4, 2])  # item `j` of the second site is item `RELABEL[j]` of the first


def relabelled(preset: str) -> tuple[Method, torch.Tensor, Method, torch.Tensor]:
    """The same site twice, its items and their starting order numbered otherwise, in float64."""
    start, items = torch.tensor(STARTS["mixed"]), items_of(5, 6).double()
    first, second = make(preset, start.tolist()), make(preset, invert(RELABEL)[start].tolist())
    return first.double(), items, second.double(), items[:, RELABEL]


def assert_relabelled(
    preset: str, first: Method, items: torch.Tensor, second: Method, items_again: torch.Tensor
) -> None:
    expected, found = invert(RELABEL)[first.best(items)], second.best(items_again)
    alike = torch.equal(expected, found)
    assert alike, (
        "items numbered otherwise must be ordered alike: does something (noise, a tie) belong to an item's number? "
        f"expected {expected.tolist()}, got {found.tolist()}"
    )
    # The picture of a law is made of draws, whose noise belongs to item numbers.
    if preset in PICTURED and preset not in LAWS:
        torch.testing.assert_close(first.soft_matrix(items)[..., RELABEL], second.soft_matrix(items_again))


@pytest.mark.parametrize("preset", PRESETS)
def test_relabelled_items_start_relabelled(preset):
    assert_relabelled(preset, *relabelled(preset))


@pytest.mark.parametrize("preset", [name for name in LEARNED if name in PICTURED and name not in CHANCE])
def test_training_commutes_with_relabelling(preset):
    first, items, second, items_again = relabelled(preset)
    first.temperature = second.temperature = 1.0
    untrained = first.soft_matrix(items)
    for method, x in ((first, items), (second, items_again)):
        for _ in range(5):
            step(method, loss_of(method, x, method(x)), size=0.3)
    moved = not torch.allclose(first.soft_matrix(items), untrained, atol=1e-3)
    assert moved, "five steps down the gradient must move soft_matrix()"
    assert_relabelled(preset, first, items, second, items_again)


@pytest.mark.parametrize("preset", CHANCE)
def test_chance_does_not_depend_on_item_numbers(preset):
    start, relabel = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    drawn = []
    for order in (start, invert(relabel)[start]):
        method = make(preset, order.tolist(), **counts(preset, num_iters=1, num_samples=100))
        method.temperature = 0.5
        drawn.append(frequencies(method, items_of(3), 500)[0])
    first = Counter({tuple(invert(relabel)[list(order)].tolist()): count for order, count in drawn[0].items()})
    orders = sorted(first | drawn[1])
    table = [[count[order] for order in orders] for count in (first, drawn[1])]
    p_value = 1.0 if len(orders) == 1 else chi2_contingency(table).pvalue
    assert p_value > 1e-3, f"items numbered otherwise must be drawn as often: p = {p_value:.2g}"


# Learning


@pytest.mark.parametrize("preset", LEARNED)
def test_training_improves_the_order(preset):
    """The loss is a sum over slots of weight times item, so sorting the items solves it."""
    value = torch.tensor([0.3, -0.8, 1.0, -0.2, 0.6, -1.0])
    items = value.unsqueeze(-1).expand(6, NUM_FEATURES)
    weight = torch.linspace(-1, 1, 6).unsqueeze(-1)
    method = make(preset, 6, **({"lr": 0.05} if "lr" in settings_of(preset) else {}))
    begin = (weight * items[method.best(items)]).sum()
    optimizer = torch.optim.Adam(method.parameters(), lr=method.lr)
    for number in range(150):
        method.advance(number, 150)
        sample = method(items, generator=seeded(number))
        if sample.estimator == "none":
            continue
        each = (weight * permute(items, sample)).sum((-2, -1))
        loss = each.mean()
        if sample.log_prob is not None:
            loss = loss - (method.advantage(-each.detach()) * sample.log_prob).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gain = begin - (weight * items[method.best(items)]).sum()
    assert gain > 2, (
        f"150 steps of Adam must improve best() on a task that sorting solves: the loss fell by {gain:.2f}, not 2. "
        "Does the gradient point the right way, and do best() and sample() read the same scores?"
    )


# Settings and state


@pytest.mark.parametrize("preset", PRESETS)
def test_state_survives_a_safe_file(preset):
    method = disturb(make(preset, 6), 1.0)
    items = items_of(5, 6)
    for seed in range(3):
        sample = method(items, generator=seeded(seed))
        loss_of(method, items, sample)  # moves a running baseline, if there is one
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other = make(preset, 6)
    other.load_state_dict(torch.load(file, weights_only=True))
    lost = "must be all in state_dict(): as parameters and registered buffers"
    kept = torch.equal(method.best(items), other.best(items))
    assert kept, f"what best() depends on {lost}"
    again = [each(items, generator=seeded(9)) for each in (method, other)]
    assert same(*again), f"what sample() depends on, but for its generator, {lost}"
    if sample.log_prob is not None:
        reward = permute(items, sample).sum((-2, -1))
        assert torch.equal(method.advantage(reward), other.advantage(reward)), f"what advantage() depends on {lost}"


@functools.cache
def _trace_of(preset: str, frozen_changes: str) -> list[Any]:
    return trace(preset, json.loads(frozen_changes))


def trace(preset: str, changes: dict[str, Any]) -> list[Any]:
    """Everything a short training shows of a method, to the bit."""
    method = make(preset, 6, **changes).double()
    items = items_of(5, 6).double()
    found = [method.search(replace(channels(), updates_weights=updates)) for updates in (False, True)]
    read = [method.lr, method.num_polish_steps, method.num_descent_steps, method.swap_share]  # by the task
    asked: list[int] = []
    prepared = make(preset, NUM_PATCHES, **changes)
    prepared.prepare(TrainingItems(lambda count: asked.append(count) or patches().draw(count)))
    seen: list[Any] = [*read, *found, *asked, *prepared.orders().values()]
    for number in range(12):
        method.advance(number, 12)
        sample = method(items, generator=seeded(number))
        loss = loss_of(method, items, sample)
        seen += [method.phase, method.temperature, sample.order, sample.soft, sample.log_prob, loss.detach()]
        if loss.requires_grad:
            seen += step(method, loss, size=0.1)
    return [(tuple(value.shape), value.flatten().tolist()) if torch.is_tensor(value) else value for value in seen]


@functools.cache
def channels() -> SearchInputs:
    """Something to search, large enough that no search is done at once."""
    weight, inputs = torch.randn(32, 64, generator=seeded(1)), torch.randn(96, 64, generator=seeded(2))
    hessian = inputs.T @ inputs
    scores = weight.abs() * hessian.diagonal().sqrt()
    return SearchInputs([weight], [hessian], [scores], n=2, m=4)


NUM_PATCHES = 24


@functools.cache
def patches() -> TrainingItems:
    """Images with a class in some of their patches, which are more than a search orders at once."""
    labels = torch.arange(160) % 4
    items = torch.randn(160, NUM_PATCHES, 5, generator=seeded(3))
    items[:, ::3] += torch.randn(4, 5, generator=seeded(4))[labels, None]
    return TrainingItems(lambda count: (items[:count], labels[:count]))


def variations(value: Any, type_: Any) -> list[Any]:
    """Other values of an option, each of which has to make a difference."""
    if isinstance(value, bool):
        return [not value]
    if value is None:
        return [other for other in (0.001, 1) if matches(other, type_)][:1]
    if isinstance(value, (int, float)):
        near = [other for other in (value * 2, value / 2, value + 0.25) if other != value and matches(other, type_)]
        return near[:1]
    if isinstance(value, dict):
        numbers = {key: number for key, number in value.items() if isinstance(number, (int, float))}
        return [value | {key: number * 2 or 0.25} for key, number in numbers.items()]
    return [choice for choice in choices(type_) if choice != value]


def options(preset: str) -> dict[str, Any]:
    known = component_options("method", settings_of(preset)["component"])
    return {key: option.type for key, option in known.items()}


def contexts(preset: str) -> list[dict[str, Any]]:
    """The preset as it is, and with one of its named choices made otherwise: an option may belong to one choice."""
    named = {key: type_ for key, type_ in options(preset).items() if choices(type_)}
    settings = settings_of(preset)
    others = [{key: choice} for key, type_ in named.items() for choice in choices(type_) if choice != settings[key]]
    return [{}, *others]


def makes_a_difference(preset: str, change: dict[str, Any]) -> bool:
    """Whether a change shows in some context; a combination the method refuses counts as shown only if all are."""
    refused = True
    for context in contexts(preset):
        if context.keys() & change.keys():
            continue
        try:
            if _trace_of(preset, json.dumps(context)) != trace(preset, context | change):
                return True
            refused = False
        except ConfigError:
            continue
    return refused


@pytest.mark.parametrize(("preset", "key"), [(preset, key) for preset in PRESETS for key in options(preset)])
def test_every_option_changes_some_output(preset, key):
    settings = settings_of(preset)
    changed = variations(settings[key], options(preset)[key])
    assert changed, f"no other value of {key}={settings[key]} to try"
    for value in changed:
        assert makes_a_difference(preset, {key: value}), (
            f"{key}: {settings[key]} -> {value} changes nothing: an option must show in a short training"
        )


# Searches

SEARCHES = [preset for preset in PRESETS if make(preset, 6).search(channels()) is not None]


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("preset", SEARCHES)
def test_a_search_finds_a_better_order_and_the_same_one_again(preset, num_groups):
    inputs = replace(channels(), num_groups=num_groups)
    found = make(preset, 6).search(inputs)
    assert sorted(found.tolist()) == list(range(64)), "search() must return an order: each channel once"
    size = 64 // num_groups
    assert (found // size).tolist() == (torch.arange(64) // size).tolist(), (
        "search() must leave channels in their group"
    )
    assert torch.equal(found, make(preset, 6).search(inputs)), "search() must find the same order again"
    scores = inputs.scores[0].numpy()

    def kept(order):
        return sum(sum(sorted(row[order[i : i + 4]])[-2:]) for row in scores for i in range(0, 64, 4))

    def lost(order):
        weight = inputs.weights[0].clone()
        for row, score in zip(weight, inputs.scores[0], strict=True):
            for block in order.view(-1, 4):
                row[block[score[block].argsort(descending=True)[:2]]] = 0
        return torch.einsum("oi,ij,oj->", weight, inputs.hessians[0], weight)

    better = lost(found) < lost(torch.arange(64)) or kept(found) > kept(torch.arange(64))
    assert better, (
        "search() must lower the reconstruction error, or keep more of the scores, than the channels as they are"
    )


def prepared(preset: str, start: int | list[int] = NUM_PATCHES, *, num_groups: int = 1) -> Method:
    method = make(preset, start, num_groups=num_groups)
    method.prepare(patches())
    return method


ITEM_SEARCHES = those(lambda preset: not torch.equal(prepared(preset).best(), prepared(preset).site.order))


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("preset", ITEM_SEARCHES)
def test_what_is_prepared_is_a_better_order_and_the_same_one_again(preset: str, num_groups: int) -> None:
    method = prepared(preset, list(range(NUM_PATCHES)), num_groups=num_groups)
    found, size = method.best(), NUM_PATCHES // num_groups
    assert sorted(found.tolist()) == list(range(NUM_PATCHES)), "prepare() must leave an order: each item once"
    stays = torch.equal(found // size, torch.arange(NUM_PATCHES) // size)
    assert stays, "prepare() must leave items in their group"
    again = prepared(preset, list(range(NUM_PATCHES)), num_groups=num_groups)
    assert torch.equal(found, again.best()), "prepare() must find the same order again"
    losses = [ridge_loss(*patches().draw(160), order) for order in (method.site.order, found)]
    assert losses[1] < losses[0], (
        f"what prepare() finds must be read better by a fading memory than the start: {losses}"
    )


@pytest.mark.parametrize("preset", ITEM_SEARCHES)
def test_what_is_prepared_is_kept_in_warmup_and_in_the_state(preset: str) -> None:
    method = prepared(preset)
    found = method.best()
    method.phase = "warmup"
    assert torch.equal(method.train()().order, found), "in warmup, forward() must give what prepare() has found"
    assert torch.equal(method.start_order, method.site.order), "prepare() must leave start_order, which controls have"
    other = make(preset, NUM_PATCHES)
    other.load_state_dict(method.state_dict())
    other.phase = "warmup"
    for order in (other.best(), other.train()().order):
        assert torch.equal(order, found), "what prepare() finds must be all in state_dict()"


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_has_a_help_line_and_a_starting_order(preset):
    first = (CONF / "method" / f"{preset}.yaml").read_text().splitlines()[0]
    yaml = f"conf/method/{preset}.yaml"
    assert re.fullmatch(r"# \S.{10,}", first), f"{yaml}: its first line must say in a comment what it is, for --help"
    assert "order" in settings_of(preset), f"{yaml}: has no starting order; write `order: row`"
