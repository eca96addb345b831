"""Pruning under learned orders: the loss and its gradient by hand, and runs from the command line to their files."""

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prune_tasks import IMAGES, ONE, PRUNE, TEXT, task_of, words_of
from runs import SHORT, Result, StopAt, assemble, configure, data_module, train
from torch import Tensor, nn
from torch.func import functional_call

import permlab.run.story
import permlab.run.trainer
import permlab.task.prune.finished
import permlab.task.prune.predictions
from permlab.cli import main
from permlab.config.check import plan_of
from permlab.config.compose import resolve_train
from permlab.errors import ConfigError
from permlab.ops.nm import nm_mask
from permlab.permutation import PermutationSample, invert, order_to_matrix
from permlab.record.checkpoint import load_weights
from permlab.run.companion import companion_plan
from permlab.sparsity.importance import sparsegpt
from permlab.sparsity.quality import efficacy, reconstruction_error, retained
from permlab.sparsity.search import deal_and_match
from permlab.sparsity.site import read_sites
from permlab.task.prune.learner import PruneLearner
from permlab.task.prune.losses import distance, divergence
from permlab.task.prune.sites import fitting_sites

STEPS = 3
FAR = ("method.lr=3",)  # within three steps, orders far from the start


def batch_of(task: PruneLearner, count: int = 6) -> tuple[Tensor, Tensor]:
    inputs, targets = task.calibration[0]
    return inputs[:count], targets[:count]


def shuffle_bases(task: PruneLearner) -> None:
    for site in task.method.sites:
        size = site.num_items // task.method.num_groups[site.name]
        order = torch.cat([start + torch.randperm(size) for start in range(0, site.num_items, size)])
        task.method.rebase(site.name, order)


def by_hand(task: PruneLearner, samples: dict[str, PermutationSample]) -> dict[str, Tensor]:
    """Pruned weights by parameter name, from whole matrices in plain torch; every reader's rows in items layout."""
    weights: dict[str, Tensor] = {}
    n, m = task.n, task.m
    for site in task.method.sites:
        layers, sample, base = task.layers[site.name], samples[site.name], task.method.base(site.name)
        dense = [site.to_items(weight)[:, base] for weight in layers.weights]
        scores = [part[:, base] for part in layers.scores.mT.split([len(part) for part in dense])]
        pruned = []
        if sample.soft is None:
            for weight, score in zip(dense, scores, strict=True):
                mask = torch.zeros_like(weight)
                mask[:, sample.order] = nm_mask(score[:, sample.order], n=n, m=m).to(weight.dtype)
                pruned.append(weight * mask)
        else:
            matrix = sample.soft
            if sample.estimator == "straight_through":
                matrix = order_to_matrix(sample.order).to(matrix.dtype) + (matrix - matrix.detach())
            slots = [score @ matrix.mT for score in scores]
            unit = task.task.mask_temperature * torch.cat(slots).detach().mean()
            for weight, slot in zip(dense, slots, strict=True):
                share = (slot / unit).unflatten(-1, (-1, m)).softmax(-1).flatten(-2)
                keep = nm_mask(slot.detach(), n=n, m=m).to(slot.dtype) + (share - share.detach())
                if sample.estimator == "relaxed" and task.task.mix == "weight":
                    pruned.append(((weight @ matrix.mT) * keep) @ matrix)
                elif sample.estimator == "straight_through" and task.task.mask_backward == "softmax":
                    hard, soft = (keep @ matrix).detach(), share @ matrix
                    pruned.append(weight * (hard + (soft - soft.detach())))
                else:
                    pruned.append(weight * (keep @ matrix))
        for reader, values in zip(site.readers, pruned, strict=True):
            name, back = f"{reader.module}.weight", site.from_items(values[:, invert(base)])
            whole = weights.get(name, task.model.get_parameter(name).detach())
            rows = slice(None) if reader.rows is None else slice(*reader.rows)
            weights[name] = torch.cat([whole[: rows.start or 0], back, whole[rows.stop or len(whole) :]])
    return weights


def outputs_of(
    task: PruneLearner, weights: dict[str, Tensor], inputs: Tensor, names: list[str]
) -> tuple[Tensor, list[Tensor]]:
    """Logits and the outputs of some modules under other weights."""
    found: dict[str, Tensor] = {}
    handles = [
        task.model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: found.update({name: output})
        )
        for name in names
    ]
    logits = functional_call(task.model.eval(), weights, (inputs,))
    for handle in handles:
        handle.remove()
    return logits, [found[name] for name in names]


def kl_by_hand(logits: Tensor, dense: Tensor) -> Tensor:
    p, q = dense.softmax(-1), logits.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


# The model x the method x settings that change how an order becomes a mask.
SETTINGS = [
    ("method=fixed",),
    ("method=sinkhorn", "task.mix=weight"),
    ("method=sinkhorn", "task.mix=mask", "task.mask_temperature=0.4"),
    ("method=sinkhorn_ste", "task.block_size=16", "task.num_groups=null"),
    ("method=sinkhorn_ste", "task.mask_backward=softmax"),
    ("method=sort_ste", "task.n=1", "task.pruner=ria"),
    ("method=sinkhorn_network", "task.pruner=magnitude"),
    ("method=gumbel_sinkhorn", "task.coupling=independent", "task.pruner=sparsegpt"),
    ("method=sinkhorn_ste", "model=llama_nano", "task.within_heads=true"),
    ("method=sinkhorn", "model=vim_nano"),
    ("method=sinkhorn_ste", *TEXT),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_the_training_loss_and_its_gradient_by_hand(settings: tuple[str, ...]) -> None:
    """Cross-entropy, divergence and distance of every pruned layer's output, of whole matrices in plain torch."""
    weights = ("task.task_weight=0.5", "task.kl_weight=2", "task.distill_weight=0.3", "task.distill_kind=smooth_l1")
    task = task_of(*settings, *weights, "task.distill_over=every_pruned_layer")
    shuffle_bases(task)
    for site in task.method.sites:
        task.method.set_features(site.name, task.layers[site.name].features())
    inputs, targets = batch_of(task)
    samples = task.method.sample(task._noise(0))
    names = sorted({reader.module for site in task.method.sites for reader in site.readers})
    logits, states = outputs_of(task, by_hand(task, samples), inputs, names)
    dense, dense_states = outputs_of(task, {}, inputs, names)
    expected = 0.5 * F.cross_entropy(logits.flatten(0, -2), targets.flatten()) + 2 * kl_by_hand(logits, dense)
    for ours, theirs in zip(states, dense_states, strict=True):
        difference = (ours - theirs).abs()
        expected = expected + 0.3 * torch.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
    found = task.training_step((inputs, targets), 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    parameters = list(task.method.parameters())
    if settings == ("method=fixed",):
        assert not task.learns
        assert not parameters
        return
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (found, expected))
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6)
    assert max(gradient.abs().max() for gradient in ours) > 1e-4
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_the_policy_gradient_is_the_published_estimator() -> None:
    """All sites of a draw share its reward; each draw is compared with the mean of the others."""
    task = task_of("method=reorder", "method.num_samples=3", "task.task_weight=1", "task.kl_weight=1")
    shuffle_bases(task)
    inputs, targets = batch_of(task)
    samples = task.method.sample(task._noise(0))
    dense, _ = outputs_of(task, {}, inputs, [])
    losses = []
    for draw in range(3):
        one = {
            name: PermutationSample(sample.order[draw].flatten(), None, None, "none")
            for name, sample in samples.items()
        }
        logits, _ = outputs_of(task, by_hand(task, one), inputs, [])
        losses.append((F.cross_entropy(logits, targets) + kl_by_hand(logits, dense)).detach())
    assert len({round(loss.item(), 6) for loss in losses}) == 3
    total = 0.0
    for sample in samples.values():
        for draw in range(3):
            advantage = sum(losses[other] for other in range(3) if other != draw) / 2 - losses[draw]
            total = total - advantage * sample.log_prob[draw].sum() / 3
    parameters = list(task.method.parameters())
    expected = torch.autograd.grad(total, parameters)
    loss = task.training_step((inputs, targets), 0)
    torch.testing.assert_close(loss, torch.stack(losses).mean() + total.detach(), rtol=1e-4, atol=1e-5)
    for gradient, other in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("over", "kind", "model"),
    [
        ("block", "mse", "vit_nano"),
        ("block", "smooth_l1", "llama_nano"),
        ("block", "cosine", "vim_nano"),
        ("last", "mse", "vim_nano"),
        ("last", "smooth_l1", "vit_nano"),
        ("last", "cosine", "llama_nano"),
    ],
)
def test_distillation_from_blocks(over: str, kind: str, model: str) -> None:
    options = (f"model={model}", f"task.distill_over={over}", f"task.distill_kind={kind}", "task.distill_weight=0.7")
    task = task_of("method=sort_ste", "task.task_weight=0", "task.kl_weight=0", *options)
    inputs, targets = batch_of(task)
    prefix = "network.layers" if model == "llama_nano" else "blocks"
    names = [f"{prefix}.0", f"{prefix}.1"][0 if over == "block" else 1 :]
    weights = by_hand(task, task.method.sample(task._noise(0)))
    _, states = outputs_of(task, weights, inputs, names)
    _, dense_states = outputs_of(task, {}, inputs, names)
    expected = 0.0
    for ours, theirs in zip(states, dense_states, strict=True):
        if kind == "cosine":
            cosine = (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
            expected = expected + 0.7 * (1 - cosine).mean()
        else:
            gap = (ours - theirs).abs()
            square = gap**2 if kind == "mse" else torch.where(gap < 1, gap**2 / 2, gap - 0.5)
            expected = expected + 0.7 * square.mean()
    torch.testing.assert_close(task.training_step((inputs, targets), 0), expected, rtol=1e-4, atol=1e-6)


def test_distance_and_divergence_of_equal_things_are_zero() -> None:
    states, logits = torch.randn(2, 3, 5), torch.randn(2, 3, 7)
    assert all(distance(states, states, kind).abs() < 1e-6 for kind in ("mse", "smooth_l1", "cosine"))
    assert divergence(logits, logits + 4) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(divergence(logits, logits.flip(0)), kl_by_hand(logits, logits.flip(0)))


def test_without_a_loss_nothing_moves() -> None:
    task = task_of("method=sinkhorn", "task.task_weight=0", "task.kl_weight=0", "task.distill_weight=0")
    loss = task.training_step(batch_of(task), 0)
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, list(task.method.parameters()))
    assert all((gradient == 0).all() for gradient in gradients)


# Calibration


@pytest.mark.parametrize(("kept", "exact"), [("whole", 1e-4), ("half", 1e-3), ("not", 1e-4)])
def test_the_calibration_loss_is_the_mean_divergence_of_the_samples(
    kept: str, exact: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept != "whole":
        monkeypatch.setattr(permlab.task.prune.predictions, "MAX_KEPT_WHOLE", 100)
    # 50 samples are a batch of 32 and one of 18.
    task = task_of("method=sinkhorn_ste", "task.num_samples=50", f"task.cache_gib={0 if kept == 'not' else 1}")
    assert [len(inputs) for inputs, _ in task.calibration] == [32, 18]
    first = task._predictions.get(0, torch.device("cpu"))
    assert {"whole": torch.float32, "half": torch.float16, "not": None}[kept] == getattr(first, "dtype", None)
    orders = task.method.orders()
    hard = {name: PermutationSample(order, None, None, "none") for name, order in orders.items()}
    weights = by_hand(task, hard)
    inputs = torch.cat([inputs for inputs, _ in task.calibration])
    losses = [
        kl_by_hand(outputs_of(task, weights, one, [])[0], outputs_of(task, {}, one, [])[0]).item()
        for one in inputs.split(1)
    ]
    values = task._hard_values(orders)
    assert task.calibration_loss(values) == pytest.approx(sum(losses) / 50, rel=exact)
    loss, gradient = task._loss_and_gradient(orders)
    assert loss == pytest.approx(sum(losses) / 50, rel=exact)
    # Its gradient is for all weights: switching a pruned one on changes the loss accordingly.
    name = task.method.sites[0].name
    (place, *_) = ((values[name] == 0) & (gradient[name].abs() > gradient[name].abs().mean())).nonzero()
    moved = values | {name: values[name].clone()}
    moved[name][tuple(place)] += 1e-2
    assert task.calibration_loss(moved) - loss == pytest.approx(1e-2 * gradient[name][tuple(place)].item(), rel=0.1)


def test_windows_of_text_are_cut_for_calibration() -> None:
    task = task_of("method=fixed", *TEXT, "task.sequence_length=9")
    assert {inputs.shape[1] for inputs, _ in task.calibration} == {9}
    assert {inputs.shape[1] for inputs in task.held_out} == {9}
    for inputs, targets in task.calibration:
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert task.layers[task.method.sites[0].name].statistics[0].num_tokens == 9 * 24


def test_the_present_hard_orders_are_what_is_validated() -> None:
    task = task_of("method=sinkhorn")
    inputs, _ = batch_of(task)
    hard = {name: PermutationSample(order, None, None, "none") for name, order in task.method.orders().items()}
    torch.testing.assert_close(task.predict(inputs), outputs_of(task, by_hand(task, hard), inputs, [])[0])


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_polishing_ends_below_start_and_learned(pruner: str) -> None:
    """On the model as it is pruned, with the weights that are kept updated where the pruner does that."""
    task = task_of("method=hybrid", "method.search=none", "method.num_polish_steps=8", f"task.pruner={pruner}")
    result = task.finish(lambda: {})
    results, polished = result.summary, result.arrays["sites"]["polished_loss"]
    better = min(results["prune/calibration_loss_start"], results["prune/calibration_loss_learned"])
    assert results["prune/calibration_loss"] < better * (1 if pruner == "wanda" else 1 + 1e-5)
    assert polished[0] == pytest.approx(better, rel=1e-4)
    assert polished[-1] == pytest.approx(results["prune/calibration_loss"], rel=1e-3)
    assert (np.diff(polished) <= 0).all()


def descending(folder: Path, *words: str) -> PruneLearner:
    """A task whose run lies in this folder."""
    task = task_of("method=swap_descent", "method.num_search_swaps=50", "method.num_polish_steps=0", *words)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    task.run_folder = folder
    return task


@pytest.mark.parametrize("pruner", ["wanda", "ria"])
def test_a_descent_ends_below_its_start(pruner: str, tmp_path: Path) -> None:
    task = descending(tmp_path, "method.num_descent_steps=40", f"task.pruner={pruner}")
    result = task.finish(lambda: {})
    losses, rounds = result.summary, result.arrays["sites"]["descent_loss"]
    assert losses["prune/calibration_loss"] < 0.9 * losses["prune/calibration_loss_start"]
    assert len(rounds) == 40 // len(task.calibration)
    assert len(task.calibration) == 1, "so that a round is a step, and its loss that of all samples"
    assert rounds[0] == pytest.approx(losses["prune/calibration_loss_start"], rel=1e-4)
    assert rounds[-1] < rounds[0]
    assert not list(tmp_path.rglob("*.ckpt")), "its state is not needed any more"


def test_a_descent_beside_a_weight_update_never_ends_above_its_start(tmp_path: Path) -> None:
    """Its swaps are predicted for weights that are not updated, so on random ones it may lead upwards."""
    losses = descending(tmp_path, "method.num_descent_steps=40", "task.pruner=sparsegpt").finish(lambda: {}).summary
    assert losses["prune/calibration_loss"] <= losses["prune/calibration_loss_start"] * (1 + 1e-5)


def test_a_descent_that_leads_nowhere_keeps_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = descending(tmp_path, "method.num_descent_steps=4")
    downhill = task._loss_of_a_batch

    def uphill(*where: Any) -> tuple[float, dict[str, Tensor]]:
        loss, gradient = downhill(*where)
        return -loss, {name: -value for name, value in gradient.items()}

    monkeypatch.setattr(task, "_loss_of_a_batch", uphill)
    result = task.finish(lambda: {}).summary
    assert result["prune/calibration_loss"] == pytest.approx(result["prune/calibration_loss_start"], rel=1e-5)


def test_a_stopped_descent_goes_on_from_where_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permlab.task.prune.finished, "SAVED_EVERY", 3)
    folders = (tmp_path / "whole", tmp_path / "stopped", tmp_path / "stopped")
    whole, stopped, rest = (descending(folder, "method.num_descent_steps=10") for folder in folders)
    expected, asked = whole.finish(lambda: {}), []
    gradient = stopped._loss_of_a_batch

    def breaking(orders: Mapping[str, Tensor], step: int) -> tuple[float, dict[str, Tensor]]:
        if step == 7:
            raise KeyboardInterrupt
        return gradient(orders, step)

    monkeypatch.setattr(stopped, "_loss_of_a_batch", breaking)
    with pytest.raises(KeyboardInterrupt):
        stopped.finish(lambda: {})
    going_on = rest._loss_of_a_batch
    monkeypatch.setattr(rest, "_loss_of_a_batch", lambda orders, step: asked.append(step) or going_on(orders, step))
    found = rest.finish(lambda: {})
    assert asked == [6, 7, 8, 9]
    assert found.summary["prune/calibration_loss"] == expected.summary["prune/calibration_loss"]


@pytest.mark.parametrize("content", [b"", b"no archive", None], ids=["empty", "text", "other"])
def test_what_is_no_state_of_the_descent_is_passed_over(content: bytes | None, tmp_path: Path) -> None:
    task, other = (descending(tmp_path / name, "method.num_descent_steps=3") for name in ("one", "two"))
    expected = task.finish(lambda: {}).summary["prune/calibration_loss"]
    path = tmp_path / "two" / "checkpoints" / "descent.ckpt"
    if content is None:
        torch.save({"step": 1, "start": {}}, path)
    else:
        path.write_bytes(content)
    assert other.finish(lambda: {}).summary["prune/calibration_loss"] == expected


# Which sites


def sites_of(*words: str) -> dict[str, int]:
    config = configure(words_of("method=fixed", *words))
    parts = assemble(config)
    sites, counts, left_dense = fitting_sites(parts.model, parts.learner.task)
    every = read_sites(parts.model, select=config["task"]["sites"], coupling=config["task"]["coupling"])
    assert sorted([*(site.name for site in sites), *left_dense]) == sorted(site.name for site in every)
    return {site.kind: count for site, count in zip(sites, counts, strict=True)}


def test_groups_of_the_sites() -> None:
    vit = {"attn.qkv": 32, "attn.proj": 32, "mlp.fc1": 32, "mlp.fc2": 64}
    assert sites_of() == dict.fromkeys(vit, 4)
    assert sites_of("task.num_groups=null", "task.block_size=32") == {kind: width // 32 for kind, width in vit.items()}
    assert sites_of("task.num_groups=null", "task.block_size=48") == dict.fromkeys(vit, 1), "narrower ones have one"
    assert sites_of("task.within_heads=true", *ONE) == dict.fromkeys(vit, 1) | {"attn.proj": 2}
    assert sites_of("task.sites=foldable", *ONE) == {"stream": 1, "attn.proj": 2, "mlp.fc2": 1}
    assert sites_of("task.sites=[mlp.fc2,blocks.1.attn.qkv]") == {"mlp.fc2": 4, "attn.qkv": 4}
    assert sites_of("task.sites=stream", *ONE) == {"stream": 1}
    assert "attn.k" in sites_of("task.coupling=independent")
    # The step projections of 2 channels stay dense.
    assert set(sites_of("model=vim_nano")) == {"mixer.in_proj", "mixer.inner"}
    assert "mixer.dt_proj" in sites_of("model=vim_nano", "task.n=1", "task.m=2", *ONE)


def test_the_score_of_a_stream_is_the_sum_over_all_layers_that_read_it() -> None:
    learner = task_of("method=deal_and_match", "task.sites=foldable", *ONE)
    (site,) = [site for site in learner.method.sites if site.kind == "stream"]
    layers, order = learner.layers["stream"], learner.method.orders()["stream"]
    weights = [learner.model.get_parameter(f"{reader.module}.weight") for reader in site.readers]
    assert [reader.module.split(".", 2)[2] for reader in site.readers] == ["attn.qkv", "mlp.fc1"] * len(
        learner.model.blocks
    )
    scores = layers.scores.mT.split([len(weight) for weight in weights])
    assert torch.equal(order, deal_and_match(torch.cat(scores), n=2, m=4))
    each = [retained(part, order, n=2, m=4) * float(part.sum()) for part in scores]
    kept, default, _, total = layers.kept(order, n=2, m=4)
    assert kept == pytest.approx(sum(each), rel=1e-5)
    assert kept > default
    assert total == pytest.approx(sum(float(part.sum()) for part in scores), rel=1e-5)


def test_a_model_without_known_blocks_is_refused_before_and_after_it_is_built() -> None:
    with pytest.raises(ConfigError, match="model=ssm_probe: has no linear layers that task=prune knows"):
        configure([*SHORT, *PRUNE, "model=ssm_probe"])
    model = assemble(configure([*SHORT, "model=ssm_probe"])).model
    with pytest.raises(ValueError, match="SsmProbe has no block of a known family"):
        fitting_sites(model, plan_of(configure(words_of())).task)


def test_starting_orders() -> None:
    random = task_of("method=fixed", "method.order=random(3)").method
    for site in random.sites:
        order, size = random.base(site.name), site.num_items // 4
        assert torch.equal(order // size, torch.arange(site.num_items) // size)
        assert torch.equal(order[:size], order[size : 2 * size] - size)
        assert order[:size].tolist() != list(range(size))
    given = list(range(8))[::-1]
    reverse = task_of("method=fixed", f"method.order={given}", "task.sites=[attn.qkv]").method
    assert reverse.base("blocks.0.attn.qkv").tolist() == [8 * group + item for group in range(4) for item in given]


def refused(*words: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line about bad input."""
    capsys.readouterr()
    options = ("method=fixed", "trainer.max_steps=2", f"paths.runs={runs}")
    assert main("train", words_of(*options, *words)) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    return lines[0]


# Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


class Study:
    """Runs that are made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, {}

    def __call__(self, *words: str, steps: int = STEPS) -> Result:
        key = (*words, steps)
        if key not in self.found:
            options = ("task.num_samples=24", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1")
            with pytest.MonkeyPatch.context() as patch:
                if words not in (FIXED, SINKHORN):  # pictures take a third of the time
                    patch.setattr(permlab.run.story, "draw_all", lambda run_dir: [])
                self.found[key] = train(self.folder, *words_of(*options, *words), steps=steps)
        return self.found[key]


@pytest.fixture(scope="module")
def study(runs: Path) -> Study:
    return Study(runs)


FIXED = ("method=fixed",)
SINKHORN = ("method=sinkhorn", *FAR)
SINKHORN_STE = ("method=sinkhorn_ste", *FAR)
SEARCH = ("method=reconstruction_search", "task.pruner=sparsegpt")
FIXED_TEXT = (*FIXED, *TEXT)
INDEPENDENT = (*SINKHORN_STE, *TEXT, "task.coupling=independent")
FOLDABLE = (*SINKHORN, "model=llama_nano", "task.sites=foldable", *ONE)
SORT_VIM = ("method=sort_ste", *FAR, "model=vim_nano")
REORDER = ("method=reorder", *FAR)
CASES = [
    *(FIXED, SINKHORN, SINKHORN_STE, ("method=sort_ste", *FAR), REORDER, SEARCH, SORT_VIM, FOLDABLE, FIXED_TEXT),
    INDEPENDENT,
]


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_a_run_reports_what_pruning_cost(words: tuple[str, ...], study: Study) -> None:
    result = study(*words)
    assert result.code == 0, result.err
    summary, text = result.summary, "data=pydocs" in words
    metric = "test/perplexity" if text else "test/accuracy"
    for key in (metric, f"{metric}_dense", f"{metric}_unpermuted", "prune/retained", "prune/efficacy"):
        assert math.isfinite(summary[key])
    for key in ("reconstruction_error", "seconds", "num_parameters", "calibration_loss", "num_sites"):
        assert summary[f"prune/{key}"] >= 0
    assert (result.run_dir / "DONE").is_file()
    learns = words not in (FIXED, FIXED_TEXT, SEARCH)
    assert (summary["prune/num_parameters"] > 0) == (summary["train/steps"] == STEPS) == learns
    moved = summary["prune/efficacy"] != 0
    assert moved == (words not in (FIXED, FIXED_TEXT))
    label = metric.removeprefix("test/")
    assert re.search(rf"^test {label}, 1 seed", result.out, flags=re.MULTILINE)
    assert result.out.splitlines()[-1] == f"run: {result.run_dir}"


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_the_saved_weights_are_n_of_m_in_the_saved_order(words: tuple[str, ...], study: Study) -> None:
    result = study(*words)
    state = torch.load(result.run_dir / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    dense = torch.load(dense_of(result) / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    task = result.config["task"]
    parts = assemble(result.config)
    sites, _, _ = fitting_sites(parts.model, parts.learner.task)
    pruned = set()
    with np.load(result.run_dir / "arrays" / "orders.npz", allow_pickle=False) as orders:
        assert set(orders) == {site.name for site in sites}
        for site in sites:
            columns = site.column_order(torch.from_numpy(orders[site.name]))
            for reader in site.readers:
                rows = slice(None) if reader.rows is None else slice(*reader.rows)
                weight = state[f"model.{reader.module}.weight"][rows]
                kept = (weight[:, columns].view(len(weight), -1, task["m"]) != 0).sum(-1)
                assert kept.max() <= task["n"]
                assert kept.float().mean() > 0.9 * task["n"]
                pruned.add(f"model.{reader.module}.weight")
    for name, value in dense.items():
        if name.startswith("model.") and name not in pruned:
            assert torch.equal(state[name], value), name
        elif name in pruned and task["pruner"] != "sparsegpt":
            assert torch.equal(state[name], torch.where(state[name] != 0, value, 0)), name


def dense_of(result: Result) -> Path:
    given = result.config["task"]["dense"]
    if given:
        return Path(given)
    found = r"^dense model: (?:found|trained once), (.*)$"
    return Path(re.search(found, result.out, re.MULTILINE)[1])


@pytest.mark.parametrize("words", [FIXED, FIXED_TEXT, SEARCH, REORDER], ids=" ".join)
def test_what_a_fixed_order_gives_is_what_pruning_without_one_gives(words: tuple[str, ...], study: Study) -> None:
    summary = study(*words).summary
    tested = {key for key in summary if key.startswith("test/") and f"{key}_unpermuted" in summary}
    assert len(tested) >= 3
    if words in (FIXED, FIXED_TEXT):
        assert all(summary[key] == summary[f"{key}_unpermuted"] for key in tested)
        assert summary["prune/calibration_loss"] == summary["prune/calibration_loss_start"]
    else:
        assert summary["test/loss"] != summary["test/loss_unpermuted"]
    assert summary["test/loss_unpermuted"] != summary["test/loss_dense"]


@pytest.mark.parametrize("words", [FIXED, SEARCH, INDEPENDENT], ids=" ".join)
def test_eval_prints_the_same_numbers(words: tuple[str, ...], study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    result = study(*words)
    assert main("eval", [f"run={result.run_dir}"]) == 0
    printed = dict(re.findall(r"^(test/\S+)\s+(\S+)$", capsys.readouterr().out, flags=re.MULTILINE))
    assert len(printed) >= 3
    for name, value in printed.items():
        assert float(value) == pytest.approx(result.summary[name], abs=1e-6)


def test_the_dense_model_is_trained_once_and_tested_as_it_was(study: Study) -> None:
    results = [study(*words) for words in CASES[:6]]
    (folder,) = {dense_of(result) for result in results}
    assert len(list(folder.parent.glob("*/DONE"))) == 1
    dense = Result(0, "", "", folder)
    assert dense.config["trainer"]["max_steps"] == 60
    assert dense.summary["test/accuracy"] > 0.7
    for result in results:
        for name in ("accuracy", "loss"):
            assert result.summary[f"test/{name}_dense"] == pytest.approx(dense.summary[f"test/{name}"], abs=1e-6)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = study(*FIXED, "task.n=3")
    assert dense_of(again) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_orders_may_be_learned_from_shuffled_labels_but_no_dense_model() -> None:
    plans = [resolve_train(["task=prune", f"data.shuffle_labels={shuffle}"])[0] for shuffle in ("false", "true")]
    assert plans[0].digest != plans[1].digest
    dense = {companion_plan(plan, plan.task.before(plan)["dense"]).directory for plan in plans}
    assert len(dense) == 1


def test_training_checkpoints_hold_what_learns(study: Study) -> None:
    result = study(*SINKHORN_STE)
    for name in ("last", "picked"):
        state = torch.load(result.run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        assert not [key for key in state if key.startswith(("model.", "_reading"))]
        assert sum("table" in key for key in state) == sum("method.base_" in key for key in state) == 8
    best = torch.load(result.run_dir / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert any(key.startswith("model.") for key in best)


def test_the_picked_orders_are_the_best_validated_ones(study: Study) -> None:
    result = study(*REORDER, steps=6)
    losses = [line["val/calibration_loss"] for line in result.metrics if "val/calibration_loss" in line]
    assert len(losses) >= 3
    assert result.summary["val/calibration_loss"] == pytest.approx(min(losses))
    assert result.summary["prune/calibration_loss_learned"] == pytest.approx(min(losses), rel=1e-4)
    assert result.summary["prune/calibration_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_a_relaxed_method_reports_what_hardening_cost(study: Study) -> None:
    relaxed, hard = study(*SINKHORN).summary, study(*SINKHORN_STE).summary
    assert "prune/soft_hard_gap" in relaxed
    assert "prune/soft_hard_gap" not in hard
    lines = [line for line in study(*SINKHORN).metrics if "val/calibration_loss" in line]
    assert all(line["val/soft_calibration_loss"] > 0 for line in lines)


def test_quality_is_that_of_the_whole_model(study: Study) -> None:
    """Retained score, efficacy and reconstruction error from the files, by the public functions."""
    result = study(*REORDER, steps=6)
    parts = assemble(result.config)
    load_weights(dense_of(result) / "checkpoints" / "best.ckpt", ("model", parts.model))
    pruned = copy.deepcopy(parts.model)
    load_weights(result.run_dir / "checkpoints" / "best.ckpt", ("model", pruned))
    data = data_module(result.config, 0)
    hessians = {
        split: hessians_of(parts.model.eval(), torch.cat([inputs for inputs, _ in data.sample(split, 24)]))
        for split in ("train", "val")
    }
    with np.load(result.run_dir / "arrays" / "orders.npz") as arrays:
        orders = {name: torch.from_numpy(arrays[name]) for name in arrays}
    kept, default, best, total = 0.0, 0.0, 0.0, 0.0
    errors = {}
    for site in read_sites(parts.model):
        (reader,) = site.readers
        weight = parts.model.get_submodule(reader.module).weight.detach()
        other = pruned.get_submodule(reader.module).weight.detach()
        errors[reader.module] = reconstruction_error(weight, other, hessians["val"][reader.module])
        scores = weight.abs() * hessians["train"][reader.module].diagonal().sqrt()
        whole, identity = scores.double().sum().item(), torch.arange(site.num_items)
        ours, plain = (whole * retained(scores, order, n=2, m=4) for order in (orders[site.name], identity))
        gain = efficacy(scores, orders[site.name], n=2, m=4)
        kept, default, total = kept + ours, default + plain, total + whole
        best += plain + (ours - plain) / gain if gain else scores.topk(site.num_items // 2).values.sum().item()
    summary = result.summary
    assert summary["prune/retained"] == pytest.approx(kept / total, rel=1e-5)
    assert summary["prune/efficacy"] == pytest.approx((kept - default) / (best - default), rel=1e-3)
    assert summary["prune/efficacy"] != 0
    assert summary["prune/reconstruction_error"] == pytest.approx(sum(errors.values()) / len(errors), rel=1e-4)
    with np.load(result.run_dir / "arrays" / "sites.npz", allow_pickle=False) as arrays:
        found = dict(zip(arrays["layer"].tolist(), arrays["reconstruction_error"].tolist(), strict=True))
    assert found == {name: pytest.approx(error, rel=1e-4) for name, error in errors.items()}


def hessians_of(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        layer.register_forward_hook(
            lambda _, args, output, name=name: found.update({name: args[0].flatten(0, -2).mT @ args[0].flatten(0, -2)})
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


def test_sparsegpt_updates_the_dense_weights(study: Study) -> None:
    result = study(*SEARCH)
    parts = assemble(result.config)
    load_weights(dense_of(result) / "checkpoints" / "best.ckpt", ("model", parts.model))
    inputs = torch.cat([inputs for inputs, _ in data_module(result.config, 0).sample("train", 24)])
    hessians = hessians_of(parts.model.eval(), inputs)
    state = torch.load(result.run_dir / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    with np.load(result.run_dir / "arrays" / "orders.npz") as orders:
        for name, order in orders.items():
            weight = parts.model.get_submodule(name).weight
            expected, _ = sparsegpt(weight, hessians[name], n=2, m=4, order=torch.from_numpy(order), damping=0.01)
            torch.testing.assert_close(state[f"model.{name}.weight"], expected, rtol=1e-3, atol=1e-4)


def test_orders_of_a_run_are_another_ones_start(study: Study) -> None:
    source = study(*SEARCH)
    again = study(*FIXED, f"method.order={source.run_dir / 'arrays' / 'orders.npz'}", "task.pruner=sparsegpt", *ONE)
    assert again.code == 0, again.err
    for key in ("test/accuracy", "test/loss", "prune/calibration_loss", "prune/retained"):
        assert again.summary[key] == pytest.approx(source.summary[key], rel=1e-6)
    assert again.summary["test/loss_unpermuted"] == source.summary["test/loss_unpermuted"]
    assert again.summary["test/loss"] != again.summary["test/loss_unpermuted"]


# The model that is pruned


def test_a_model_that_learned_an_order_is_pruned_in_it(study: Study, runs: Path) -> None:
    """Split and order of items are the dense run's, whatever the seed of the pruning."""
    options = ("task=classify", "model=vit_nano", *IMAGES, "task.control=false", "num_threads=1", "seed=3")
    dense = train(runs, *options, "method=fixed", "method.order=random(1)", steps=60)
    result = study(*FIXED, f"task.dense={dense.run_dir}", "seed=1")
    assert result.code == 0, result.err
    assert result.summary["test/loss_dense"] == pytest.approx(dense.summary["test/loss"], rel=1e-6)
    assert result.summary["test/accuracy_dense"] == dense.summary["test/accuracy"]


def test_a_dense_run_that_does_not_fit(
    study: Study, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_of(study(*FIXED))
    text = dense_of(study(*FIXED_TEXT))
    options = ("task=classify", "model=vit_nano", *IMAGES, "task.control=false")
    by_image = train(runs, *options, "method=sort_ste", "method.scorer=mlp")

    def refusal(*words: str) -> str:
        error = refused(*words, runs=tmp_path / "new", capsys=capsys)
        assert not (tmp_path / "new").exists(), "nothing is written"
        return error

    assert "holds another model" in refusal(f"task.dense={dense}", "model.width=64")
    assert "holds another model" in refusal(f"task.dense={text}")
    assert "not a run directory" in refusal(f"task.dense={tmp_path / 'missing'}")
    assert "its order depends on the image" in refusal(f"task.dense={by_image.run_dir}")
    assert "that model reads 32 items, the data has 16" in refusal(
        f"task.dense={text}", *TEXT, "data.sequence_length=16"
    )
    pruned = study(*FIXED).run_dir
    assert f"task.dense={pruned}: no readable arrays/order.npz" in refusal(f"task.dense={pruned}")


def test_a_run_whose_dense_run_is_gone_is_one_line(
    study: Study, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_of(study(*FIXED)).rename(tmp_path / "moved")
    try:
        given = study(*FIXED, f"task.dense={dense}")
        run_dir = given.run_dir  # which is composed from the words, while that run is there
    finally:
        dense.rename(dense_of(study(*FIXED)))
    assert given.code == 0, given.err
    assert main("eval", [f"run={run_dir}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.sites=[mlp.fc3]"], "no site is called mlp.fc3; nearest valid choice: mlp.fc2"),
        (["task.sites=blocks.0.mlp.fc7"], "nearest valid choice: blocks.0.mlp.fc2"),
        (["task.sites=foldabel"], "nearest valid choice: foldable"),
        (["task.sites=[]"], "no sites are selected"),
        (["task.sites=[stream,mlp.fc1]", *ONE], "stream and blocks.0.mlp.fc1 share blocks.0.mlp.fc1"),
        (["task.n=1", "task.m=3"], "task.m=3: does not divide the 32 input channels of site blocks.0.attn.qkv; "),
        (["task.n=1", "task.m=3"], "nearest that do: 2, 4"),
        (["task.n=4"], "task.n=4: keeps all of every task.m=4"),
        (["task.n=5"], "task.n=5: keeps all of every task.m=4"),
        (["task.num_groups=3"], "task.num_groups=3: 3 groups of whole 4s do not divide the 32 channels"),
        (["task.num_groups=3"], "numbers of groups which do: 1, 2, 4, 8"),
        (["task.num_groups=null", "task.block_size=3"], "task.block_size=3: 10 groups"),
        (["task.within_heads=true", "task.n=16", "task.m=32", *ONE], "task.within_heads=True: 2 groups of whole 32s"),
        (["task.sites=foldable", "task.n=16", "task.m=32", *ONE], "task.sites=foldable: 2 groups of whole 32s"),
        (["method.order=[1,0]"], "method.order=[1, 0]: 2 items, the 1x8 grid has 8"),
        (["method.order=missing.npz"], "method.order=missing.npz: no such file"),
        (["task.pruner=wander"], "nearest valid choice: wanda"),
        (["task.num_samples=0"], "task.num_samples=0"),
        ([*TEXT, "task.sequence_length=33"], "task.sequence_length=33: exceeds data.sequence_length=32"),
        (["data=pydocs"], "model=vit_nano: reads image data, but data=pydocs is text"),
        (["task.pruner=sparsegpt", "task.damping=1e-12", "task.num_samples=1"], "raise the damping"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, study: Study, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(*FIXED)  # which trains the dense model
    assert message in refused(*words, runs=runs, capsys=capsys)


@pytest.mark.parametrize("word", ["task.sites=[mlp.fc3]", "task.m=5", "task.num_groups=3", "method.order=[1,0]"])
def test_what_cannot_be_pruned_is_refused_before_a_model_is_trained(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(word, runs=tmp_path / "runs", capsys=capsys)
    assert not (tmp_path / "runs").exists()


def test_an_order_file_of_other_sites_is_refused(
    study: Study, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "orders.npz"
    study(*FIXED)
    words = (f"method.order={path}", "task.sites=[blocks.0.mlp.fc2]")
    for array, message in (
        (np.arange(3), "num_groups=4 does not divide 3 items"),
        (np.arange(32), "32 items, site blocks.0.mlp.fc2 has 64"),
        (np.arange(64)[::-1], "crosses its 4 groups"),
        (np.zeros(64, dtype=int), "not a permutation"),
    ):
        np.savez(path, **{"blocks.0.mlp.fc2": array})
        assert message in refused(*words, runs=runs, capsys=capsys)
    np.savez(path, other=np.arange(64))
    assert "no readable `blocks.0.mlp.fc2` array" in refused(*words, runs=runs, capsys=capsys)


def test_weights_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(words_of())
    parts = assemble(config)
    with torch.no_grad():
        parts.model.blocks[1].mlp.fc2.weight[0, 0] = torch.nan
    task = parts.learner
    with pytest.raises(ConfigError, match=r"task=prune: the weights of layer blocks\.1\.mlp\.fc2 are not finite"):
        task.prepare(data_module(config, 0), {})


# Interruption


@pytest.mark.parametrize(
    "words",
    [REORDER, ("method=hybrid", "method.search=reconstruction_search", "method.num_polish_steps=3")],
    ids=" ".join,
)
def test_a_stopped_run_resumes_bit_for_bit(
    words: tuple[str, ...], study: Study, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study(*words, steps=6)
    assert whole.code == 0, whole.err
    dense = dense_of(whole)
    callbacks = permlab.run.trainer._callbacks
    monkeypatch.setattr(permlab.run.trainer, "_callbacks", lambda *parts: [*callbacks(*parts), StopAt(5)])
    stopped = Study(runs / "stopped")
    words = (*words, f"task.dense={dense}")
    first = stopped(*words, steps=6)
    assert first.code == 143, first.err
    assert not (first.run_dir / "DONE").exists()
    spent = torch.load(first.run_dir / "checkpoints" / "last.ckpt", weights_only=True)["seconds"]
    monkeypatch.setattr(permlab.run.trainer, "_callbacks", callbacks)
    stopped.found.clear()
    second = stopped(*words, steps=6)
    assert second.code == 0, second.err
    assert second.summary["prune/seconds"] > spent, "time before the interruption counts"
    assert second.log == whole.log
    clock = ("prune/seconds", "train/seconds", "prune/peak_memory_mib")
    assert {k: v for k, v in second.summary.items() if k not in clock} == {
        k: v for k, v in whole.summary.items() if k not in clock
    }
    for name in ("best", "picked", "last"):
        ours, theirs = (
            torch.load(run.run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
            for run in (second, whole)
        )
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
