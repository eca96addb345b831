"""Blocks of a known family, found in a model."""

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache

from torch import nn

from permlab.sparsity import family as folder
from permlab.sparsity.block_family import Family, split_name
from permlab.sparsity.weight_site import Move


@cache
def families() -> tuple[Family, ...]:
    """Every family that has a file in `permlab.sparsity.family`, in the order of their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(folder.__path__))
    return tuple(importlib.import_module(f"{folder.__name__}.{name}").FAMILY for name in names)


@dataclass(frozen=True)
class Block:
    """A block of a model, whose parts are named as its family names them.

    Args:
        path: of the block in the model; empty if it is the model.
        module: the block itself.
        family: that describes it.
    """

    path: str
    module: nn.Module
    family: Family

    def name(self, part: str) -> str:
        """Name of a part in the model."""
        return f"{self.path}.{part}" if self.path else part

    def has(self, part: str) -> bool:
        return find(self.module, split_name(part)[0]) is not None

    def linear(self, part: str) -> nn.Linear:
        module = find(self.module, part)
        assert isinstance(module, nn.Linear)
        return module

    def parameters(self, part: str) -> list[str]:
        """Names in the model of a module's own parameters, or of a parameter; none if the block does not have it."""
        found = find(self.module, part)
        if isinstance(found, nn.Module):
            return [self.name(f"{part}.{name}") for name, _ in found.named_parameters(recurse=False)]
        return [self.name(part)] if isinstance(found, nn.Parameter) else []


def find_blocks(model: nn.Module) -> list[Block]:
    """Blocks of a known family, in the model's order.

    Raises:
        ValueError: if there is none, or one has parameters that its family does not name.
    """
    blocks = []
    for path, module in model.named_modules():
        for family in families():
            if all(isinstance(find(module, part), nn.Linear) for part in family.needs.split()):
                blocks.append(Block(path, module, family))
                _check_parameters(blocks[-1])
    if not blocks:
        known = ", ".join(name for family in families() for name in family.models)
        raise ValueError(
            f"{type(model).__name__} has no block of a known family: {known}; a description names the layers that "
            "share an input, what computes it and what writes to the residual stream (docs/models.md has one)"
        )
    return blocks


def block_names(model: nn.Module) -> list[str]:
    """Dotted paths of the blocks that hold the sites, in the model's order.

    Raises:
        ValueError: if there is none, or one has parameters that its family does not name.
    """
    return [block.path for block in find_blocks(model)]


def check_stretch(model: nn.Module, move: Move, num_items: int, *, whole: bool) -> None:
    """Refuse a move of more entries than its parameter has; if `whole`, of fewer too.

    Raises:
        ValueError: naming the parameter.
    """
    size = model.get_parameter(move.tensor).shape[move.axis]
    stop = move.start + num_items
    if size < stop or (whole and size != stop):
        raise ValueError(f"{move.tensor} has {size} entries along axis {move.axis}, not the {num_items} of its site")


def find(module: nn.Module, path: str) -> object | None:
    """What a dotted path leads to, or None."""
    found: object | None = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _check_parameters(block: Block) -> None:
    known = block.family.names()
    for name, _ in block.module.named_parameters():
        parts = name.split(".")
        if not any(".".join(parts[:length]) in known for length in range(1, len(parts) + 1)):
            raise ValueError(f"block {block.path} has a parameter that folding does not know: {name}")
