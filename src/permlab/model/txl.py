"""Transformer-XL over patches: causal attention that knows by how many slots a query and a key are apart."""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from permlab.data.spec import DataSpec
from permlab.model.base import Backbone, free_of_decay
from permlab.option import Divides, Dropout, PositiveFloat, PositiveInt, Side


class Txl(Backbone):
    r"""Post-norm transformer whose slots attend to themselves and to the slots before them, by content and distance.

    The score of a query in slot i for a key in slot j is `(q_i + u) . k_j + (q_i + v) . W r_{i-j}` over the root of
    the head's width, where `r` are sinusoids of the distance; u and v are shared by all blocks. So the order
    is felt through what comes before and through how far, whatever the position table.

    A class token, where it is read, stands in front: every slot attends to it, and it attends to all slots, at
    distances below zero.

    Shapes:
        b: images.  n: patches.  d: width.
    Args:
        spec: shape of the images.
        patch_size: side of a patch in pixels.
        width: length of a token's feature vector, a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the MLP in a block, in multiples of `width`, at least one neuron.
        dropout: probability of leaving out an activation in training: of the tokens and the sinusoids at the
            beginning, behind either layer of an MLP, behind attention, and of the features.
        position: where a learned position table is added: to the item, to the slot, or nowhere.
        readout: features of the class token, mean over the slots, or of the last slot, which alone hears of all.
            There is a class token only where it is read.
    Raises:
        ValueError: if the patch size does not divide the image, or the heads do not divide the width.
    Source: Dai et al. 2019, arXiv:1901.02860, without its memory of earlier segments; as a backbone of learned
        orders, with a class token in front and a table that travels with the item, Kutscher et al. 2025,
        arXiv:2505.23751.
    Differs from source: the class token's distances are true ones, where the second source shifts its row as if it
        were causal, so that other queries' scores end up in it; sinusoids of the distance throughout, of which that
        source has a learned table as well; patches are embedded by one convolution, without norms, since a
        norm over a patch of one pixel leaves nothing.
    Cost: O(b depth n d (n + d)) time.
    Example:
        >>> spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)
        >>> txl = Txl(spec, patch_size=2, width=16, depth=2, num_heads=2, mlp_ratio=2.0, dropout=0.0,
        ...           position="item", readout="cls")
        >>> txl(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    stem = "patch_embed"

    def __init__(
        self,
        spec: DataSpec,
        *,
        patch_size: Side,
        width: PositiveInt,
        depth: PositiveInt,
        num_heads: Annotated[PositiveInt, Divides("width")],
        mlp_ratio: PositiveFloat,
        dropout: Dropout,
        position: Literal["item", "slot", "none"],
        readout: Literal["cls", "mean", "last"],
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide width={width}")
        self.set_grid(spec, patch_size)
        self.num_features = width
        self.position, self.readout = position, readout
        self.patch_embed = nn.Conv2d(spec.channels, width, patch_size, stride=patch_size)
        self.content_bias, self.distance_bias = (
            free_of_decay(nn.Parameter(0.02 * torch.randn(num_heads, width // num_heads))) for _ in range(2)
        )
        hidden = max(1, int(mlp_ratio * width))
        self.blocks = nn.ModuleList(Block(width, num_heads, hidden, dropout) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, spec.num_classes)
        self.cls_token = _table(1, width) if readout == "cls" else None
        # The class token needs no place of its own: it always stands in front.
        self.pos_embed = _table(self.num_items, width) if position != "none" else None

    def embed(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        items = self.patch_embed(inputs).flatten(2).mT
        return self._add_positions(items) if self.position == "item" else items

    def encode(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        return self.pool(self.tokens(items))

    def tokens(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b t d"]:
        tokens = self._add_positions(items) if self.position == "slot" else items
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        relations = self._relations(tokens)
        tokens = self.dropout(tokens)
        for block in self.blocks:
            tokens = block(tokens, relations)
        return self.norm(self.dropout(tokens))

    def pool(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b d"]:
        if self.readout == "mean":
            return tokens.mean(1)
        return tokens[:, 0 if self.readout == "cls" else -1]

    def items_of(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
        return tokens[:, int(self.cls_token is not None) :]

    @property
    def stages(self) -> Sequence[nn.Module]:
        return tuple(self.blocks)

    @property
    def item_positions(self) -> tuple[str, int, int] | None:
        return None if self.pos_embed is None else ("pos_embed", 0, 0)

    def _relations(self, tokens: Float[Tensor, "b t d"]) -> "Relations":
        """What all blocks know of the slots: who hears whom, and the sinusoids of every distance."""
        length = tokens.shape[1]
        is_later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        lowest = 0
        if self.cls_token is not None:
            is_later[0] = False
            lowest = 1 - length
        distances = torch.arange(length - 1, lowest - 1, -1, device=tokens.device)
        encodings = self.dropout(sinusoids(distances, tokens.shape[-1], dtype=tokens.dtype))
        return Relations(is_later, encodings, self.content_bias, self.distance_bias)

    def _add_positions(self, items: Tensor) -> Tensor:
        assert self.pos_embed is not None
        return items + self.pos_embed


class Relations(NamedTuple):
    """What the tokens of a sequence are to one another, the same in all blocks.

    Shapes:
        is_later: `[t, t]`, true where a query does not hear a key.  encodings: `[k, d]`, of distances one by one
        from t - 1 downwards, as far as they are heard.  content_bias, distance_bias: `[h, d / h]`, u and v.
    """

    is_later: Tensor
    encodings: Tensor
    content_bias: Tensor
    distance_bias: Tensor


class Block(nn.Module):
    """Relative attention, then an MLP; the sum with each branch is normed behind it."""

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = RelativeAttention(width, num_heads)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )
        self.mlp_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Float[Tensor, "b t d"], relations: Relations) -> Float[Tensor, "b t d"]:
        tokens = self.attention_norm(tokens + self.dropout(self.attention(tokens, relations)))
        return self.mlp_norm(tokens + self.mlp(tokens))


class RelativeAttention(nn.Module):
    """Attention whose scores are of content and of distance; without biases of its projections."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.distance, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )

    def forward(self, tokens: Float[Tensor, "b t d"], relations: Relations) -> Float[Tensor, "b t d"]:
        query, key, value = (self._heads(part(tokens)) for part in (self.query, self.key, self.value))
        distance = self._heads(self.distance(relations.encodings))
        by_content = query + relations.content_bias.unsqueeze(-2)
        by_distance = query + relations.distance_bias.unsqueeze(-2)
        # Scaled here, since the attention below scales what is of content alone.
        scores = relative_shift(by_distance @ distance.mT) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(relations.is_later, -torch.inf)
        mixed = F.scaled_dot_product_attention(by_content, key, value, attn_mask=scores)
        return self.out(mixed.transpose(-3, -2).flatten(-2))

    def _heads(self, features: Float[Tensor, "*b t d"]) -> Float[Tensor, "*b h t e"]:
        return features.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def sinusoids(distances: Tensor, width: int, *, dtype: torch.dtype) -> Float[Tensor, "k d"]:
    """Sines of a distance at geometrically falling frequencies, from 1 to about 1/10000 per slot, then its cosines.

    Args:
        distances: `[k]`, in slots, of either sign.
    Example:
        >>> sinusoids(torch.tensor([0, 1]), 2, dtype=torch.float64)
        tensor([[0.0000, 1.0000],
                [0.8415, 0.5403]], dtype=torch.float64)
    """
    exact = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, width, 2, device=distances.device, dtype=exact) / width
    angles = distances.to(exact).unsqueeze(-1) * 10000**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width].to(dtype)


def relative_shift(scores: Float[Tensor, "*b t k"]) -> Float[Tensor, "*b t t"]:
    """From scores by distance to scores by key: entry (i, j) is that of query i for distance i - j.

    Args:
        scores: of every query for the distances t - 1, t - 2, ..., at least down to 0. Where they end, what stands
            for keys further behind the query is of no meaning.
    Example:
        >>> relative_shift(torch.tensor([[1.0, 0.0, -1.0], [1.0, 0.0, -1.0]]))  # each score is its own distance
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    num_queries, num_distances = scores.shape[-2:]
    padded = F.pad(scores, (1, 0)).flatten(-2)
    return padded[..., num_queries:].unflatten(-1, (num_queries, num_distances))[..., :num_queries]


def _table(length: int, width: int) -> nn.Parameter:
    return free_of_decay(nn.Parameter(nn.init.trunc_normal_(torch.empty(1, length, width), std=0.02)))
