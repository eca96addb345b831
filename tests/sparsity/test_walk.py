"""Block after block: against one pass with hooks, and against a model that is pruned and run again for every block."""

import copy
from functools import partial

import pytest
import torch
from tiny_models import BUILDERS, inputs_of, tiny
from torch import nn

from permlab.sparsity.block import block_names
from permlab.sparsity.calibrate import collect
from permlab.sparsity.offload import Waiting
from permlab.sparsity.run_model import run_model
from permlab.sparsity.walk import walk


def linears(model: nn.Module) -> dict[str, nn.Module]:
    inside = tuple(f"{path}." for path in block_names(model))
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, nn.Linear) and name.startswith(inside)}


def halved(model: nn.Module, path: str) -> dict[str, torch.Tensor]:
    """Other weights for the layers of a block: every second input channel is gone."""
    weights = {}
    for name, module in linears(model).items():
        if name.startswith(f"{path}."):
            weights[f"{name}.weight"] = module.weight.detach() * (torch.arange(module.in_features) % 2)
    return weights


@pytest.mark.parametrize("name", BUILDERS)
def test_behind_dense_blocks_it_finds_what_one_pass_finds(name: str) -> None:
    model = tiny(name)
    batches, order = [inputs_of(model) for _ in range(2)], []
    expected = collect(partial(run_model, model), linears(model), batches)
    found = {}

    def visit(path, statistics):
        order.append(path)
        found.update(statistics)

    before = {key: value.clone() for key, value in model.state_dict().items()}
    outputs = {}
    forward = partial(run_model, model)
    walk(forward, model, block_names(model)[::-1], linears(model), batches, visit, end=outputs.__setitem__)
    assert all(torch.equal(outputs[index], forward(batch)) for index, batch in enumerate(batches))
    assert sorted(order) == sorted(block_names(model))
    assert set(found) == set(expected)
    for layer, statistics in expected.items():
        assert torch.equal(found[layer].hessian, statistics.hessian)
        assert found[layer].num_tokens == statistics.num_tokens
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["timm", "vim", "transformers_llama", "qwen_vl"])
def test_behind_changed_blocks_it_finds_what_the_changed_model_is_given(name: str) -> None:
    """The model is run as a whole, with the blocks before a layer's own changed, as often as there are blocks."""
    model = tiny(name)
    batches = [inputs_of(model) for _ in range(2)]
    found, order = {}, []

    def visit(path, statistics):
        order.append(path)
        found.update(statistics)
        return halved(model, path)

    outputs, forward = {}, partial(run_model, model)
    walk(forward, model, block_names(model), linears(model), batches, visit, behind=True, end=outputs.__setitem__)
    changed = copy.deepcopy(model)
    for path in order:
        inside = {layer: module for layer, module in linears(changed).items() if layer.startswith(f"{path}.")}
        expected = collect(partial(run_model, changed), inside, batches)
        for layer, statistics in expected.items():
            torch.testing.assert_close(found[layer].hessian, statistics.hessian, rtol=1e-12, atol=1e-12)
        changed.load_state_dict(halved(model, path), strict=False)
    assert not any(torch.equal(forward(batch), outputs[index]) for index, batch in enumerate(batches))
    for index, batch in enumerate(batches):
        torch.testing.assert_close(outputs[index], run_model(changed, batch))


def test_a_block_in_half_precision_computes_in_single_and_activations_wait_in_files() -> None:
    model = tiny("llama_text").bfloat16()
    batches = [inputs_of(model) for _ in range(2)]
    wide = copy.deepcopy(model).float()
    expected = collect(wide, linears(wide), batches)
    found, waiting = {}, Waiting(in_memory=0)

    def visit(path, statistics):
        assert waiting.num_bytes == 0
        found.update(statistics)

    outputs = {}
    walk(model, model, block_names(model), linears(model), batches, visit, waiting=waiting, end=outputs.__setitem__)
    torch.testing.assert_close(outputs[1].float(), wide(batches[1]), rtol=5e-2, atol=5e-2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for layer, statistics in expected.items():
        assert found[layer].hessian.dtype == torch.float32
        torch.testing.assert_close(found[layer].norm, statistics.norm, rtol=2e-2, atol=1e-3)
    assert len(waiting) == len(batches), "only what the last block gives is left"


def test_what_is_wrong_is_named() -> None:
    model = tiny("llama_text")
    batch = inputs_of(model)
    with pytest.raises(ValueError, match="the calibration set is empty"):
        walk(model, model, block_names(model), linears(model), [], lambda *_: None)
    with pytest.raises(ValueError, match="layer head was not called"):
        walk(model, model, block_names(model), {"head": model.head}, [batch], lambda *_: None)
    model.network.layers[0].self_attn.v_proj.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"inputs of layer network.layers.0.self_attn.o_proj are not finite"):
        walk(model, model, block_names(model), linears(model), [batch], lambda *_: None)
    assert "forward" not in model.network.layers[0].__dict__
