"""Longformer against full attention under a mask, transformers' whole model, and what order should do to it."""

import itertools

import pytest
import torch
from runs import configure
from torch import Tensor
from torch.nn import functional
from transformers import LongformerConfig, LongformerModel
from transformers.models.longformer.modeling_longformer import LongformerEncoder

from permlab.config.build import build
from permlab.data.spec import DataSpec
from permlab.model.longformer import Block, Longformer

IMAGENET = DataSpec(kind="image", num_classes=1000, channels=3, height=224, width=224)
SIZE = {"width": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5, "window": 4, "dropout": 0.0}
# Transformers' softmax is in single precision whatever the model is in.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def longformer(grid: tuple[int, int] = (3, 5), **changes) -> Longformer:
    spec = DataSpec(kind="image", num_classes=5, channels=2, height=2 * grid[0], width=2 * grid[1])
    return Longformer(spec, **({"patch_size": 2, **SIZE, "position": "none", "readout": "cls"} | changes)).eval()


def disturbed(model: Longformer) -> Longformer:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return model.double()


def items_of(model: Longformer, count: int = 2) -> Tensor:
    return model.embed(torch.rand(count, 2, 2 * model.height, 2 * model.width, dtype=torch.float64)).detach()


# Sizes


@pytest.mark.parametrize(
    ("preset", "count"), [("longformer_ti", 7_047_016), ("longformer_s", 27_364_072), ("longformer_b", 107_811_304)]
)
def test_parameter_counts_are_those_of_transformers_encoder(preset: str, count: int) -> None:
    settings = configure([f"model={preset}"])["model"] | {"patch_size": 16}
    d = settings["width"]
    config = LongformerConfig(
        hidden_size=d, num_attention_heads=settings["num_heads"], intermediate_size=4 * d, attention_window=[14] * 12
    )
    with torch.device("meta"):
        model, encoder = build("model", settings, IMAGENET), LongformerEncoder(config)
    found, theirs = (sum(parameter.numel() for parameter in part.parameters()) for part in (model, encoder))
    assert settings["window"] == 14
    # Without biases of 2 x 12 key projections; patches, class token, table, two norms and a head besides.
    assert found == count == theirs - 24 * d + (3 * 256 + 1) * d + 197 * d + 4 * d + 1000 * (d + 1)


# Attention


def layer(block: Block, x: Tensor, num_heads: int, window: int) -> Tensor:
    """A block by full attention under a mask, `[t, d]`: a band and the first token, which hears by its own weights."""
    attention, length = block.attention.self, len(x)
    place = torch.arange(length)
    is_heard = (place - place[:, None]).abs() <= window // 2
    is_heard[:, 0] = True

    def attend(kind: str, is_heard: Tensor) -> Tensor:
        parts = [getattr(attention, f"{name}{kind}") for name in ("query", "key", "value")]
        assert parts[1].bias is None
        heads = [(x @ part.weight.T + (0 if part.bias is None else part.bias)).chunk(num_heads, -1) for part in parts]
        mixed = []
        for query, key, value in zip(*heads, strict=True):
            scores = (query @ key.T / query.shape[-1] ** 0.5).masked_fill(~is_heard, -torch.inf)
            mixed.append(scores.softmax(-1) @ value)
        return torch.cat(mixed, -1)

    mixed = torch.cat([attend("_global", torch.ones_like(is_heard))[:1], attend("", is_heard)[1:]])
    x = block.attention.output.LayerNorm(x + block.attention.output.dense(mixed))
    return block.output.LayerNorm(x + block.output.dense(functional.gelu(block.intermediate.dense(x))))


# Sequences of 16 tokens, a multiple of some windows; of 13, 9 and 2; windows that are shorter, as long, and longer.
@pytest.mark.parametrize(("grid", "window"), [*itertools.product([(3, 5), (4, 3), (1, 8), (1, 1)], [4, 6, 16, 40])])
def test_a_whole_model_is_full_attention_under_a_mask(grid: tuple[int, int], window: int) -> None:
    model = disturbed(longformer(grid, window=window))
    items = items_of(model)
    found = model.tokens(items)
    assert found.shape == (2, grid[0] * grid[1] + 1, 8)
    for sample, features in zip(items, found, strict=True):
        x = model.embedding_norm(torch.cat([model.cls_token[0], sample]))
        for block in model.blocks:
            x = layer(block, x, 2, window)
        torch.testing.assert_close(features, model.norm(x), **CLOSE)


@pytest.mark.parametrize("grid", [(3, 5), (1, 8)])
def test_a_whole_model_is_that_of_transformers(grid: tuple[int, int]) -> None:
    """Which fills the sequence up, merges masks and calls its layers itself."""
    model = disturbed(longformer(grid))
    config = LongformerConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        attention_window=[4, 4],
        layer_norm_eps=1e-5,
        vocab_size=4,
        max_position_embeddings=40,
    )
    theirs = LongformerModel(config, add_pooling_layer=False).double().eval()
    with torch.no_grad():
        theirs.embeddings.position_embeddings.weight.zero_()
        theirs.embeddings.token_type_embeddings.weight.zero_()
    theirs.embeddings.LayerNorm.load_state_dict(model.embedding_norm.state_dict())
    for ours, layer_module in zip(model.blocks, theirs.encoder.layer, strict=True):
        biases = {f"attention.self.{name}.bias": torch.zeros(8) for name in ("key", "key_global")}
        layer_module.load_state_dict(ours.state_dict() | biases)
    items = items_of(model)
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), items], dim=1)
    is_global = torch.zeros(tokens.shape[:2], dtype=torch.long)
    is_global[:, 0] = 1
    expected = theirs(
        inputs_embeds=tokens, attention_mask=torch.ones_like(is_global), global_attention_mask=is_global
    ).last_hidden_state
    torch.testing.assert_close(model.tokens(items), model.norm(expected), **CLOSE)


@pytest.mark.parametrize("readout", ["cls", "mean", "last"])
@pytest.mark.parametrize("position", ["item", "slot", "none"])
def test_tables_are_added_and_features_read_where_options_say(position: str, readout: str) -> None:
    model = disturbed(longformer(position=position, readout=readout))
    images = torch.rand(2, 2, 6, 10, dtype=torch.float64)
    order = torch.randperm(15)
    bare = model.patch_embed(images).flatten(2).mT
    placed = bare[:, order]
    if position != "none":
        table = model.pos_embed[0]
        placed = placed + (table[order] if position == "item" else table)
    twin = longformer(readout=readout).double()
    twin.load_state_dict(model.state_dict(), strict=False)
    tokens = twin.tokens(placed)
    features = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "last": tokens[:, -1]}[readout]
    logits = model.read(model.embed(images)[:, order])
    torch.testing.assert_close(logits, features @ model.head.weight.T + model.head.bias)


# Order


def test_a_slot_hears_half_a_window_on_either_side() -> None:
    model = disturbed(longformer(depth=1))
    items = items_of(model, 1)
    other = items.clone()
    other[:, 7] = torch.randn(8)
    change = model.tokens(other) - model.tokens(items)
    assert (model.items_of(change).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    assert change[:, 0].abs().max() > 1e-6


@pytest.mark.parametrize(
    ("options", "matters"),
    [
        ({}, True),
        ({"depth": 1}, False),
        ({"depth": 1, "readout": "mean"}, True),
        ({"depth": 1, "position": "slot"}, True),
        ({"depth": 1, "readout": "last"}, True),
        ({"window": 28}, False),
        ({"window": 26}, True),
        ({"window": 28, "position": "item", "readout": "mean"}, False),
    ],
)
def test_the_order_matters_as_long_as_not_all_hear_all(options: dict, matters: bool) -> None:
    model = disturbed(longformer(**options))
    assert model.order_matters == matters
    items, logits = items_of(model), []
    for order in (torch.arange(15), torch.randperm(15), torch.randperm(15)):
        logits.append(model.read(items[:, order]).detach())
    changes = [float((later - logits[0]).abs().max()) for later in logits[1:]]
    assert (max(changes) > 1e-4) == matters
    assert matters or max(changes) < 1e-5


def test_a_reversed_sequence_has_the_same_neighbours() -> None:
    model = disturbed(longformer(readout="mean"))
    items = items_of(model)
    assert model.order_matters
    assert not model.reversal_matters
    torch.testing.assert_close(model.read(items.flip(1)), model.read(items), **CLOSE)
    torch.testing.assert_close(model.items_of(model.tokens(items.flip(1))).flip(1), model.tokens(items)[:, 1:], **CLOSE)


# Training and bad input


def test_dropout_acts_in_training_only_and_on_every_branch() -> None:
    model = longformer(dropout=0.5)
    images = torch.rand(8, 2, 6, 10)
    torch.testing.assert_close(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}
    assert {block.attention.self.dropout for block in model.blocks} == {0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 5}, "window=5 is odd"), ({"num_heads": 3}, "num_heads=3 does not divide width=8")],
)
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        longformer(**options)
