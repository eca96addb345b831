"""Blocks found in models, and a family that only has to be put into its folder."""

import pytest
import torch
from tiny_models import tiny
from torch import nn
from torchvision.models import resnet18

from permlab.sparsity import family
from permlab.sparsity.block import block_names, families, find_blocks
from permlab.sparsity.fold import fold
from permlab.sparsity.read_sites import read_sites
from permlab.sparsity.stream_site import stream_sites


@pytest.mark.parametrize("reader", [read_sites, block_names, stream_sites])
def test_a_model_without_blocks_is_refused(reader):
    with pytest.raises(ValueError, match="ResNet has no block of a known family"):
        reader(resnet18())


def test_no_block_is_of_two_families() -> None:
    for name in ("vit", "timm", "vim", "llama_text", "qwen2", "qwen_vl"):
        paths = block_names(tiny(name))
        assert len(set(paths)) == len(paths)


def test_parts_are_named_as_in_the_model() -> None:
    block, _ = find_blocks(tiny("vit"))
    assert block.name("mlp.fc1") == "blocks.0.mlp.fc1"
    assert block.parameters("mlp.fc1") == ["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias"]
    assert block.parameters("mlp.norm") == []
    assert block.has("attn.qkv[1/3]")
    assert not block.has("attn.gate")
    (alone,) = find_blocks(block.module)
    assert (alone.path, alone.name("mlp.fc1")) == ("", "mlp.fc1")


def test_families_are_found_in_the_order_of_their_files() -> None:
    assert [known.models for known in families()] == [("LLaMA", "Qwen2"), ("OPT",), ("Qwen2.5-VL",), ("Vim",), ("ViT",)]
    for known in families():
        assert set(known.needs.split()) <= known.names()


FAMILY = """
from permlab.sparsity.block_family import Family, Line

FAMILY = Family(
    models=("Toy",), needs="up down", writes="down", norms="norm", ends={0: "stem"}, head="out",
    lines=(Line("up", "up", behind_norm=True), Line("down", "down", "up")),
)
"""


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.out = nn.Linear(3, 4), nn.Sequential(ToyBlock(), ToyBlock()), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.blocks(self.stem(x)))


def test_a_file_in_the_folder_is_a_family(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="Toy has no block of a known family: LLaMA, Qwen2"):
        read_sites(Toy())
    (tmp_path / "toy.py").write_text(FAMILY)
    monkeypatch.setattr(family, "__path__", [*family.__path__, str(tmp_path)])
    families.cache_clear()
    try:
        model, x = Toy(), torch.randn(5, 3)
        with torch.no_grad():
            before = model(x)
            sites = read_sites(model, select=["down", "stream"])
            assert [site.name for site in sites] == ["stream", "blocks.0.down", "blocks.1.down"]
            orders = {site.name: torch.randperm(site.num_items) for site in sites}
            assert set(fold(model, sites, orders).values()) == {"folded"}
            torch.testing.assert_close(model(x), before)
    finally:
        families.cache_clear()
