"""Statistics of layer inputs, against inputs computed by hand from the models' parts."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import inputs_of, llama, scatter, timm_vit, vim
from torch import Tensor, nn

from permlab.sparsity.calibrate import capture, collect, reconstruction_errors


def before(layer: nn.Linear, output: Tensor) -> Tensor:
    """The input of a square layer that gave this output."""
    bias = 0 if layer.bias is None else layer.bias
    return torch.linalg.solve(layer.weight, (output - bias).flatten(0, -2).mT).mT.view(output.shape)


def vit_inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    inputs = {}
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        inputs[f"{name}.attn.qkv"] = block.norm1(x)
        attended = block.attn(block.norm1(x))
        inputs[f"{name}.attn.proj"] = before(block.attn.proj, attended)
        x = x + attended
        inputs[f"{name}.mlp.fc1"] = block.norm2(x)
        inputs[f"{name}.mlp.fc2"] = F.gelu(F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias))
        x = x + block.mlp(block.norm2(x))
    return inputs


def llama_inputs(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    x = model.embedding.weight[tokens]
    rotation = model.network.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    causal = torch.full((tokens.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)[None, None]
    inputs = {}
    for index, layer in enumerate(model.network.layers):
        name = f"network.layers.{index}"
        normed = layer.input_layernorm(x)
        inputs |= {f"{name}.self_attn.{part}_proj": normed for part in "qkv"}
        attended = layer.self_attn(normed, position_embeddings=rotation, attention_mask=causal)[0]
        inputs[f"{name}.self_attn.o_proj"] = before(layer.self_attn.o_proj, attended)
        x = x + attended
        normed = layer.post_attention_layernorm(x)
        inputs |= {f"{name}.mlp.{part}_proj": normed for part in ("gate", "up")}
        gate, up = (normed @ getattr(layer.mlp, f"{part}_proj").weight.mT for part in ("gate", "up"))
        inputs[f"{name}.mlp.down_proj"] = F.silu(gate) * up
        x = x + inputs[f"{name}.mlp.down_proj"] @ layer.mlp.down_proj.weight.mT
    return inputs


def vim_inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    items = model.embed(images)
    middle = items.shape[1] // 2
    token = (model.cls_token + model.pos_embed[:, -1:]).expand(len(items), -1, -1)
    x = torch.cat([items[:, :middle], token, items[:, middle:]], 1)
    inputs = {}
    for index, block in enumerate(model.blocks):
        name, mixer = f"blocks.{index}.mixer", block.mixer
        inputs[f"{name}.in_proj"] = block.norm(x)
        inner = (block.norm(x) @ mixer.in_proj.weight.mT)[..., : mixer.in_proj.out_features // 2]
        for suffix, u in (("", inner), ("_b", inner.flip(1))):
            kernel = getattr(mixer, f"conv1d{suffix}")
            taps = kernel.weight.squeeze(1)
            padded = F.pad(u, (0, 0, taps.shape[1] - 1, 0))
            mixed = sum(padded[:, tap : tap + u.shape[1]] * taps[:, tap] for tap in range(taps.shape[1])) + kernel.bias
            inputs[f"{name}.x_proj{suffix}"] = F.silu(mixed)
            steps = F.silu(mixed) @ getattr(mixer, f"x_proj{suffix}").weight.mT
            inputs[f"{name}.dt_proj{suffix}"] = steps[..., : mixer.dt_rank]
        inputs[f"{name}.out_proj"] = before(mixer.out_proj, mixer(block.norm(x)))
        x = x + mixer(block.norm(x))
    return inputs


MODELS = {"timm": (timm_vit, vit_inputs), "llama": (llama, llama_inputs), "vim": (lambda: vim(expand=1), vim_inputs)}


def layers_of(model: nn.Module, names: dict[str, Tensor]) -> dict[str, nn.Linear]:
    return {name: model.get_submodule(name) for name in names}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_hessians_and_norms_are_those_of_the_inputs(name: str) -> None:
    build, by_hand = MODELS[name]
    model = scatter(build())
    batches = [inputs_of(model), inputs_of(model)[:1], inputs_of(model)]
    expected = by_hand(model, torch.cat(batches))
    if name == "timm":  # the whole network has no other linear layers in its blocks
        linear = {path for path, module in model.blocks.named_modules(prefix="blocks") if isinstance(module, nn.Linear)}
        assert linear == set(expected)
    found = collect(model, layers_of(model, expected), batches)
    assert set(found) == set(expected)
    for layer, inputs in expected.items():
        tokens = inputs.flatten(0, 1)
        assert found[layer].num_tokens == len(tokens)
        torch.testing.assert_close(found[layer].hessian, tokens.mT @ tokens, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found[layer].norm, torch.linalg.vector_norm(tokens, dim=0), rtol=1e-8, atol=1e-8)


class Uneven(nn.Module):
    """One layer that is called twice in a pass, one that is not called, one in low precision."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.unused, self.narrow = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.twice(self.twice(x)).bfloat16())


@torch.no_grad()
def test_every_call_of_a_layer_counts_and_sums_are_kept_wide() -> None:
    model, x = Uneven(), torch.randn(3, 5, 4)
    found = collect(model, {"twice": model.twice, "narrow": model.narrow}, [x])
    tokens = torch.cat([x, model.twice(x)]).flatten(0, 1)
    torch.testing.assert_close(found["twice"].hessian, tokens.mT @ tokens)
    assert found["twice"].num_tokens == 30
    assert found["narrow"].hessian.dtype == torch.float32
    tokens = model.twice(model.twice(x)).bfloat16().float().flatten(0, 1)
    torch.testing.assert_close(found["narrow"].hessian, tokens.mT @ tokens)


def test_what_cannot_be_calibrated_on() -> None:
    model, layers = Uneven(), {"twice": Uneven().twice}
    with pytest.raises(ValueError, match="calibration set is empty"):
        collect(model, {"twice": model.twice}, [])
    with pytest.raises(ValueError, match="layer unused was not called"):
        collect(model, {"twice": model.twice, "unused": model.unused}, [torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="layer twice was not called"):
        collect(model, layers, [torch.zeros(2, 4)])
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="inputs of layer twice are not finite"):
            collect(model, {"twice": model.twice}, [torch.zeros(2, 4), torch.full((2, 4), value)])


def test_no_hook_stays_behind() -> None:
    model = Uneven()
    with pytest.raises(ValueError, match="not called"):
        collect(model, {"twice": model.twice, "unused": model.unused}, [torch.zeros(2, 4)])
    with pytest.raises(RuntimeError), capture({"twice": model.twice}):
        model(torch.zeros(2, 7))
    assert not model.twice._forward_pre_hooks
    assert not model.twice._forward_hooks
    assert not model.unused._forward_pre_hooks


@torch.no_grad()
def test_reconstruction_errors_are_those_of_the_outputs() -> None:
    model = scatter(timm_vit())
    batches = [inputs_of(model), inputs_of(model)[:2]]
    inputs = vit_inputs(model, torch.cat(batches))
    layers = layers_of(model, inputs)
    others = {name: layer.weight * (torch.rand_like(layer.weight) > 0.4) for name, layer in layers.items()}
    found = reconstruction_errors(model, {name: (layers[name], others[name]) for name in layers}, batches)
    for name, layer in layers.items():
        tokens, bias = inputs[name].flatten(0, 1), layer.bias
        dense, pruned = (F.linear(tokens, weight, bias) - bias for weight in (layer.weight, others[name]))
        assert found[name] == pytest.approx(((dense - pruned).norm() / dense.norm()).item(), rel=1e-6)
    same = reconstruction_errors(model, {name: (layer, layer.weight) for name, layer in layers.items()}, batches)
    assert set(same.values()) == {0.0}


def test_capture_keeps_the_last_output_and_the_first_of_several() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x

    pair, model = Pair(), Uneven()
    x = torch.randn(2, 4)
    with capture({"pair": pair, "twice": model.twice}) as states:
        assert states == {}
        pair(x)
        model(x)
    torch.testing.assert_close(states["pair"], x + 1)
    torch.testing.assert_close(states["twice"], model.twice(model.twice(x)))
    pair(x + 5)
    torch.testing.assert_close(states["pair"], x + 1)
