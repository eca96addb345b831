"""Transformer-XL against its published sizes, its formulas in plain loops, and what order should do to it."""

import itertools
import math

import numpy as np
import pytest
import torch
from runs import configure
from torch import Tensor

from permlab.config.build import build
from permlab.data.spec import DataSpec
from permlab.model.txl import Txl, relative_shift, sinusoids

SPEC = DataSpec(kind="image", num_classes=5, channels=2, height=4, width=6)
IMAGENET = DataSpec(kind="image", num_classes=1000, channels=3, height=224, width=224)
POSITIONS, READOUTS = ("item", "slot", "none"), ("cls", "mean", "last")


def txl(**changes) -> Txl:
    options = {"patch_size": 2, "width": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5, "dropout": 0.0}
    return Txl(SPEC, **(options | {"position": "item", "readout": "cls"} | changes)).eval()


def disturbed(model: Txl) -> Txl:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return model.double()


@pytest.mark.parametrize(
    ("preset", "published", "count"),
    [("txl_ti", "6.11", 6_113_128), ("txl_s", "23.73", 23_726_824), ("txl_b", "93.46", 93_458_920)],
)
def test_parameter_counts_are_the_published_ones(preset: str, published: str, count: int) -> None:
    """Millions in the source's list of sizes, which has no table of items yet."""
    settings = configure([f"model={preset}"])["model"] | {"patch_size": 16}
    with torch.device("meta"):
        with_table = build("model", settings, IMAGENET)
        model = build("model", settings | {"position": "none"}, IMAGENET)
    found, d = sum(parameter.numel() for parameter in model.parameters()), settings["width"]
    # Five projections, an MLP of 4 d with biases, two norms; the embedding, the class token, u and v, norm and head.
    block = 5 * d * d + (8 * d * d + 5 * d) + 4 * d
    assert found == count == 12 * block + (3 * 256 + 1) * d + d + 2 * d + 2 * d + 1000 * (d + 1)
    assert f"{found / 1e6:.2f}" == published
    assert sum(parameter.numel() for parameter in with_table.parameters()) == count + 196 * d


# The formulas, in plain loops


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def encoding(distance: int, width: int) -> np.ndarray:
    angles = [distance / 10000 ** (2 * k / width) for k in range(width // 2)]
    return np.array([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def attention(
    x: np.ndarray, state: dict[str, np.ndarray], u: np.ndarray, v: np.ndarray, *, has_class: bool
) -> np.ndarray:
    """One pair of a query and a key after the other."""
    length, d = x.shape
    num_heads, size = u.shape
    W = {name: state[f"attention.{name}.weight"] for name in ("query", "key", "value", "distance", "out")}
    mixed = np.zeros_like(x)
    for head, i in itertools.product(range(num_heads), range(length)):
        rows = slice(head * size, (head + 1) * size)
        query = W["query"][rows] @ x[i]
        heard = [j for j in range(length) if j <= i or (has_class and i == 0)]
        scores = []
        for j in heard:
            content = (query + u[head]) @ (W["key"][rows] @ x[j])
            distance = (query + v[head]) @ (W["distance"][rows] @ encoding(i - j, d))
            scores.append((content + distance) / math.sqrt(size))
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        mixed[i, rows] = sum(weight * (W["value"][rows] @ x[j]) for weight, j in zip(weights, heard, strict=True))
    return mixed @ W["out"].T


def features(model: Txl, items: np.ndarray) -> np.ndarray:
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    x, has_class = items, model.readout == "cls"
    if model.position == "slot":
        x = x + state["pos_embed"][0]
    if has_class:
        x = np.concatenate([state["cls_token"][0], x])
    for index in range(len(model.blocks)):
        of = {name.removeprefix(f"blocks.{index}."): value for name, value in state.items()}
        mixed = attention(x, of, state["content_bias"], state["distance_bias"], has_class=has_class)
        x = norm(x + mixed, of["attention_norm.weight"], of["attention_norm.bias"])
        hidden = np.maximum(x @ of["mlp.0.weight"].T + of["mlp.0.bias"], 0)
        x = norm(x + hidden @ of["mlp.3.weight"].T + of["mlp.3.bias"], of["mlp_norm.weight"], of["mlp_norm.bias"])
    return norm(x, state["norm.weight"], state["norm.bias"])


@pytest.mark.parametrize(("position", "readout"), [*itertools.product(POSITIONS, READOUTS)])
def test_a_whole_model_is_its_formulas(position: str, readout: str) -> None:
    model = disturbed(txl(position=position, readout=readout))
    items = model.embed(torch.rand(2, 2, 4, 6, dtype=torch.float64))[:, [4, 2, 0, 1, 5, 3]].detach()
    for sample, found in zip(items.numpy(), model.tokens(items).detach().numpy(), strict=True):
        np.testing.assert_allclose(found, features(model, sample), rtol=1e-9, atol=1e-11)
    tokens = model.tokens(items)
    read = {"cls": tokens[:, 0], "mean": tokens.mean(1), "last": tokens[:, -1]}[readout]
    torch.testing.assert_close(model.read(items), read @ model.head.weight.T + model.head.bias)
    assert torch.equal(model.items_of(tokens), tokens[:, -6:])


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("looks_back_only", [True, False])
def test_the_shift_moves_every_score_to_its_key(length: int, looks_back_only: bool) -> None:
    lowest = 0 if looks_back_only else 1 - length
    distances = torch.arange(length - 1, lowest - 1, -1.0)
    scores = distances + 100 * torch.arange(float(length)).unsqueeze(-1)  # of query i for a distance
    shifted = relative_shift(scores.expand(2, 3, -1, -1))
    for i, j in itertools.product(range(length), range(length)):
        if j <= i or not looks_back_only:
            assert (shifted[..., i, j] == 100 * i + i - j).all()


@pytest.mark.parametrize("width", [1, 7, 8])
def test_sinusoids_of_any_width_and_sign(width: int) -> None:
    distances = torch.tensor([3, 0, -2])
    found = sinusoids(distances, width, dtype=torch.float64)
    assert found.shape == (3, width)
    if width == 8:
        expected = np.stack([encoding(distance, 8) for distance in (3, 0, -2)])
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)


# Order


@pytest.mark.parametrize("readout", ["mean", "last"])
def test_a_slot_hears_nothing_of_those_behind_it(readout: str) -> None:
    model = disturbed(txl(readout=readout, position="none"))
    items = model.embed(torch.rand(1, 2, 4, 6, dtype=torch.float64))
    later = items.clone()
    later[:, 3] += 1
    before, after = model.tokens(items), model.tokens(later)
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=1e-12)
    assert ((after - before)[:, 3:].abs().amax(-1) > 1e-6).all()


def test_the_class_token_hears_every_slot_at_its_distance() -> None:
    model = disturbed(txl(depth=1, position="none"))
    items = model.embed(torch.rand(1, 2, 4, 6, dtype=torch.float64))
    read = model.read(items)
    for slot in range(5):  # one block, so nothing but distance tells two neighbours from one another
        order = torch.arange(6)
        order[[slot, slot + 1]] = order[[slot + 1, slot]]
        assert (model.read(items[:, order]) - read).abs().max() > 1e-9


def test_gradients_are_those_of_finite_differences() -> None:
    model = disturbed(txl(depth=1, position="none"))
    items = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model.read, (items,))
    biases = (model.content_bias, model.distance_bias, model.blocks[0].attention.distance.weight)
    assert torch.autograd.gradcheck(lambda *_: model.read(items.detach()), biases)


# Training


def test_weight_decay_leaves_biases_and_tables_alone() -> None:
    free = {name for name, p in txl().named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert free == {"content_bias", "distance_bias", "cls_token", "pos_embed"}


def test_dropout_acts_in_training_only() -> None:
    model = txl(dropout=0.5)
    images: Tensor = torch.rand(8, 2, 4, 6)
    torch.testing.assert_close(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_bfloat16() -> None:
    model = txl()
    images = torch.rand(2, 2, 4, 6)
    expected = model(images)
    found = model.bfloat16()(images.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
