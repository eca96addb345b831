"""ONNX: the DINOv2 backbone of a larger graph, as torch's exporter writes transformers' model of it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

# Parts of a block by transformers' names, and by timm's. Norms, biases and scales have their names in the graph.
NAMED = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "layer_scale2.lambda1": "ls2.gamma",
}
# Matrices have lost theirs: each is known by the node that multiplies by it, transposed.
MULTIPLIED = {"attention/output/dense": "attn.proj", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
FUSED = ("query", "key", "value")
BACKBONE, BLOCK = "backbone.", re.compile(r"backbone\.encoder\.layer\.(\d+)\.")
CLASS_POSITION, POSITIONS = "embeddings/Concat_6", "embeddings/Reshape_1"
# Any of timm's plain ViTs of DINOv2 will do, every size being given.
ARCHITECTURE = "vit_small_patch14_dinov2"
# Of the images that DINOv2 reads, by channel on the scale 0..1: those of ImageNet.
MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def convert(path: Path, folder: Path) -> None:
    """Write a DINOv2 backbone as a folder of timm, which has no head.

    The graph is parsed and not run. What follows the backbone in it is left out.

    Raises:
        ValueError: if the file is no ONNX, or its graph has not the nodes and tensors of such a backbone.
    Source: Oquab et al. 2023, arXiv:2304.07193; names of transformers' `Dinov2Model` and timm's
        `VisionTransformer`.
    Differs from source: queries, keys and values are stacked into one matrix, as timm has them.
    """
    import onnx
    from safetensors.numpy import save_file

    try:
        graph = onnx.load(str(path)).graph
        values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    except Exception as error:  # protobuf's and onnx's errors are many; all mean that it is no ONNX
        raise ValueError(f"{path.name}: is no whole ONNX ({type(error).__name__})") from error
    tensors, head_width = _Graph(graph, values, path.name).tensors(), _head_width(graph, path.name)
    folder.mkdir()
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(_config(tensors, head_width), indent=2) + "\n")


class _Graph:
    """A graph whose nodes are found by their names and tensors by the nodes that use them."""

    def __init__(self, graph: Any, values: dict[str, np.ndarray], file: str) -> None:
        self.nodes, self.values, self.file = {node.name: node for node in graph.node}, values, file

    def tensors(self) -> dict[str, np.ndarray]:
        """Tensors of the backbone by timm's names.

        Raises:
            ValueError: naming the node or tensor that is missing, or has another shape than the others ask for.
        """
        patches = "embeddings.patch_embeddings.projection."
        found = {
            "cls_token": self.named("embeddings.cls_token"),
            "pos_embed": np.concatenate([self.used_by(CLASS_POSITION), self.used_by(POSITIONS)], axis=1),
            "patch_embed.proj.weight": self.named(f"{patches}weight"),
            "patch_embed.proj.bias": self.named(f"{patches}bias"),
            "norm.weight": self.named("layernorm.weight"),
            "norm.bias": self.named("layernorm.bias"),
        }
        blocks = {int(match[1]) for match in map(BLOCK.match, self.values) if match}
        if blocks != set(range(len(blocks))) or not blocks:
            raise ValueError(f"{self.file}: has the blocks {sorted(blocks)}, expected all from 0")
        for index in sorted(blocks):
            found |= {f"blocks.{index}.{name}": value for name, value in self._block(index).items()}
        self._check_widths(found)
        return found

    def _block(self, index: int) -> dict[str, np.ndarray]:
        stem = f"encoder.layer.{index}."
        path, attention = f"encoder/layer.{index}/", "attention/attention"
        found = {ours: self.named(stem + theirs) for theirs, ours in NAMED.items()}
        found |= {f"{ours}.weight": self.used_by(f"{path}{theirs}/MatMul").T for theirs, ours in MULTIPLIED.items()}
        weights = [self.used_by(f"{path}{attention}/{part}/MatMul").T for part in FUSED]
        biases = [self.named(f"{stem}attention.attention.{part}.bias") for part in FUSED]
        return found | {"attn.qkv.weight": np.concatenate(weights), "attn.qkv.bias": np.concatenate(biases)}

    def named(self, name: str) -> np.ndarray:
        """A tensor by its name in the backbone."""
        if BACKBONE + name not in self.values:
            raise ValueError(f"{self.file}: has no tensor {BACKBONE}{name}, so it is no DINOv2 as expected")
        return self.values[BACKBONE + name]

    def used_by(self, node: str) -> np.ndarray:
        """The one tensor of the file that goes into a node of the backbone."""
        name = f"/backbone/{node}"
        if name not in self.nodes:
            raise ValueError(f"{self.file}: has no node {name}, so it is no DINOv2 as expected")
        used = [self.values[value] for value in self.nodes[name].input if value in self.values]
        if len(used) != 1:
            raise ValueError(f"{self.file}: {len(used)} tensors go into its node {name}, expected one")
        return used[0]

    def _check_widths(self, found: dict[str, np.ndarray]) -> None:
        width = found["cls_token"].shape[-1]
        hidden = len(found["blocks.0.mlp.fc1.bias"])
        shapes: dict[str, tuple[int, ...]] = {"attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width)}
        shapes |= {"mlp.fc1.weight": (hidden, width), "mlp.fc2.weight": (width, hidden)}
        shapes |= {"attn.qkv.bias": (3 * width,), "mlp.fc1.bias": (hidden,)}
        for name, value in found.items():
            expected = shapes.get(name.split(".", 2)[-1], (width,)) if name.startswith("blocks.") else None
            if expected is not None and value.shape != expected:
                raise ValueError(f"{self.file}: {name} is {value.shape}, expected {expected}")


def _head_width(graph: Any, file: str) -> int:
    """From the number by which queries are multiplied, the fourth root of one over the width."""
    import onnx

    constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        if node.name == "/backbone/encoder/layer.0/attention/attention/Mul":
            scales = [constants[name] for name in node.input if name in constants]
            if scales:
                return round(float(onnx.numpy_helper.to_array(scales[0].attribute[0].t)) ** -4)
    raise ValueError(f"{file}: does not say how wide its attention heads are")


def _config(tensors: dict[str, np.ndarray], head_width: int) -> dict[str, Any]:
    """Contents of timm's `config.json`."""
    width, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    side = round((tensors["pos_embed"].shape[1] - 1) ** 0.5) * patch_size
    args = {
        "img_size": side,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        "num_heads": width // head_width,
        "mlp_ratio": len(tensors["blocks.0.mlp.fc1.bias"]) / width,
        "init_values": 1.0,  # any number: the scales are among the weights
    }
    pretrained = {
        "input_size": [channels, side, side],
        "num_classes": 0,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": list(MEAN),
        "std": list(SD),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": width,
        "global_pool": "token",
        "model_args": args,
        "pretrained_cfg": pretrained,
    }
