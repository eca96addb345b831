import itertools
import logging

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from permlab.config.build import build
from permlab.config.schema import CONF
from permlab.data.spec import DataSpec
from permlab.model.llama import Llama

IMAGES = DataSpec(kind="image", num_classes=5, channels=2, height=4, width=6)
TEXT = DataSpec(kind="text", num_classes=40, channels=1, height=1, width=12)
POSITIONS = ("slot", "item", "none")


def llama(spec=IMAGES, **changes):
    options = {"patch_size": 2 if spec.kind == "image" else 1, "width": 16, "depth": 2, "num_heads": 4}
    options |= {"num_kv_heads": 2, "mlp_width": 24, "norm_eps": 1e-5, "rope_theta": 100.0, "rope_factor": 1.0}
    options |= {"position": "slot", "readout": "last", "tie_embeddings": False}
    return Llama(spec, **(options | changes))


def scatter(model):
    """Weights large enough for every part to show."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def transformers_model(rope, *, tied=False):
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=tied, rope_parameters=rope,
        max_position_embeddings=131072, attn_implementation="eager",
    )  # fmt: skip
    return scatter(LlamaForCausalLM(config))


def our_names(state):
    """transformers' state dict under our names."""
    renamed = {"model.embed_tokens.weight": "embedding.weight", "lm_head.weight": "head.weight"}
    return {renamed.get(key, key.replace("model.", "network.", 1)): value for key, value in state.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_on_tokens_it_is_transformers_own_model(factor, tied):
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if factor != 1:
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 8192}
    oracle = transformers_model(rope, tied=tied)
    model = llama(TEXT, tie_embeddings=tied, rope_theta=500000.0, rope_factor=factor)
    model.load_state_dict(our_names(oracle.state_dict()))
    tokens = torch.randint(40, (3, 12))
    logits = model(tokens)
    assert logits.shape == (3, 12, 40)
    torch.testing.assert_close(logits, oracle(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_rope_factor_stretches_wavelengths_beyond_8192_slots_only():
    # Heads four wide rotate at two wavelengths: 2 pi, and 2 pi times the root of theta.
    for theta, stretch in ((1e4, 1.0), (1e10, 8.0)):
        plain, stretched = (llama(TEXT, rope_theta=theta, rope_factor=factor) for factor in (1.0, 8.0))
        ratio = plain.network.rotary_emb.inv_freq / stretched.network.rotary_emb.inv_freq
        torch.testing.assert_close(ratio, torch.tensor([1.0, stretch]))


@pytest.mark.parametrize("position", ["item", "none"])
def test_without_rotation_a_position_is_nothing_but_the_causal_mask(position):
    oracle = transformers_model({"rope_type": "default", "rope_theta": 100.0}).model
    model = llama(position=position)
    state = {key: value for key, value in our_names(oracle.state_dict()).items() if "embed_tokens" not in key}
    model.network.load_state_dict(state)
    items = torch.randn(3, 6, 16)
    # The mask has to be given: position ids of zero alone are read as six packed sequences.
    still = torch.zeros(3, 6, dtype=torch.int64)
    mask = torch.ones(3, 6, dtype=torch.int64)
    expected = oracle(inputs_embeds=items, position_ids=still, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(model.encode(items), expected[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_slot_depends_on_all_slots_before_it_and_on_none_after(position):
    model = scatter(llama(TEXT, position=position))
    items = torch.randn(1, 12, 16, requires_grad=True)
    features = model.encode(items)
    for slot in (0, 5, 11):
        (grad,) = torch.autograd.grad(features[0, slot].square().sum(), items, retain_graph=True)
        reached = grad[0].abs().amax(-1)
        assert (reached[: slot + 1] > 0).all()
        assert (reached[slot + 1 :] == 0).all()


@pytest.mark.parametrize(("position", "readout"), [*itertools.product(POSITIONS, ["last", "mean"])])
def test_the_logits_depend_on_the_order(position, readout):
    model = scatter(llama(position=position, readout=readout))
    items = model.embed(torch.rand(3, 2, 4, 6))
    # The last item stays where it is: what the last slot sees is the same set.
    change = model.read(items) - model.read(items[:, [4, 2, 0, 1, 3, 5]])
    assert change.abs().max() > 1e-3


def test_one_block_without_rotation_sees_the_items_before_the_last_as_a_set():
    model = scatter(llama(position="none", depth=1))
    items = model.embed(torch.rand(3, 2, 4, 6))
    torch.testing.assert_close(model.read(items[:, [4, 2, 0, 1, 3, 5]]), model.read(items), rtol=1e-4, atol=1e-4)


def test_the_item_table_travels_with_the_item():
    model, images = scatter(llama(position="item")), torch.rand(3, 2, 4, 6)
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(3, 6, 8)
    torch.testing.assert_close(model.embed(images), model.embedding(patches) + model.position_table)


@pytest.mark.parametrize("readout", ["last", "mean"])
def test_the_readout_of_images(readout):
    model, items = scatter(llama(readout=readout)), torch.randn(3, 6, 16)
    features = model.network(inputs_embeds=items).last_hidden_state
    expected = features[:, 5] if readout == "last" else sum(features.unbind(1)) / 6
    torch.testing.assert_close(model.encode(items), expected)


def test_grouped_heads_are_full_heads_with_shared_keys_and_values():
    grouped, full = scatter(llama(num_kv_heads=2)), llama(num_kv_heads=4)
    state = grouped.state_dict()
    for key, value in state.items():
        if "k_proj" in key or "v_proj" in key:
            assert value.shape == (2 * 4, 16)
            state[key] = value.reshape(2, 4, 16).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    images = torch.rand(3, 2, 4, 6)
    torch.testing.assert_close(grouped(images), full(images), rtol=1e-4, atol=1e-4)


def test_a_shorter_text_is_the_beginning_of_a_longer_one():
    for position in POSITIONS:
        model, tokens = scatter(llama(TEXT, position=position)), torch.randint(40, (2, 12))
        torch.testing.assert_close(model(tokens[:, :7]), model(tokens)[:, :7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_are_one_parameter(tied):
    model = llama(TEXT, tie_embeddings=tied)
    assert (model.head.weight is model.embedding.weight) == tied
    assert sum(parameter.shape == (40, 16) for parameter in model.parameters()) == (1 if tied else 2)


@pytest.mark.parametrize("training", [True, False])
def test_no_cache_is_built(training):
    model = llama().train(training)
    assert model.network(inputs_embeds=torch.randn(2, 6, 16)).past_key_values is None


@pytest.mark.parametrize("spec", [IMAGES, TEXT])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_transformers_has_nothing_to_complain_about(spec, factor):
    complaints = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = complaints.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        model = llama(spec, rope_factor=factor)
        model(torch.rand(2, 2, 4, 6) if spec is IMAGES else torch.randint(40, (2, 12)))
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in complaints] == []


@pytest.mark.parametrize(
    ("name", "vocabulary", "num_parameters"),
    [
        ("llama_3_2_1b", 128256, 1_235_814_400),
        ("llama_3_2_3b", 128256, 3_212_749_824),
        ("llama_3_1_8b", 128256, 8_030_261_248),
        ("llama_2_7b", 32000, 6_738_415_616),
    ],
)
def test_presets_have_the_published_sizes(name, vocabulary, num_parameters):
    with initialize_config_dir(str(CONF / "model"), version_base="1.3"):
        settings = OmegaConf.to_container(compose(name))
    spec = DataSpec(kind="text", num_classes=vocabulary, channels=1, height=1, width=2048)
    with torch.device("meta"):
        model = build("model", settings | {"patch_size": 1}, spec)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


@pytest.mark.parametrize(("spec", "position"), [*itertools.product([IMAGES, TEXT], POSITIONS)])
def test_gradients_reach_every_parameter(spec, position):
    model = llama(spec, position=position)
    model(torch.rand(3, 2, 4, 6) if spec is IMAGES else torch.randint(40, (3, 12))).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("position", POSITIONS)
def test_bfloat16(position):
    model, images = llama(position=position), torch.rand(3, 2, 4, 6)
    expected = model(images)
    result = model.bfloat16()(images.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, atol=0.05, rtol=0.05)


def test_a_cast_to_bfloat16_leaves_the_angles_of_late_slots_alone():
    model = llama(TEXT, width=64)
    late = torch.tensor([[4000]])
    expected = model.network.rotary_emb(torch.zeros(1), late)
    for half, single in zip(model.bfloat16().network.rotary_emb(torch.zeros(1), late), expected, strict=True):
        torch.testing.assert_close(half, single, rtol=0, atol=0)


@pytest.mark.parametrize("spec", [IMAGES, TEXT])
def test_the_seed_fixes_the_weights(spec):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(llama(spec, position="item").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_position_table_is_left_out_of_weight_decay():
    model = llama(position="item")
    marked = {name for name, parameter in model.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert marked == {"position_table"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 3}, "num_heads=3 does not divide width=16"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"num_heads": 16, "num_kv_heads": 16}, "an odd head width of 1 cannot be rotated"),
        ({"rope_factor": 0.5}, "rope_factor=0.5 is below 1"),
        ({"patch_size": 3}, "3 does not divide a 4x6 image"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        llama(**change)
