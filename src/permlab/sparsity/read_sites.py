"""The sites of a model, read from the blocks that it is built of."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from permlab.errors import nearest
from permlab.sparsity.block import Block, check_stretch, find, find_blocks
from permlab.sparsity.block_family import Line, split_name
from permlab.sparsity.stream_site import stream_sites
from permlab.sparsity.weight_site import Move, Reader, WeightSite

COUPLINGS = ("shared", "independent")


def read_sites(
    model: nn.Module,
    *,
    select: str | Sequence[str] = "all",
    coupling: str = "shared",
    within_heads: bool = False,
) -> list[WeightSite]:
    """Read from a model where its input channels can be permuted, in the model's order.

    Args:
        model: any module that holds blocks of the families in `permlab.sparsity.family`, such as timm's
            `VisionTransformer` or transformers' LLaMA.
        select: `all`; `foldable`, every layer at sites whose order costs nothing at run time: one order for all
            that read a residual stream, and those inside the blocks, whatever `coupling` and `within_heads` are;
            `stream`, the sites of `stream_sites` alone; or names and kinds of sites.
        coupling: `shared`, layers with the same input have one order; or `independent`, each its own.
        within_heads: keep the inputs of attention's output projection within their heads, so that they fold.
    Returns:
        Sites of distinct names. Those marked `optional` are for the caller to drop where they do not fit.
    Raises:
        ValueError: if the model has no block of a known family, a block has parameters that its family does
            not name or of another shape, or a name is unknown; for `stream` and `foldable` as `stream_sites`.
    Cost: reads names and shapes only.
    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3)
        >>> [site.name for site in read_sites(vit, select="foldable")]
        ['stream', 'blocks.0.attn.proj', 'blocks.0.mlp.fc2']
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling={coupling}{nearest(coupling, list(COUPLINGS))}")
    if select == "stream":
        return stream_sites(model)
    if select == "foldable":
        return [*stream_sites(model), *(site for site in _block_sites(model, "shared", True) if site.moves)]
    sites = _block_sites(model, coupling, within_heads)
    if select == "all":
        return sites
    names = [select] if isinstance(select, str) else list(select)
    streams = stream_sites(model) if any(name.rpartition(".")[2] == "stream" for name in names) else []
    sites = [*streams, *sites]
    _check_names(names, sites)
    return [site for site in sites if site.name in names or site.kind in names]


def _check_names(names: list[str], sites: list[WeightSite]) -> None:
    if not names:
        raise ValueError("no sites are selected")
    kinds = list(dict.fromkeys(site.kind for site in sites))
    full = [site.name for site in sites]
    for name in names:
        if name not in (*kinds, *full):
            # A whole path is compared with whole paths; anything else with the few kinds.
            words = dict.fromkeys(["all", "foldable", "stream", *kinds])
            alike = full if any(part.isdigit() for part in name.split(".")) else list(words)
            raise ValueError(f"no site is called {name}{nearest(name, alike)}")


def _block_sites(model: nn.Module, coupling: str, within_heads: bool) -> list[WeightSite]:
    return [site for block in find_blocks(model) for site in _sites_of(block, coupling, within_heads)]


def _sites_of(block: Block, coupling: str, within_heads: bool) -> list[WeightSite]:
    lines = [line for line in block.family.lines if line.coupling in (None, coupling)]
    present = [line for line in lines if any(block.has(part) for part in line.reads.split())]
    return [_read_line(block, line, within_heads) for line in present]


def _read_line(block: Block, line: Line, within_heads: bool) -> WeightSite:
    reads = [part for part in line.reads.split() if block.has(part)]
    width = block.linear(split_name(reads[0])[0]).in_features
    num_heads = repeats = 1
    if line.attention and within_heads:
        value, stretch = split_name(line.moves.split()[0])
        repeats = 1 if stretch else width // block.linear(value).out_features
        # transformers' and timm's attention both say how wide their heads are.
        attention: Any = find(block.module, line.attention)
        num_heads = width // repeats // attention.head_dim
    num_items = width // repeats
    moves = () if line.attention and not within_heads else _read_moves(block, line, num_items)
    return WeightSite(
        name=block.name(line.kind),
        kind=line.kind,
        readers=tuple(_reader(block, part) for part in reads),
        num_items=num_items,
        moves=moves,
        num_heads=num_heads,
        repeats=repeats,
        optional=line.optional,
    )


def _reader(block: Block, part: str) -> Reader:
    path, stretch = split_name(part)
    if not stretch:
        return Reader(block.name(path), None)
    index, count = (int(number) for number in stretch.split("/"))
    size = block.linear(path).out_features // count
    return Reader(block.name(path), (index * size, (index + 1) * size))


def _read_moves(block: Block, line: Line, num_items: int) -> tuple[Move, ...]:
    moves = []
    for part in line.moves.split():
        path, stretch = split_name(part)
        for name in block.parameters(path):
            moves.append(Move(name, 0, int(stretch or 0) * num_items))
            inside = Move(name.removeprefix(block.name("")), 0, moves[-1].start)
            check_stretch(block.module, inside, num_items, whole=not stretch)
    return tuple(moves)
