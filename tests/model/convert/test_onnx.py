"""A tiny DINOv2 as torch's exporter writes it, in a graph with more, and what is refused as one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from permlab.model.convert.onnx import FUSED, MULTIPLIED, NAMED, convert

onnx = pytest.importorskip("onnx", reason="the extra models is not installed")
WIDTH, HEADS, HIDDEN, DEPTH = 16, 2, 24, 2


def network() -> Any:
    torch.manual_seed(2)
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=12, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=HIDDEN / WIDTH,
        init_values=1.0, num_classes=0,
    )  # fmt: skip
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit.eval()


def graph(state: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Tensors of a graph, and nodes with what goes into them."""
    values, nodes = {"decoder.weight": np.ones((3, 3), np.float32)}, {"/decoder/MatMul": ["decoder.weight"]}

    def used(node: str, value: np.ndarray) -> None:
        name = f"onnx::MatMul_{len(values)}"
        values[name], nodes[f"/backbone/{node}"] = value, ["an_input", name]

    values["backbone.embeddings.cls_token"] = state["cls_token"]
    used("embeddings/Concat_6", state["pos_embed"][:, :1])
    used("embeddings/Reshape_1", state["pos_embed"][:, 1:])
    for kind in ("weight", "bias"):
        values[f"backbone.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        values[f"backbone.layernorm.{kind}"] = state[f"norm.{kind}"]
    for index in range(DEPTH):
        path, ours = f"encoder/layer.{index}/", f"blocks.{index}."
        stem = f"backbone.encoder.layer.{index}."
        values |= {stem + theirs: state[ours + name] for theirs, name in NAMED.items()}
        for theirs, name in MULTIPLIED.items():
            used(f"{path}{theirs}/MatMul", state[f"{ours}{name}.weight"].T)
        parts = zip(FUSED, np.split(state[f"{ours}attn.qkv.weight"], 3), strict=True)
        for part, weight in parts:
            used(f"{path}attention/attention/{part}/MatMul", weight.T)
        for part, bias in zip(FUSED, np.split(state[f"{ours}attn.qkv.bias"], 3), strict=True):
            values[f"{stem}attention.attention.{part}.bias"] = bias
    return values, nodes


def write(path: Path, change: Callable[[dict, dict], object] = lambda values, nodes: None) -> Path:
    values, nodes = graph({name: tensor.detach().numpy() for name, tensor in network().state_dict().items()})
    change(values, nodes)
    scale = onnx.numpy_helper.from_array(np.float32((WIDTH // HEADS) ** -0.25))
    made = [onnx.helper.make_node("Constant", [], ["scale"], value=scale)]
    made += [
        onnx.helper.make_node("Mul", ["q", "scale"], ["s"], name="/backbone/encoder/layer.0/attention/attention/Mul")
    ]
    made += [onnx.helper.make_node("MatMul", inputs, [f"{name}_out"], name=name) for name, inputs in nodes.items()]
    stored = [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in values.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(made, "g", [], [], stored)), str(path))
    return path


@torch.no_grad()
def test_timm_opens_the_folder_and_computes_the_same(tmp_path: Path) -> None:
    convert(write(tmp_path / "x.onnx"), tmp_path / "x")
    found = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    images = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(found.forward_features(images), network().forward_features(images))
    assert found.num_classes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, n: v.pop("backbone.embeddings.cls_token"), r"has no tensor backbone\.embeddings\.cls_token"),
        (lambda v, n: n.pop("/backbone/embeddings/Concat_6"), "has no node /backbone/embeddings/Concat_6"),
        (lambda v, n: n.update({"/backbone/encoder/layer.1/mlp/fc1/MatMul": ["a", "b"]}), "0 tensors go into its node"),
        (
            lambda v, n: v.update({"backbone.encoder.layer.3.norm1.bias": v["backbone.layernorm.bias"]}),
            r"blocks \[0, 1, 3\]",
        ),
        (lambda v, n: v.clear(), "has no tensor"),
        (
            lambda v, n: v.update({"backbone.encoder.layer.0.mlp.fc2.bias": np.zeros(5, np.float32)}),
            r"blocks\.0\.mlp\.fc2\.bias is \(5,\), expected \(16,\)",
        ),
    ],
)  # fmt: skip
def test_a_graph_without_the_expected_nodes_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^x\.onnx: .*{message}"):
        convert(write(tmp_path / "x.onnx", change), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x08\x07"])
def test_what_is_no_onnx_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"^x\.onnx: ") as caught:
        convert(tmp_path / "x.onnx", tmp_path / "x")
    assert "\n" not in str(caught.value)
