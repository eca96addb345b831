"""How a family of blocks is described, so that sites can be read from any model that is built of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Line:
    """A site that every block of a family has.

    Names of modules and parameters are relative to the block, and blanks separate them. Those that a
    block does not have are left out.

    Args:
        kind: of the site, as in `WeightSite`.
        reads: linear layers that share the input; `x[1/3]` is the second third of the rows of x.
        moves: what computes the input, the channels being its rows, biases included: `x` stands for all rows
            of x, `x[2]` for the third stretch as long as the input. Where nothing is named, the order cannot
            be folded.
        coupling: the one under which the site exists; None for both.
        attention: module within whose heads the order has to stay if it is to fold; the first of `moves`
            then computes the values.
        behind_norm: whether the input is the normalised residual stream.
        optional: as in `WeightSite`.
    """

    kind: str
    reads: str
    moves: str = ""
    coupling: Literal["shared", "independent"] | None = None
    attention: str = ""
    behind_norm: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """A kind of block, recognised by its linear layers, and the models that are built of it.

    Names are as in `Line`, those of `ends` and `head` relative to the model, or to the `model` in it,
    where transformers has what a head is put on. A block may have no parameters but those that its family
    names, since folding would leave them behind.

    Args:
        models: that have such blocks, for messages.
        needs: linear layers that a block of the family has, and that no block of another family has all of.
        lines: its sites.
        writes: layers whose outputs are added to the residual stream.
        norms: other modules of the block with parameters along the residual stream.
        others: modules of the block that no site touches.
        ends: parameters outside of the blocks, or modules with such, by the axis along which the residual
            stream lies in them. In the weight of an `nn.Embedding` it lies along axis 1 in any case.
        head: linear layers outside of the blocks that read the stream, and are not pruned; `x[*]` reads several
            tokens of it, one after the other.
    """

    models: tuple[str, ...]
    needs: str
    lines: tuple[Line, ...]
    writes: str
    norms: str
    others: str = ""
    ends: Mapping[int, str] = field(default_factory=dict)
    head: str = ""

    def names(self) -> set[str]:
        """Modules and parameters that a block may have."""
        parts = [self.needs, self.writes, self.norms, self.others]
        parts += [f"{line.reads} {line.moves}" for line in self.lines]
        return {split_name(name)[0] for name in " ".join(parts).split()}

    def end(self, parameter: str) -> str | None:
        """The name in `head` or `ends` that stands for a parameter of a model, or for its module; None if none does."""
        plain = parameter.removeprefix("model.")
        stands_for = (plain, plain.rpartition(".")[0])
        names = " ".join([self.head, *self.ends.values()]).split()
        return next((name for name in names if split_name(name)[0] in stands_for), None)


def split_name(part: str) -> tuple[str, str]:
    """Name and stretch.

    Example:
        >>> split_name("x[1/3]"), split_name("x")
        (('x', '1/3'), ('x', ''))
    """
    path, _, stretch = part.removesuffix("]").partition("[")
    return path, stretch


# Sites that several families have


GATED_MLP = (
    Line("mlp.gate_up", "mlp.gate_proj mlp.up_proj", coupling="shared", behind_norm=True),
    Line("mlp.gate_proj", "mlp.gate_proj", coupling="independent", behind_norm=True),
    Line("mlp.up_proj", "mlp.up_proj", coupling="independent", behind_norm=True),
    Line("mlp.down_proj", "mlp.down_proj", "mlp.gate_proj mlp.up_proj"),
)
FUSED_ATTENTION = (
    Line("attn.qkv", "attn.qkv", coupling="shared", behind_norm=True),
    Line("attn.q", "attn.qkv[0/3]", coupling="independent", behind_norm=True),
    Line("attn.k", "attn.qkv[1/3]", coupling="independent", behind_norm=True),
    Line("attn.v", "attn.qkv[2/3]", coupling="independent", behind_norm=True),
    Line("attn.proj", "attn.proj", "attn.qkv[2] attn.norm", attention="attn"),
)
