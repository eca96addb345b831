"""Pruning block after block, against a model that is run as a whole again for every block."""

import copy

import pytest
import torch
from prune_tasks import ONE, TEXT, task_of
from torch import Tensor, nn

from permlab.sparsity.importance import sparsegpt
from permlab.sparsity.search import deal_and_match
from permlab.task.prune.learner import PruneLearner

SEQUENTIAL = "task.calibrate=sequential"


def inputs_of_layers(task: PruneLearner, model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """What layers are given on the calibration samples, all tokens one below the other."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].detach().flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for inputs, _ in task.calibration:
            model.eval()(inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def pruned_by_hand(task: PruneLearner, orders: dict[str, Tensor] | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Block after block as in Wanda's and SparseGPT's programs; orders that are not given are dealt and matched."""
    model, used = copy.deepcopy(task.model), {}
    num_blocks = max(int(part) for site in task.method.sites for part in site.name.split(".") if part.isdigit()) + 1
    for index in range(num_blocks):
        sites = [site for site in task.method.sites if f".{index}." in site.name]
        names = [reader.module for site in sites for reader in site.readers]
        given = inputs_of_layers(task, model, names)
        for site in sites:
            weights = [model.get_parameter(f"{reader.module}.weight").data for reader in site.readers]
            xs = [given[reader.module] for reader in site.readers]
            norms = [x.square().sum(0).sqrt() for x in xs]
            if orders is None:
                scores = torch.cat([w.double().abs() * norm for w, norm in zip(weights, norms, strict=True)])
                order = deal_and_match(scores.float(), n=2, m=4)
            else:
                order = orders[site.name]
            used[site.name] = order
            for weight, x, norm in zip(weights, xs, norms, strict=True):
                if task.task.pruner == "sparsegpt":
                    hessian = (x.mT @ x).float()
                    weight.copy_(sparsegpt(weight.clone(), hessian, n=2, m=4, order=order, damping=0.01)[0])
                    continue
                for row in weight:
                    groups = (row.double().abs() * norm)[order].view(-1, 4)
                    worst = groups.argsort(dim=1, stable=True)[:, :2] + 4 * torch.arange(len(groups))[:, None]
                    row[order[worst.flatten()]] = 0
    return model, used


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("fixed", ("task.pruner=wanda",)),
        ("fixed", ("task.pruner=sparsegpt", "model=llama_nano")),
        ("deal_and_match", (*TEXT, *ONE)),
        ("sinkhorn_ste", ("task.pruner=wanda", "model=llama_nano", *ONE)),
        ("sinkhorn_ste", ("task.pruner=sparsegpt", *ONE)),
    ],
)
def test_a_block_is_pruned_behind_pruned_ones(method: str, words: tuple[str, ...]) -> None:
    task = task_of(f"method={method}", SEQUENTIAL, *words)
    dense = copy.deepcopy(task.model.state_dict())
    orders = None if method == "deal_and_match" else task.method.orders()
    expected, used = pruned_by_hand(task, orders)
    weights = task._prune(task.method.orders())
    assert all(torch.equal(value, dense[name]) for name, value in task.model.state_dict().items())
    assert all(torch.equal(order, task.method.orders()[name]) for name, order in used.items())
    assert set(weights) == {f"{r.module}.weight" for site in task.method.sites for r in site.readers}
    for name, weight in weights.items():
        other = expected.get_parameter(name)
        assert ((weight != 0) == (other != 0)).float().mean() > 0.999, name
        torch.testing.assert_close(weight.norm(), other.norm(), rtol=1e-3, atol=0)
    result = task.finish(lambda: {})
    with torch.no_grad():
        inputs = task.calibration[0][0]
        torch.testing.assert_close(task.predict(inputs), expected(inputs), rtol=0.05, atol=0.05)
    assert result.summary["prune/calibration_loss"] > 0


def test_it_differs_from_one_dense_pass_behind_the_first_block_alone() -> None:
    dense, sequential = (task_of("method=fixed", word) for word in ("task.calibrate=dense", SEQUENTIAL))
    sequential.model.load_state_dict(dense.model.state_dict())
    weights = [task._prune_on_a_walk(task.method.orders()) for task in (dense, sequential)]
    same = {name: torch.equal(weight, weights[1][name]) for name, weight in weights[0].items()}
    assert same["blocks.0.attn.qkv.weight"]
    assert same["blocks.0.mlp.fc2.weight"]
    assert not same["blocks.1.attn.qkv.weight"]
    assert not same["blocks.1.mlp.fc2.weight"]


def test_an_order_of_several_blocks_is_searched_on_the_dense_model() -> None:
    words = ("method=deal_and_match", "task.sites=foldable", *ONE)
    tasks = [task_of(*words, word) for word in ("task.calibrate=dense", SEQUENTIAL)]
    for parameter, other in zip(*(task.model.parameters() for task in tasks), strict=True):
        assert torch.equal(parameter, other)
    dense, sequential = (task.method.orders() for task in tasks)
    assert torch.equal(dense["stream"], sequential["stream"])
    assert torch.equal(dense["blocks.0.mlp.fc2"], sequential["blocks.0.mlp.fc2"])
    assert not torch.equal(dense["blocks.1.mlp.fc2"], sequential["blocks.1.mlp.fc2"])


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("calibrate", ["dense", "sequential"])
def test_what_is_pruned_on_the_way_is_what_is_pruned_at_the_end(pruner: str, calibrate: str) -> None:
    """And so is its loss, which is then not computed again."""
    words = (f"task.pruner={pruner}", f"task.calibrate={calibrate}", "model=llama_nano")
    task = task_of("method=deal_and_match", *words)
    orders = task.method.orders()
    ready = task._prune(orders)
    assert ready is task._ready[1]
    again = task._prune_on_a_walk(orders)
    assert all(torch.equal(weight, again[name]) for name, weight in ready.items())
    assert task._losses_of(orders, orders)[0] == pytest.approx(task._pruned_loss(ready), rel=1e-5)


# Memory


@pytest.mark.parametrize("method", ["fixed", "sinkhorn_ste"])
@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_hessians_stay_only_where_weights_will_be_updated_by_them(method: str, pruner: str) -> None:
    task = task_of(f"method={method}", f"task.pruner={pruner}", "model=llama_nano")
    held = [not part.is_released for layers in task.layers.values() for part in layers.statistics]
    assert all(held) if (method, pruner) == ("sinkhorn_ste", "sparsegpt") else not any(held)
    q, k, _ = task.layers["network.layers.0.self_attn.qkv"].statistics
    assert q is k, "they have the same input"


def test_weights_and_scores_by_item_are_kept_where_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small = task_of("method=sinkhorn_ste")
    assert all(layers.items is layers.items for layers in small.layers.values())
    monkeypatch.setattr("permlab.task.prune.calibrated.KEPT_BYTES", 0)
    large = task_of("method=sinkhorn_ste")
    large.model.load_state_dict(small.model.state_dict())
    assert not any(layers.items is layers.items for layers in large.layers.values())
    orders = small.method.orders()
    for name, value in small._hard_values(orders).items():
        assert torch.equal(value, large._hard_values(orders)[name])
