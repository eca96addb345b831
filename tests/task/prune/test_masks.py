"""Masks that learn in a channel order: what they start from, when they learn, and that they are n:m in it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from runs import SHORT, assemble, configure, data_module
from torch import Tensor, nn

from permlab.config.check import plan_of
from permlab.config.compose import resolve_train
from permlab.errors import ConfigError
from permlab.sparsity.mask import hard_mask, keep_best
from permlab.task.prune.learner import PruneLearner
from permlab.task.prune.masks import LearnedMasks, MaskLLM, ProxSparse

WORDS = (*SHORT, "task=prune", "model.patch_size=4", "task.num_samples=24", "num_threads=1")
KINDS = ["maskllm", "proxsparse"]


def learner_of(*overrides: str, num_steps: int = 8) -> PruneLearner:
    """A learner that has seen its calibration samples, on a backbone that was not trained."""
    config = configure([*WORDS, *overrides])
    parts = assemble(config)
    for parameter in parts.model.parameters():
        nn.init.normal_(parameter, std=0.25)
    learner = parts.learner
    learner.num_steps = num_steps
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(learner)
    learner.trainer = trainer
    learner.train()
    learner.prepare(data_module(config, config["seed"]), {})
    return learner


def loss_of(learner: PruneLearner) -> Tensor:
    inputs, targets = learner.calibration[0]
    return learner.training_step((inputs[:6], targets[:6]), 0)


def assert_n_of_m(learner: PruneLearner) -> None:
    keep, orders = learner.masks.keep(), learner._orders()
    for name, mask in keep.items():
        counts = mask[orders[name]].unflatten(0, (-1, learner.m)).sum(1)
        assert (counts == learner.n).all(), name


@pytest.mark.parametrize(
    "words", [(), ("model=vim_nano",), ("data=pydocs", "model=llama_nano", "task.n=4", "task.m=8")]
)
def test_a_law_starts_at_the_pruners_mask(words: tuple[str, ...]) -> None:
    learner = learner_of("method=deal_and_match", "task.mask=maskllm", *words)
    assert learner.masks.keep() == {}
    assert learner.masks.orders() == {}
    learner.advance(0)
    orders = learner.method.orders()
    for name, mask in learner.masks.keep().items():
        layers = learner.layers[name]
        assert torch.equal(learner.masks.orders()[name], orders[name])
        assert torch.equal(mask, hard_mask(orders[name], layers.scores, n=learner.n, m=learner.m) > 0)


def test_a_law_starts_at_the_mask_that_sparsegpt_chooses_as_it_updates() -> None:
    learner = learner_of("method=deal_and_match", "task.mask=maskllm", "task.pruner=sparsegpt")
    learner.advance(0)
    orders, keep = learner.masks.orders(), learner.masks.keep()
    for name, layers in learner.layers.items():
        own = layers.prune(orders[name], n=2, m=4)
        given = layers.prune(orders[name], n=2, m=4, keep=keep[name])
        assert all(torch.equal(one, other) for one, other in zip(own, given, strict=True)), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_what_is_learned_and_steps_keep_the_mask_n_of_m(kind: str) -> None:
    learner = learner_of("method=swap_search", f"task.mask={kind}", "task.gumbel_lr=0.1", "task.prox_lr=0.05")
    learner.advance(0)
    before, start = learner.masks.keep(), {k: p.detach().clone() for k, p in learner.masks.named_parameters()}
    optimizer = torch.optim.Adam(learner.masks.parameters(), lr=learner.masks.lr)
    for step in range(3):
        learner.advance(step)
        optimizer.zero_grad()
        loss_of(learner).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.masks.parameters())
        optimizer.step()
        learner.masks.stepped()
        assert_n_of_m(learner)
    assert all((p != start[k]).any() for k, p in learner.masks.named_parameters())
    assert any((mask != before[name]).any() for name, mask in learner.masks.keep().items())


def test_what_a_law_trains_on_is_the_frozen_weight_under_a_soft_mask() -> None:
    learner = learner_of("method=fixed", "task.mask=maskllm", "task.gumbel_reward=0.01")
    learner.advance(0)
    generator = torch.Generator().manual_seed(0)
    values = learner.masks.values(learner.layers, generator)
    kept = 0.0
    for name, value in values.items():
        items = learner.layers[name].items
        share = (value / items).unflatten(0, (-1, 4))
        assert share.min() >= 0
        assert share.max() <= 1.0001
        assert torch.allclose(share.sum(1), torch.tensor(2.0), atol=1e-3)
        kept += float(value.detach().square().sum())
    assert float(learner.masks.penalty(learner.layers)) == pytest.approx(-0.01 * kept, rel=1e-4)
    learner.masks.advance(1.0)
    learner.masks.values(learner.layers, generator)
    assert float(learner.masks.penalty(learner.layers)) == 0, "the reward falls to 0"


def test_proximal_weights_start_dense_and_are_anchored_where_they_stay() -> None:
    learner = learner_of("method=deal_and_match", "task.mask=proxsparse", "task.prox_anchor=2.0")
    learner.advance(0)
    masks, (name, *_) = learner.masks, learner.masks.names
    assert isinstance(masks, ProxSparse)
    assert all(torch.equal(v, learner.layers[k].items) for k, v in masks.values(learner.layers, None).items())
    assert float(masks.penalty(learner.layers)) == 0
    with torch.no_grad():
        parameter = next(iter(masks.learned.values()))
        dense, parameter[0, 0] = float(parameter[0, 0]), 0.0
        assert float(masks.penalty(learner.layers)) == 0, "what is gone is not called back"
        parameter[0, 0] = 1.5 * dense
        offset = 0.1 if dense >= 0 else -0.1
        expected = 2.0 * (1.5 * dense / (dense + offset) * 0.5 * dense) ** 2
        assert float(masks.penalty(learner.layers)) == pytest.approx(expected, rel=1e-3)
    learned = masks.learned[name.replace(".", "/")]
    by_slot = keep_best(learned.detach().abs(), n=2, m=4)
    assert torch.equal(masks.keep()[name][masks.order(name)], by_slot)


def test_orders_learn_first_and_then_stay() -> None:
    learner = learner_of("method=sinkhorn_ste", "task.mask=maskllm", "task.mask_share=0.25", num_steps=8)
    (stage,) = learner.stages()
    assert (stage.first, stage.lr) == (6, learner.task.gumbel_lr)
    phases = []
    for step in range(8):
        learner.advance(step)
        phases.append((learner.method.phase, learner.masks.settled, learner.method.temperature))
        loss_of(learner).backward()
        learner.on_before_optimizer_step(None)
        grads = [[p.grad is not None for p in part.parameters()] for part in (learner.method, learner.masks)]
        assert all(grads[step >= 6])
        assert not any(grads[step < 6])
        learner.zero_grad()
        if step == 5:
            for parameter in learner.method.parameters():
                nn.init.normal_(parameter, std=2.0)
            learned = learner.method.orders()
    assert [phase[:2] for phase in phases] == [("active", False)] * 6 + [("frozen", True)] * 2
    assert phases[5][2] == pytest.approx(0.1), "the temperature has run down when the orders are settled"
    assert all(torch.equal(order, learned[name]) for name, order in learner.masks.orders().items())
    assert_n_of_m(learner)


def test_orders_are_polished_before_masks_learn_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(
        "method=loss_search", "method.num_search_swaps=20", "method.num_polish_steps=4", "task.mask=maskllm"
    )
    before = learner.calibration_loss(learner._pruned_values(learner.method.orders()))
    learner.advance(0)
    after = learner.calibration_loss(learner._hard_values(learner._orders(), learner.masks.keep()))
    assert after < before
    monkeypatch.setattr(learner, "_polish", lambda *_: pytest.fail("polished again, which moves the groups"))
    result = learner.finish(lambda: {"test/accuracy": 0.5})
    assert all((result.arrays["orders"][name] == order.numpy()).all() for name, order in learner.masks.orders().items())
    assert result.summary["prune/calibration_loss"] == pytest.approx(after, rel=1e-4)
    assert result.summary["prune/num_parameters"] == sum(p.numel() for p in learner.masks.parameters()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_is_in_the_state(kind: str) -> None:
    learner, other = (learner_of("method=fixed", f"task.mask={kind}") for _ in range(2))
    learner.advance(0)
    for parameter in learner.masks.parameters():
        nn.init.normal_(parameter)
    assert not other.masks.settled
    other.masks.load_state_dict(learner.masks.state_dict())
    assert other.masks.settled
    ours, theirs = learner.masks.keep(), other.masks.keep()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_logits_and_weights_are_no_more_than_announced() -> None:
    shapes = {"a": (16, 5)}
    task: Any = SimpleNamespace(
        n=2, m=4, gumbel_lr=1, gumbel_scale=1.0, gumbel_temperature=1.0, gumbel_reward=0, prox_lr=1
    )
    for kind, expected in ((MaskLLM, 6 * 16 * 5 // 4), (ProxSparse, 16 * 5)):
        masks: LearnedMasks = kind(task, shapes)
        assert sum(p.numel() for p in masks.parameters()) == expected


# Words


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("task.mask=proxsparse", "task.n=1"),
            "task.mask=proxsparse: its regulariser is for 2:4, not 1:4; nearest: maskllm",
        ),
        (
            ("task.mask=maskllm", "task.n=8", "task.m=16"),
            "task.mask=maskllm: 8:16 has 12870 patterns, more than 256; nearest: 4:8",
        ),
        (
            ("task.mask=maskllm", "method=hybrid", "task.mask_share=1"),
            "task.mask_share=1: leaves no steps for the mask, or none for the orders",
        ),
        (
            ("task.mask=maskllm", "method=hybrid", "task.mask_share=0"),
            "task.mask_share=0: leaves no steps for the mask, or none for the orders",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(words: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_train([*WORDS, *words])
    assert str(error.value).strip() == line


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (("task.gumbel_lr=0.1",), "task.gumbel_lr=0.1 has no effect with task.mask=topk"),
        (("task.mask=maskllm", "task.prox_penalty=1"), "task.prox_penalty=1 has no effect with task.mask=maskllm"),
        (
            ("task.mask=maskllm", "task.mask_share=0.2"),
            "task.mask_share=0.2 has no effect with method=fixed, which does not learn",
        ),
    ],
)
def test_settings_without_effect_are_told(words: tuple[str, ...], idle: str) -> None:
    assert idle in resolve_train([*WORDS, "method=fixed", *words])[1]


def test_losses_and_rates_have_effect_where_only_the_mask_learns() -> None:
    words = ["task.kl_weight=0.5", "optim.schedule=linear", "trainer.max_steps=7"]
    assert resolve_train([*WORDS, "method=fixed", "task.mask=maskllm", *words])[1] == []


@pytest.mark.parametrize(
    ("words", "label"),
    [
        (("method=fixed",), "wanda"),
        (("method=fixed", "task.mask=maskllm"), "wanda + maskllm"),
        (("method=swap_search", "task.mask=maskllm"), "wanda + swap_search + maskllm"),
        (("method=hybrid", "task.pruner=sparsegpt", "task.mask=proxsparse"), "sparsegpt + hybrid + proxsparse"),
    ],
)
def test_rows_of_tables_name_the_mask(words: tuple[str, ...], label: str, tmp_path: Path) -> None:
    plan = plan_of(configure([*WORDS, *words]))
    assert plan.task.label(plan) == label
    key = "test/accuracy" if label == "wanda" else "test/accuracy_unpermuted"
    if plan.task.pruner == "wanda":
        assert plan.task.baseline(plan, {key: 0.5}) == 0.5


def test_runs_by_score_keep_their_names() -> None:
    """The digest leaves out what is newer; under a mask that learns it counts."""
    plain, named, other = (
        resolve_train([*WORDS, "method=fixed", *words])[0].directory
        for words in ((), ("task.mask=topk",), ("task.mask=maskllm",))
    )
    assert plain == named != other
