"""The residual streams of a model, each as one site."""

from collections.abc import Mapping, Sequence

from torch import nn

from permlab.sparsity.block import Block, check_stretch, find, find_blocks
from permlab.sparsity.block_family import Family
from permlab.sparsity.weight_site import Move, Reader, WeightSite

# What names a family, and with it the blocks along one stream.
_Key = tuple[str, ...]


def stream_sites(model: nn.Module) -> list[WeightSite]:
    """Every residual stream of a model as one site.

    All layers that read a stream through a norm have to agree on one order. It folds: embeddings, norms, all
    layers that write to the stream, and the input of the head move along. A vision tower and the language
    model behind it have a stream each; the head of the tower is what merges its patches.

    Args:
        model: built of blocks of known families, those of one family along one stream.
    Returns:
        A site of kind `stream` for each family, its readers all layers behind a norm in all blocks. Its name
        is `stream` where it is the only one, and has the tower's path in front where it is not.
    Raises:
        ValueError: if there are no blocks, a stream has no head to end it, or it is not known how a parameter
            lies along a stream, or along which.
    Cost: reads names and shapes only.
    """
    towers: dict[_Key, list[Block]] = {}
    blocks = find_blocks(model)
    for block in blocks:
        towers.setdefault(block.family.models, []).append(block)
    ends: dict[_Key, list[str]] = {key: [] for key in towers}
    inside = tuple(block.name("") for block in blocks)
    # Tied parameters are named twice; folding knows them for one.
    for name, _ in model.named_parameters(remove_duplicate=False):
        if not name.startswith(inside):
            ends[_owner(model, name, towers)].append(name)
    return [_stream_site(model, tower, ends[key], alone=len(towers) == 1) for key, tower in towers.items()]


def _stream_site(model: nn.Module, blocks: Sequence[Block], ends: Sequence[str], *, alone: bool) -> WeightSite:
    family = blocks[0].family
    if not any(family.end(name) in family.head.split() for name in ends):
        raise ValueError(f"{type(model).__name__} has no head, so its output would be permuted with the stream")
    behind = [line for line in family.lines if line.behind_norm and line.coupling != "independent"]
    readers = [Reader(block.name(part), None) for block in blocks for line in behind for part in line.reads.split()]
    width = model.get_parameter(f"{readers[0].module}.weight").shape[1]
    along = f"{family.writes} {family.norms}".split()
    moves = [Move(name, 0) for block in blocks for part in along for name in block.parameters(part)]
    moves += [move for name in ends for move in _end_moves(model, family, name, width)]
    for last in {move.tensor: move for move in moves}.values():
        check_stretch(model, last, width, whole=True)
    return WeightSite(_name(blocks[0], alone), "stream", tuple(readers), width, tuple(moves))


def _name(block: Block, alone: bool) -> str:
    tower = block.path.rsplit(".", 2)[0]  # without the list of blocks and the place in it
    return "stream" if alone else f"{tower}.stream"


def _owner(model: nn.Module, parameter: str, towers: Mapping[_Key, Sequence[Block]]) -> _Key:
    """The family along whose stream a parameter lies."""
    known = [key for key, (block, *_) in towers.items() if block.family.end(parameter)]
    if len(known) > 1:
        raise ValueError(f"{type(model).__name__} has more than one residual stream, and {parameter} is of any of them")
    if not known:
        raise ValueError(f"it is not known how {parameter} lies along the residual stream of {type(model).__name__}")
    return known[0]


def _end_moves(model: nn.Module, family: Family, parameter: str, width: int) -> list[Move]:
    owner, _, leaf = parameter.rpartition(".")
    entry = family.end(parameter)
    assert entry is not None
    if entry in family.head.split():
        if leaf != "weight":  # a bias is off the stream
            return []
        columns = model.get_parameter(parameter).shape[1] if entry.endswith("[*]") else width
        return [Move(parameter, 1, start) for start in range(0, columns, width)]
    if isinstance(find(model, owner), nn.Embedding):
        return [Move(parameter, 1)]
    return [Move(parameter, next(axis for axis, parts in family.ends.items() if entry in parts.split()))]
