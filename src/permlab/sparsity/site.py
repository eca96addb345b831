"""Where input channels of linear layers can be permuted, and what has to move along for the order to cost nothing.

Each family of blocks is described once, by a table: which layers share an input, which parameters hold that
input's channels on their other side, and whether a head or a residual stream stands in the way. The tables are
matched against the blocks of any module, whoever wrote it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from permlab.errors import nearest
from permlab.permutation import check_order

COUPLINGS = ("shared", "independent")


@dataclass(frozen=True)
class Reader:
    """Rows of a linear layer whose input axis a site permutes.

    Args:
        module: dotted path of the `nn.Linear` in the model.
        rows: half-open range of its weight's rows; None for all.
    """

    module: str
    rows: tuple[int, int] | None


@dataclass(frozen=True)
class Move:
    """A stretch of a parameter that moves with the items when an order is folded into the model.

    Args:
        tensor: dotted name of the parameter.
        axis: along which the items lie.
        start: first index of the stretch; its length is the site's `num_items`.
    """

    tensor: str
    axis: int
    start: int = 0


@dataclass(frozen=True)
class WeightSite:
    """Input channels that are permuted together, and how the permutation is carried out.

    With `moves`, the order is folded into the weights and the model computes what it did. Without, the
    channels are gathered in front of each reader at run time.

    In grouped-query attention several query heads read the values of one key-value head. An item is then a
    channel of a key-value head, and stands for `repeats` columns of the readers. Groups of m consecutive
    items are groups of m consecutive columns only where m divides `num_items / num_heads`.

    Args:
        name: path of the block and kind, as in `blocks.0.mlp.fc2`.
        kind: the part after the block.
        readers: layers that read the channels.
        num_items: what the order permutes: the readers' input width over `repeats`.
        moves: parameters that move along; empty if the order cannot be folded.
        num_heads: equal consecutive blocks that no item may leave if the order is to fold.
        repeats: query heads of each key-value head.
        optional: a narrow layer that is pruned only where its width allows.
    """

    name: str
    kind: str
    readers: tuple[Reader, ...]
    num_items: int
    moves: tuple[Move, ...]
    num_heads: int = 1
    repeats: int = 1
    optional: bool = False

    def to_items(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "r k"]:
        """Rows of a reader as rows over items: all rows for the first query head of each group, then the next.

        Raises:
            ValueError: if the weight's width is not that of the readers.
        """
        self._check_width(weight.shape[1], self.num_items * self.repeats)
        heads = weight.unflatten(1, (self.num_heads, self.repeats, -1))
        return heads.permute(2, 0, 1, 3).flatten(2).flatten(0, 1)

    def from_items(self, weight: Float[Tensor, "r k"]) -> Float[Tensor, "o i"]:
        """Inverse of `to_items`."""
        self._check_width(weight.shape[1], self.num_items)
        heads = weight.unflatten(1, (self.num_heads, -1)).unflatten(0, (self.repeats, -1))
        return heads.permute(1, 2, 0, 3).flatten(1)

    def column_order(self, order: Int64[Tensor, " k"]) -> Int64[Tensor, " i"]:
        """Order of the readers' input columns that an order of the items amounts to.

        Raises:
            ValueError: if the order is no permutation of this site's items.
        Example:
            >>> site = WeightSite("o", "o", (), num_items=4, moves=(), num_heads=2, repeats=2)
            >>> site.column_order(torch.tensor([1, 0, 2, 3]))
            tensor([1, 0, 3, 2, 4, 5, 6, 7])
        """
        check_order(order)
        if order.shape != (self.num_items,):
            raise ValueError(f"site {self.name} has {self.num_items} items, got an order of shape {tuple(order.shape)}")
        width = self.num_items // self.num_heads
        head, channel = (order.view(self.num_heads, 1, width) // width, order.view(self.num_heads, 1, width) % width)
        repeat = torch.arange(self.repeats, device=order.device).view(1, -1, 1)
        return ((head * self.repeats + repeat) * width + channel).flatten()

    def _check_width(self, width: int, expected: int) -> None:
        if width != expected:
            raise ValueError(f"site {self.name} has {expected} columns, got {width}")


# Families of blocks


@dataclass(frozen=True)
class _Line:
    """A site of a block. Lists of names are separated by blanks and relative to the block.

    Args:
        kind: as in `WeightSite`.
        reads: layers that share the input; `x[1/3]` is the second third of the rows of x. Absent ones are left out.
        moves: what the input's channels are the rows of; `x[2]` is the third stretch as long as the input,
            plain `x` all rows, biases included. Absent ones are left out. Nothing: the order cannot be folded.
        coupling: the line holds for this coupling only; None for both.
        heads: attention module within whose heads the order has to stay for folding; the first of `moves`
            computes the values.
        behind_norm: the input is the normalised residual stream.
        optional: as in `WeightSite`.
    """

    kind: str
    reads: str
    moves: str = ""
    coupling: Literal["shared", "independent"] | None = None
    heads: str = ""
    behind_norm: bool = False
    optional: bool = False


@dataclass(frozen=True)
class _Family:
    """A kind of block, recognised by its layers; it may have no parameters but those that are named here.

    Args:
        needs: linear layers that such a block has.
        lines: its sites.
        writes: layers whose outputs are added to the residual stream.
        norms: other modules with parameters along the residual stream.
        others: modules of the block that no site touches.
    """

    needs: str
    lines: tuple[_Line, ...]
    writes: str
    norms: str
    others: str = ""

    def names(self) -> set[str]:
        """Modules and parameters that such a block may have."""
        parts = [self.needs, self.writes, self.norms, self.others]
        parts += [f"{line.reads} {line.moves}" for line in self.lines]
        return {_split_name(name)[0] for name in " ".join(parts).split()}


_GATED_MLP = (
    _Line("mlp.gate_up", "mlp.gate_proj mlp.up_proj", coupling="shared", behind_norm=True),
    _Line("mlp.gate_proj", "mlp.gate_proj", coupling="independent", behind_norm=True),
    _Line("mlp.up_proj", "mlp.up_proj", coupling="independent", behind_norm=True),
    _Line("mlp.down_proj", "mlp.down_proj", "mlp.gate_proj mlp.up_proj"),
)
_FUSED_ATTENTION = (
    _Line("attn.qkv", "attn.qkv", coupling="shared", behind_norm=True),
    _Line("attn.q", "attn.qkv[0/3]", coupling="independent", behind_norm=True),
    _Line("attn.k", "attn.qkv[1/3]", coupling="independent", behind_norm=True),
    _Line("attn.v", "attn.qkv[2/3]", coupling="independent", behind_norm=True),
    _Line("attn.proj", "attn.proj", "attn.qkv[2] attn.norm", heads="attn"),
)
_FAMILIES = (
    # timm's VisionTransformer.
    _Family(
        needs="attn.qkv attn.proj mlp.fc1 mlp.fc2",
        writes="attn.proj mlp.fc2",
        norms="norm1 norm2 ls1 ls2",
        others="attn.q_norm attn.k_norm",
        lines=(
            *_FUSED_ATTENTION,
            _Line("mlp.fc1", "mlp.fc1", behind_norm=True),
            _Line("mlp.fc2", "mlp.fc2", "mlp.fc1 mlp.norm"),
        ),
    ),
    # The vision tower of Qwen2.5-VL.
    _Family(
        needs="attn.qkv attn.proj mlp.gate_proj mlp.up_proj mlp.down_proj",
        writes="attn.proj mlp.down_proj",
        norms="norm1 norm2",
        lines=(*_FUSED_ATTENTION, *_GATED_MLP),
    ),
    # LLaMA, Qwen2, and the language layers of Qwen2.5-VL. Rotation ties the rows of q and k to their places in
    # the head; those of v are free within it.
    _Family(
        needs="self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "mlp.gate_proj mlp.up_proj mlp.down_proj",
        writes="self_attn.o_proj mlp.down_proj",
        norms="input_layernorm post_attention_layernorm",
        others="self_attn.q_norm self_attn.k_norm",
        lines=(
            _Line(
                "self_attn.qkv",
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
                coupling="shared",
                behind_norm=True,
            ),
            _Line("self_attn.q_proj", "self_attn.q_proj", coupling="independent", behind_norm=True),
            _Line("self_attn.k_proj", "self_attn.k_proj", coupling="independent", behind_norm=True),
            _Line("self_attn.v_proj", "self_attn.v_proj", coupling="independent", behind_norm=True),
            _Line("self_attn.o_proj", "self_attn.o_proj", "self_attn.v_proj", heads="self_attn"),
            *_GATED_MLP,
        ),
    ),
    # Vision Mamba, with the parameter names of mamba_ssm and of Vim. One axis of inner channels runs through the
    # convolutions and scans of both directions and their gate, so the layers that read it fold only together.
    _Family(
        needs="mixer.in_proj mixer.x_proj mixer.dt_proj mixer.out_proj",
        writes="mixer.out_proj",
        norms="norm",
        lines=(
            _Line("mixer.in_proj", "mixer.in_proj", behind_norm=True),
            _Line(
                "mixer.inner",
                "mixer.x_proj mixer.x_proj_b mixer.out_proj",
                "mixer.in_proj[0] mixer.in_proj[1] mixer.conv1d mixer.conv1d_b mixer.dt_proj mixer.dt_proj_b "
                "mixer.A_log mixer.A_b_log mixer.D mixer.D_b",
                coupling="shared",
            ),
            _Line("mixer.x_proj", "mixer.x_proj", coupling="independent"),
            _Line("mixer.x_proj_b", "mixer.x_proj_b", coupling="independent"),
            _Line("mixer.out_proj", "mixer.out_proj", coupling="independent"),
            _Line("mixer.dt_proj", "mixer.dt_proj", "mixer.x_proj[0]", optional=True),
            _Line("mixer.dt_proj_b", "mixer.dt_proj_b", "mixer.x_proj_b[0]", optional=True),
        ),
    ),
)

# Parameters outside of the blocks, and the axis along which the residual stream lies in them. Those of heads are
# read with the stream, not pruned; `embedding.weight` is a table or a projection.
_ENDS = {
    **{f"{name}.{leaf}": 0 for name in ("norm", "norm_pre", "fc_norm") for leaf in ("weight", "bias")},
    **{f"{name}.{leaf}": 0 for name in ("patch_embed", "patch_embed.proj") for leaf in ("weight", "bias")},
    **{name: 2 for name in ("cls_token", "reg_token", "pos_embed")},
    **{"embedding.bias": 0, "position_table": 1, "network.norm.weight": 0},
    **{"model.embed_tokens.weight": 1, "model.norm.weight": 0},
}
_HEADS = {"head.weight": 1, "lm_head.weight": 1}
_OFF_STREAM = ("head.bias", "lm_head.bias")


# Reading


@dataclass(frozen=True)
class _Block:
    path: str
    module: nn.Module
    family: _Family

    def name(self, part: str) -> str:
        return f"{self.path}.{part}" if self.path else part

    def linear(self, part: str) -> nn.Linear:
        module = _find(self.module, part)
        assert isinstance(module, nn.Linear)
        return module


def read_sites(
    model: nn.Module,
    *,
    select: str | Sequence[str] = "all",
    coupling: str = "shared",
    within_heads: bool = False,
) -> list[WeightSite]:
    """Places in a model where input channels can be permuted, in the model's order.

    Args:
        model: any module that holds blocks of timm's `VisionTransformer`, of our `Vim`, of transformers'
            LLaMA or Qwen2, or of Qwen2.5-VL.
        select: `all`; `foldable`, the sites whose order costs nothing at run time, which implies
            `within_heads`; `stream`, the one of `stream_site`; or names and kinds of sites.
        coupling: `shared`, layers with the same input have one order; or `independent`, each its own.
        within_heads: keep the inputs of attention's output projection within their heads, so that they fold.
    Returns:
        Sites of distinct names. Those marked `optional` are for the caller to drop where they do not fit.
    Raises:
        ValueError: if the model has no block of a known family or a block has parameters that its family
            does not, or a name is unknown.
    Cost: reads names and shapes only.
    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3)
        >>> [site.name for site in read_sites(vit, select="foldable")]
        ['blocks.0.attn.proj', 'blocks.0.mlp.fc2']
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling={coupling}{nearest(coupling, list(COUPLINGS))}")
    if select == "stream":
        return [stream_site(model)]
    inside = within_heads or select == "foldable"
    blocks = _find_blocks(model)
    sites = [site for block in blocks for site in _sites_of(block, coupling, inside)]
    if select == "all":
        return sites
    if select == "foldable":
        return [site for site in sites if site.moves]
    names = [select] if isinstance(select, str) else list(select)
    _check_names(names, sites)
    chosen = [stream_site(model)] if "stream" in names else []
    return chosen + [site for site in sites if site.name in names or site.kind in names]


def _check_names(names: list[str], sites: list[WeightSite]) -> None:
    if not names:
        raise ValueError("no sites are selected")
    kinds = list(dict.fromkeys(site.kind for site in sites))
    full = [site.name for site in sites]
    for name in names:
        if name not in (*kinds, *full, "stream"):
            # A whole path is compared with whole paths; anything else with the few kinds.
            alike = full if any(part.isdigit() for part in name.split(".")) else ["all", "foldable", "stream", *kinds]
            raise ValueError(f"no site is called {name}{nearest(name, alike)}")


def block_names(model: nn.Module) -> list[str]:
    """Dotted paths of the blocks that hold the sites, in the model's order.

    Raises:
        ValueError: if there is none.
    """
    return [block.path for block in _find_blocks(model)]


def stream_site(model: nn.Module) -> WeightSite:
    """The residual stream of a whole model as one site.

    Everything that reads the stream through a norm has to agree on one order, and it folds: the embeddings,
    position tables, norms, all layers that write to the stream, and the input of the head move along.

    Returns:
        Site `stream`, its readers all layers behind a norm in all blocks.
    Raises:
        ValueError: if the blocks are of several families, there is no head to end the stream, or a parameter
            is not known to lie along the stream or off it.
    Cost: reads names and shapes only.
    """
    blocks = _find_blocks(model)
    if len({id(block.family) for block in blocks}) > 1:
        raise ValueError(f"{type(model).__name__} has more than one residual stream")
    readers, moves = [], []
    for block in blocks:
        behind = [line for line in block.family.lines if line.behind_norm and line.coupling != "independent"]
        readers += [Reader(block.name(part), None) for line in behind for part in line.reads.split()]
        along = f"{block.family.writes} {block.family.norms}".split()
        moves += [Move(name, 0) for part in along for name in _parameters(block, part)]
    moves += _end_moves(model, blocks)
    width = model.get_parameter(f"{readers[0].module}.weight").shape[1]
    for move in moves:
        _check_stretch(model, move, width, whole=True)
    return WeightSite("stream", "stream", tuple(readers), width, tuple(moves))


def _end_moves(model: nn.Module, blocks: list[_Block]) -> list[Move]:
    inside = tuple(block.name("") for block in blocks)
    # Tied parameters are named twice; folding knows them for one.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(inside)]
    axes = _ENDS | _HEADS
    if "embedding.weight" in names:
        axes["embedding.weight"] = 1 if isinstance(_find(model, "embedding"), nn.Embedding) else 0
    for name in names:
        if name not in axes and name not in _OFF_STREAM:
            raise ValueError(f"it is not known how {name} lies along the residual stream of {type(model).__name__}")
    if not any(name in _HEADS for name in names):
        raise ValueError(f"{type(model).__name__} has no head, so its output would be permuted with the stream")
    return [Move(name, axes[name]) for name in names if name in axes]


def _find_blocks(model: nn.Module) -> list[_Block]:
    blocks = []
    for path, module in model.named_modules():
        for family in _FAMILIES:
            if all(isinstance(_find(module, part), nn.Linear) for part in family.needs.split()):
                blocks.append(_Block(path, module, family))
                _check_parameters(blocks[-1])
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no block of a known family: ViT, Vim, LLaMA, Qwen2, Qwen2.5-VL")
    return blocks


def _check_parameters(block: _Block) -> None:
    known = block.family.names()
    for name, _ in block.module.named_parameters():
        parts = name.split(".")
        if not any(".".join(parts[:length]) in known for length in range(1, len(parts) + 1)):
            raise ValueError(f"block {block.path} has a parameter that folding does not know: {name}")


def _sites_of(block: _Block, coupling: str, within_heads: bool) -> list[WeightSite]:
    lines = [line for line in block.family.lines if line.coupling in (None, coupling)]
    present = [line for line in lines if any(_has(block, part) for part in line.reads.split())]
    return [_read_line(block, line, within_heads) for line in present]


def _read_line(block: _Block, line: _Line, within_heads: bool) -> WeightSite:
    reads = [part for part in line.reads.split() if _has(block, part)]
    width = block.linear(_split_name(reads[0])[0]).in_features
    num_heads = repeats = 1
    if line.heads and within_heads:
        value, stretch = _split_name(line.moves.split()[0])
        repeats = 1 if stretch else width // block.linear(value).out_features
        # transformers' and timm's attention both say how wide their heads are.
        attention: Any = _find(block.module, line.heads)
        num_heads = width // repeats // attention.head_dim
    num_items = width // repeats
    moves = () if line.heads and not within_heads else _read_moves(block, line, num_items)
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


def _reader(block: _Block, part: str) -> Reader:
    path, stretch = _split_name(part)
    if not stretch:
        return Reader(block.name(path), None)
    index, count = (int(number) for number in stretch.split("/"))
    size = block.linear(path).out_features // count
    return Reader(block.name(path), (index * size, (index + 1) * size))


def _read_moves(block: _Block, line: _Line, num_items: int) -> tuple[Move, ...]:
    moves = []
    for part in line.moves.split():
        path, stretch = _split_name(part)
        for name in _parameters(block, path):
            moves.append(Move(name, 0, int(stretch or 0) * num_items))
            _check_stretch(
                block.module, Move(name.removeprefix(block.name("")), 0, moves[-1].start), num_items, not stretch
            )
    return tuple(moves)


def _check_stretch(model: nn.Module, move: Move, num_items: int, whole: bool) -> None:
    size = model.get_parameter(move.tensor).shape[move.axis]
    stop = move.start + num_items
    if size < stop or (whole and size != stop):
        raise ValueError(f"{move.tensor} has {size} entries along axis {move.axis}, not the {num_items} of its site")


def _parameters(block: _Block, part: str) -> list[str]:
    """Names, in the model, of a module's own parameters, or of a parameter; none if it is absent."""
    found = _find(block.module, part)
    if isinstance(found, nn.Module):
        return [block.name(f"{part}.{name}") for name, _ in found.named_parameters(recurse=False)]
    return [block.name(part)] if isinstance(found, nn.Parameter) else []


def _has(block: _Block, part: str) -> bool:
    return _find(block.module, _split_name(part)[0]) is not None


def _find(module: nn.Module, path: str) -> object | None:
    found: object | None = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _split_name(part: str) -> tuple[str, str]:
    """Name and stretch: `x[1/3]` is `x` and `1/3`."""
    path, _, stretch = part.removesuffix("]").partition("[")
    return path, stretch
