"""Longformer over patches, from transformers: attention in a window, and a class token that hears all and all hear."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerLayer

from permlab.data.spec import DataSpec
from permlab.model.base import Backbone, free_of_decay
from permlab.option import Divides, Dropout, PositiveFloat, PositiveInt, Range, Side


class Longformer(Backbone):
    """Post-norm transformer whose slots attend to their neighbours, and to a class token in front.

    A slot hears half a window of tokens on either side, itself, and the class token; the class token hears all,
    by projections of its own. So the order decides who are neighbours, whatever the position table, unless half a
    window reaches from the first slot to the last, or one block alone is read through the class token. Who are
    neighbours stays so when the sequence is reversed, and so do then the features of the class token and the mean.

    Shapes:
        b: images.  n: patches.  d: width.
    Args:
        spec: shape of the images.
        patch_size: side of a patch in pixels.
        width: length of a token's feature vector, a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the MLP in a block, in multiples of `width`, at least one neuron.
        window: tokens that a slot hears besides itself and the class token, half on either side; even, and 4 at
            least, as transformers' chunks want it. The sequence is filled up to a multiple of it with tokens that
            nobody hears.
        dropout: probability of leaving out an activation in training: of the tokens at the beginning, of attention,
            and behind either branch.
        position: where a learned position table is added: to the item, to the slot, or nowhere.
        readout: features of the class token, mean over the slots, or of the last slot. The class token is in the
            sequence whatever is read.
    Raises:
        ValueError: if the patch size does not divide the image, the heads do not divide the width, or the window
            is odd.
    Source: Beltagy et al. 2020, arXiv:2004.05150, through transformers' `LongformerLayer`; as a backbone of learned
        orders, Kutscher et al. 2025, arXiv:2505.23751.
    Differs from source: keys have no biases, which a softmax takes off again; there is no token type, which is the
        same for all; the head has a norm in front, as the second source has, and patches are embedded by one
        convolution, without the norms that it has.
    Cost: O(b depth n d (window + d)) time.
    Example:
        >>> spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)
        >>> longformer = Longformer(spec, patch_size=2, width=16, depth=2, num_heads=2, mlp_ratio=2.0, window=4,
        ...                         dropout=0.0, position="item", readout="cls")
        >>> longformer(torch.rand(3, 1, 8, 8)).shape
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
        window: Annotated[int, Range(ge=4)],
        dropout: Dropout,
        position: Literal["item", "slot", "none"],
        readout: Literal["cls", "mean", "last"],
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide width={width}")
        if window % 2:
            raise ValueError(f"window={window} is odd, and has no half; nearest valid choice: {window - 1}")
        self.set_grid(spec, patch_size)
        self.num_features = width
        self.window, self.position, self.readout = window, position, readout
        config = LongformerConfig(
            attention_window=[window] * depth,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            intermediate_size=max(1, int(mlp_ratio * width)),
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            layer_norm_eps=1e-5,
        )
        self.patch_embed = nn.Conv2d(spec.channels, width, patch_size, stride=patch_size)
        self.embedding_norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, spec.num_classes)
        # The class token needs no place of its own in the table: it always stands in front.
        self.cls_token = _table(1, width)
        self.pos_embed = _table(self.num_items, width) if position != "none" else None

    @property
    def order_matters(self) -> bool:
        """Through a table added by slot, whichever slot is read last, or who hears whom before all are heard."""
        has_neighbours = self.window // 2 < self.num_items - 1
        is_read_behind_them = self.readout != "cls" or len(self.blocks) > 1
        return self.position == "slot" or self.readout == "last" or (has_neighbours and is_read_behind_them)

    @property
    def reversal_matters(self) -> bool:
        """Through a table added by slot or whichever slot is read last alone: windows reach as far ahead as back."""
        return self.position == "slot" or self.readout == "last"

    @property
    def idle_parameters(self) -> tuple[str, ...]:
        """The last block's projections of the slots where the class token is read, and of the class token otherwise."""
        kind = "" if self.readout == "cls" else "_global"
        attention = f"blocks.{len(self.blocks) - 1}.attention.self"
        parts = ("query{}.weight", "query{}.bias", "key{}.weight", "value{}.weight", "value{}.bias")
        return tuple(f"{attention}.{part.format(kind)}" for part in parts)

    def embed(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        items = self.patch_embed(inputs).flatten(2).mT
        return self._add_positions(items) if self.position == "item" else items

    def encode(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        return self.pool(self.tokens(items))

    def tokens(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b t d"]:
        slots = self._add_positions(items) if self.position == "slot" else items
        tokens = torch.cat([self.cls_token.expand(len(slots), -1, -1), slots], dim=1)
        tokens = self.dropout(self.embedding_norm(tokens))
        length = tokens.shape[1]
        tokens = functional.pad(tokens, (0, 0, 0, -length % self.window))
        # One for the token that is heard by all, below zero for those that nobody hears.
        roles = torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        roles[:, 0], roles[:, length:] = 1, -1
        for block in self.blocks:
            tokens = block(tokens, roles)
        return self.norm(tokens[:, :length])

    def pool(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b d"]:
        if self.readout == "mean":
            return self.items_of(tokens).mean(1)
        return tokens[:, 0 if self.readout == "cls" else self.num_items]

    def items_of(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
        """Without the class token in front, and what fills the sequence up inside of blocks."""
        return tokens[:, 1 : 1 + self.num_items]

    @property
    def stages(self) -> Sequence[nn.Module]:
        return tuple(self.blocks)

    @property
    def item_positions(self) -> tuple[str, int, int] | None:
        return None if self.pos_embed is None else ("pos_embed", 0, 0)

    def _add_positions(self, items: Tensor) -> Tensor:
        assert self.pos_embed is not None
        return items + self.pos_embed


class Block(LongformerLayer):
    """Transformers' layer, its keys without biases, from tokens to tokens."""

    def __init__(self, config: LongformerConfig, index: int) -> None:
        super().__init__(config, layer_id=index)
        for projection in (self.attention.self.key, self.attention.self.key_global):
            projection.bias = None  # type: ignore[assignment]

    def forward(self, tokens: Float[Tensor, "b t d"], roles: Tensor) -> Float[Tensor, "b t d"]:  # type: ignore[override]
        return super().forward(
            tokens,
            attention_mask=roles,
            is_index_masked=roles < 0,
            is_index_global_attn=roles > 0,
            is_global_attn=True,
        )[0]


def _table(length: int, width: int) -> nn.Parameter:
    return free_of_decay(nn.Parameter(nn.init.trunc_normal_(torch.empty(1, length, width), std=0.02)))
