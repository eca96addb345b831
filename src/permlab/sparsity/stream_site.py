"""The residual stream of a model as one site."""

from torch import nn

from permlab.sparsity.block import Block, check_stretch, find, find_blocks
from permlab.sparsity.weight_site import Move, Reader, WeightSite


def stream_site(model: nn.Module) -> WeightSite:
    """The residual stream of a whole model as one site.

    All layers that read the stream through a norm have to agree on one order. It folds: embeddings, norms, all
    layers that write to the stream, and the input of the head move along.

    Args:
        model: built of blocks of one family.
    Returns:
        Site `stream`, its readers all layers behind a norm in all blocks.
    Raises:
        ValueError: if there are no blocks or they are of several families, there is no head to end the stream,
            or it is not known how a parameter lies along the stream.
    Cost: reads names and shapes only.
    """
    blocks = find_blocks(model)
    if len({id(block.family) for block in blocks}) > 1:
        raise ValueError(f"{type(model).__name__} has more than one residual stream")
    readers, moves = [], []
    for block in blocks:
        behind = [line for line in block.family.lines if line.behind_norm and line.coupling != "independent"]
        readers += [Reader(block.name(part), None) for line in behind for part in line.reads.split()]
        along = f"{block.family.writes} {block.family.norms}".split()
        moves += [Move(name, 0) for part in along for name in block.parameters(part)]
    moves += _end_moves(model, blocks)
    width = model.get_parameter(f"{readers[0].module}.weight").shape[1]
    for move in moves:
        check_stretch(model, move, width, whole=True)
    return WeightSite("stream", "stream", tuple(readers), width, tuple(moves))


def _end_moves(model: nn.Module, blocks: list[Block]) -> list[Move]:
    family, inside = blocks[0].family, tuple(block.name("") for block in blocks)
    axes = {part: axis for axis, parts in family.ends.items() for part in parts.split()}
    heads = family.head.split()
    moves, has_head = [], False
    # Tied parameters are named twice; folding knows them for one.
    for name, _ in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if name.startswith(inside):
            continue
        if owner in heads:
            if leaf == "weight":  # a bias is off the stream
                moves.append(Move(name, 1))
                has_head = True
        elif name in axes or owner in axes:
            is_embedding = isinstance(find(model, owner), nn.Embedding)
            moves.append(Move(name, 1 if is_embedding else axes.get(name, axes.get(owner, 0))))
        else:
            raise ValueError(f"it is not known how {name} lies along the residual stream of {type(model).__name__}")
    if not has_head:
        raise ValueError(f"{type(model).__name__} has no head, so its output would be permuted with the stream")
    return moves
