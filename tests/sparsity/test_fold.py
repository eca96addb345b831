import copy
import dataclasses
import itertools

import pytest
import torch
from pruned_models import case, prune
from tiny_models import BUILDERS, inputs_of, outputs, random_order, tiny
from torch import nn
from transformers import LlamaForCausalLM

from permlab.sparsity.block import block_names
from permlab.sparsity.fold import GatheredLinear, find_gathers, fold, install_gather
from permlab.sparsity.interop import as_causal_lm
from permlab.sparsity.pattern import read_patterns, verify_pattern
from permlab.sparsity.site import Move, Reader, WeightSite, read_sites

CHOICES = {
    "all": {},
    "independent": {"coupling": "independent"},
    "within_heads": {"within_heads": True},
    "foldable": {"select": "foldable"},
    "stream": {"select": "stream"},
}


def fold_at_random(model, sites):
    orders = {site.name: random_order(site) for site in sites}
    return orders, fold(model, sites, orders)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("name", "choice"), list(itertools.product(BUILDERS, CHOICES)))
def test_folding_changes_nothing_but_the_weights(name, choice):
    model = tiny(name)
    inputs, before = inputs_of(model), snapshot(model)
    expected = outputs(model, inputs)
    sites = read_sites(model, **CHOICES[choice])
    _, modes = fold_at_random(model, sites)
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-9)
    assert modes == {site.name: "folded" if site.moves else "gather" for site in sites}
    after = model.state_dict()
    assert {key for key in after if key not in before} == {
        f"{reader.module}.input_order" for site in sites if not site.moves for reader in site.readers
    }
    for site in sites:
        for reader in site.readers:
            assert not torch.equal(after[f"{reader.module}.weight"], before[f"{reader.module}.weight"])


@pytest.mark.parametrize("name", BUILDERS)
def test_every_projection_folds_and_nothing_is_gathered(name):
    model = tiny(name)
    inputs = inputs_of(model)
    sites = read_sites(model, select="foldable")
    orders = {site.name: random_order(site) for site in sites}
    # Masks in the permuted order of the model as it was, and the same masks folded: one model.
    pruned = prune(model, [site for site in sites if site.num_items % 4 == 0], orders, n=2, m=4)
    expected = outputs(pruned, inputs)
    assert not torch.allclose(expected, outputs(model, inputs))
    assert set(fold(pruned, sites, orders).values()) == {"folded"}
    assert find_gathers(pruned) == {}
    torch.testing.assert_close(outputs(pruned, inputs), expected, rtol=0, atol=1e-10)
    verify_pattern(pruned.state_dict(), read_patterns([s for s in sites if s.num_items % 4 == 0], n=2, m=4))
    inside = tuple(f"{path}." for path in block_names(model))
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {reader.module for site in sites for reader in site.readers} == {
        path for path in linear if path.startswith(inside)
    }


def test_a_text_model_with_every_projection_pruned_opens_in_transformers(tmp_path):
    setting = case("llama_tied", select="foldable")
    model, inputs = setting["pruned"], setting["inputs"]
    expected = outputs(model, inputs)
    fold(model, setting["sites"], setting["orders"])
    as_causal_lm(model).save_pretrained(tmp_path)
    restored = LlamaForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    torch.testing.assert_close(outputs(restored, inputs), expected, rtol=1e-4, atol=1e-5)
    projections = [name for name in restored.state_dict() if name.endswith("_proj.weight")]
    assert len(projections) == 14
    verify_pattern(restored.state_dict(), {name: {"n": 2, "m": 4} for name in projections})


@pytest.mark.parametrize(
    "name", ["vit", "vim", "llama_text", "llama_image", "timm_norms", "transformers_llama", "qwen_vl"]
)
def test_every_move_is_needed(name):
    """Leaving any one of them behind changes the output, so none is there for show and none is tested by accident."""
    original = tiny(name)
    inputs = inputs_of(original)
    expected = outputs(original, inputs)
    for site in read_sites(original, select="foldable"):
        width = site.num_items // site.num_heads
        order = torch.arange(site.num_items).view(-1, width).roll(1, dims=1).flatten()
        for left in site.moves:
            model = copy.deepcopy(original)
            moves = tuple(move for move in site.moves if move != left)
            if moves:
                fold(model, [dataclasses.replace(site, moves=moves)], {site.name: order})
                assert (outputs(model, inputs) - expected).abs().max() > 1e-7, left


def test_the_columns_are_in_the_order_of_the_site():
    model = tiny("transformers_llama")
    before = snapshot(model)
    sites = read_sites(model, within_heads=True)
    orders, _ = fold_at_random(model, sites)
    for site in sites:
        for reader in site.readers:
            old, new = before[f"{reader.module}.weight"], model.get_parameter(f"{reader.module}.weight")
            moved = [move.tensor for other in sites for move in other.moves]
            if f"{reader.module}.weight" not in moved:
                assert torch.equal(site.to_items(new), site.to_items(old)[:, orders[site.name]])


# Rotary embedding: the text of arXiv:2601.22980 has the input of the output projection bind Wq, Wk and Wv.


def permute_within_heads(model, layers, order):
    """Rows of these projections of the first block, in every head alike, and columns of the output projection."""
    attention = model.network.layers[0].self_attn
    with torch.no_grad():
        for layer in layers:
            weight = getattr(attention, layer).weight
            weight.copy_(weight.view(-1, 4, 16)[:, order].flatten(0, 1))
        columns = attention.o_proj.weight.view(16, -1, 4)[..., order].flatten(1)
        attention.o_proj.weight.copy_(columns)


def test_under_rotation_the_rows_of_queries_and_keys_must_stay():
    order = torch.tensor([1, 3, 0, 2])
    for name, layers, is_same in (
        ("llama_text", ["v_proj"], True),
        ("llama_text", ["q_proj", "k_proj", "v_proj"], False),
        # Without rotation a common order of queries and keys cancels in their product: harmless, and useless.
        ("llama_image", ["q_proj", "k_proj", "v_proj"], True),
    ):
        model = tiny(name)
        inputs = inputs_of(model)
        expected = outputs(model, inputs)
        permute_within_heads(model, layers, order)
        change = (outputs(model, inputs) - expected).abs().max()
        assert change < 1e-9 if is_same else change > 1e-3


def test_query_heads_of_one_group_share_their_order():
    model = tiny("llama_text")
    (site, _) = read_sites(model, select="self_attn.o_proj", within_heads=True)
    before = model.network.layers[0].self_attn.o_proj.weight.clone()
    order = torch.tensor([3, 2, 1, 0, 4, 6, 5, 7])
    fold(model, [site], {site.name: order})
    # Query heads 0 and 1 read key-value head 0; 2 and 3 read 1.
    columns = [3, 2, 1, 0, 7, 6, 5, 4, 8, 10, 9, 11, 12, 14, 13, 15]
    assert torch.equal(model.network.layers[0].self_attn.o_proj.weight, before[:, columns])


# Gathers


def test_parts_of_a_fused_layer_have_their_own_orders():
    model = tiny("vit")
    inputs = inputs_of(model)
    expected, before = outputs(model, inputs), snapshot(model)
    sites = read_sites(model, select=["blocks.0.attn.k"], coupling="independent")
    orders, _ = fold_at_random(model, sites)
    layer = model.blocks[0].attn.qkv
    still = torch.arange(16)
    assert torch.equal(layer.input_order, torch.stack([still, orders["blocks.0.attn.k"], still]))
    assert layer.splits == (16, 16, 16)
    assert torch.equal(layer.weight[:16], before["blocks.0.attn.qkv.weight"][:16])
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-9)
    (site, *_) = read_sites(model, select=["attn.qkv"])
    assert site.readers[0].module == "blocks.0.attn.qkv"


@pytest.mark.parametrize("bias", [True, False])
def test_a_gathered_layer_against_a_loop(bias):
    linear, x = nn.Linear(4, 5, bias=bias), torch.randn(2, 3, 4)
    orders = torch.stack([torch.randperm(4) for _ in range(3)])
    layer = GatheredLinear(linear, orders, splits=(1, 2, 2))
    for row, part in enumerate((0, 1, 1, 2, 2)):
        columns = sum(linear.weight[row, slot] * x[..., orders[part, slot]] for slot in range(4))
        torch.testing.assert_close(layer(x)[..., row], columns + (linear.bias[row] if bias else 0))


def test_a_gathered_layer_keeps_its_parameters_and_their_names():
    linear = nn.Linear(4, 3).eval()
    layer = GatheredLinear(linear, torch.tensor([1, 0, 3, 2]))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert set(layer.state_dict()) == {"weight", "bias", "input_order"}
    assert not layer.training
    assert layer.half().input_order.dtype == torch.int64
    x = torch.randn(2, 4, requires_grad=True)
    layer.float()(x).sum().backward()
    torch.testing.assert_close(x.grad[0], linear.weight.sum(0)[[1, 0, 3, 2]])


def test_the_identity_needs_no_gather():
    model = tiny("vit")
    before = snapshot(model)
    sites = read_sites(model)
    modes = fold(model, sites, {site.name: torch.arange(site.num_items) for site in sites})
    assert set(modes.values()) == {"folded"}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["llama_tied", "transformers_tied"])
@pytest.mark.parametrize("choice", ["all", "stream"])
def test_tied_embeddings_stay_tied(name, choice):
    model = tiny(name)
    fold_at_random(model, read_sites(model, **CHOICES[choice]))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embedding, head = (
        ("embedding.weight", "head.weight") if name == "llama_tied" else ("model.embed_tokens.weight", "lm_head.weight")
    )
    assert parameters[embedding] is parameters[head]


# Refusals


def refused(model, sites, orders, message):
    """Folding is refused, and has changed nothing."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fold(model, sites, orders)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_bad_orders_are_refused():
    model = tiny("llama_text")
    sites = read_sites(model, select="foldable")
    good = {site.name: random_order(site) for site in sites}
    heads, down = "network.layers.1.self_attn.o_proj", "network.layers.0.mlp.down_proj"
    swapped = torch.tensor([4, 1, 2, 3, 0, 5, 6, 7])
    repeated = torch.zeros(24, dtype=torch.int64)
    refused(model, sites, {**good, heads: swapped}, f"the order of site {heads} leaves its 2 heads")
    refused(model, sites, {**good, down: repeated}, f"site {down}: not a permutation of 0..23")
    refused(model, sites, {**good, down: torch.arange(16)}, f"site {down} has 24 items")
    refused(model, sites, {key: good[key] for key in good if key != down}, f"site {down} has no order")
    refused(model, sites, {**good, "head": swapped}, "the order head belongs to no site")


def test_two_orders_of_one_thing_are_refused():
    model = tiny("vit")
    # The stream permutes the columns that a gather would permute again.
    sites = read_sites(model, select=["stream", "blocks.1.mlp.fc1"])
    orders = {site.name: torch.randperm(16) for site in sites}
    refused(
        model, sites, orders, r"sites stream and blocks\.1\.mlp\.fc1 both permute the columns of blocks\.1\.mlp\.fc1"
    )
    sites = [*read_sites(model, select=["attn.qkv"]), *read_sites(model, select=["attn.v"], coupling="independent")]
    orders = {site.name: torch.randperm(16) for site in sites}
    refused(model, sites, orders, r"both permute the columns of blocks\.0\.attn\.qkv")
    # One layer under two names, as where blocks share their weights.
    model.blocks[1].mlp = model.blocks[0].mlp
    sites = read_sites(tiny("vit"), select=["mlp.fc2"])
    refused(model, sites, {site.name: torch.randperm(24) for site in sites}, "both permute")


def test_a_model_is_folded_once():
    model = tiny("vit")
    sites = read_sites(model, select=["mlp.fc1"])
    orders, _ = fold_at_random(model, sites)
    refused(model, sites, orders, r"blocks\.0\.mlp\.fc1 has a gather already; a model is folded once")


def test_what_is_no_linear_layer_is_refused():
    model = tiny("vit")
    site = WeightSite("x", "x", (Reader("blocks.0.norm1", None),), 16, (Move("norm.weight", 0),))
    refused(model, [site], {"x": torch.randperm(16)}, r"blocks\.0\.norm1 is a LayerNorm, not a Linear")
    site = dataclasses.replace(site, readers=(Reader("blocks.9.mlp", None),))
    refused(model, [site], {"x": torch.randperm(16)}, r"Vit has no layer blocks\.9\.mlp")
    for path, message in (("norm", "norm is a LayerNorm"), ("nose", "Vit has no layer nose")):
        with pytest.raises(ValueError, match=message):
            install_gather(model, path, torch.randperm(16))


def test_bad_gathers_are_refused():
    linear = nn.Linear(4, 6)
    for order, splits, message in (
        (torch.tensor([0, 1, 2]), None, r"of shape \(4,\), got \(3,\)"),
        (torch.tensor([[0, 1, 2, 3]] * 2), None, r"of shape \(4,\), got \(2, 4\)"),
        (torch.tensor([[0, 1, 2, 3]] * 2), (3, 4), r"splits=\[3, 4\] are not the 6 rows"),
        (torch.tensor([0, 1, 2, 2]), None, "not a permutation"),
    ):
        with pytest.raises(ValueError, match=message):
            GatheredLinear(linear, order, splits=splits)
