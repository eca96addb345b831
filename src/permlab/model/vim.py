"""Vision Mamba: a bidirectional state-space model over patches."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from permlab.data.spec import DataSpec
from permlab.model.base import Backbone, free_of_decay
from permlab.model.vim_checkpoint import from_published, is_published, load_fitting
from permlab.ops.selective_scan import selective_scan
from permlab.option import AddedLater, Dropout, PositiveInt, Side, Verbatim

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class Memory(NamedTuple):
    """What a mixer knows of the tokens it has read.

    Shapes:
        window: `[b, e, conv_kernel - 1]`, the last inputs of the convolution.  state: `[b, e, s]`, of the scan.
    """

    window: Tensor
    state: Tensor


class Progress(NamedTuple):
    """How far a sequence has been read: the number of slots, and the memory of each block."""

    num_slots: int
    memories: tuple[Memory, ...]


class ScanBackbone(Backbone):
    """Patches, a class token in the middle, a position table, and blocks that scan.

    Args:
        spec: shape of the images.
        blocks: from tokens to tokens; drawn one after the other, behind the patch embedding.
        norm: of the features.
        has_class: whether there is a class token.
        class_slot: its place in the sequence, from 0; None for the middle.
        patch_size, position, readout, pretrained: as `Vim` has them.
    """

    def __init__(
        self,
        spec: DataSpec,
        blocks: Iterable[nn.Module],
        norm: nn.Module,
        *,
        width: int,
        patch_size: int,
        position: str,
        readout: str,
        has_class: bool,
        pretrained: str | None,
        class_slot: int | None = None,
    ) -> None:
        super().__init__()
        self.set_grid(spec, patch_size)
        self.class_slot = self.num_items // 2 if class_slot is None else class_slot
        self.num_features = width
        self.position, self.readout = position, readout
        self.patch_embed = _patch_embedding(spec.channels, width, patch_size)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = nn.Linear(width, spec.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.cls_token = _table(1, width) if has_class else None
        self.pos_embed = _table(self.num_items + has_class, width) if position != "none" else None
        if pretrained is not None:
            load_fitting(pretrained, self)

    def embed(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        items = self.patch_embed(inputs).flatten(2).mT
        return self._add_positions(items) if self.position == "item" else items

    def encode(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        return self.pool(self.tokens(items))

    def tokens(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b t d"]:
        tokens = self._add_positions(items) if self.position == "slot" else items
        if self.cls_token is not None:
            # The table's last entry is the class token's.
            token = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, -1:]
            before, behind = tokens[:, : self.class_slot], tokens[:, self.class_slot :]
            tokens = torch.cat([before, token.expand(len(tokens), -1, -1), behind], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def pool(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b d"]:
        if self.readout == "mean":
            return self.items_of(tokens).mean(1)
        return tokens[:, self.class_slot if self.readout == "cls" else -1]

    def items_of(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
        if self.cls_token is None:
            return tokens
        return torch.cat([tokens[:, : self.class_slot], tokens[:, self.class_slot + 1 :]], dim=1)

    @property
    def stages(self) -> Sequence[nn.Module]:
        return tuple(self.blocks)

    @property
    def item_positions(self) -> tuple[str, int, int] | None:
        return None if self.pos_embed is None else ("pos_embed", 0, int(self.cls_token is not None))

    def adapt(self, state: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """As of every backbone; tensors under their published names get ours."""
        return super().adapt(from_published(state) if is_published(state) else state, grid)

    def _add_positions(self, items: Tensor) -> Tensor:
        assert self.pos_embed is not None
        return items + self.pos_embed[:, : self.num_items]


class Vim(ScanBackbone):
    """Vision Mamba: patches, a class token in the middle, and blocks that scan both ways.

    Every state-space layer forgets with distance, so the logits depend on the order of the items
    whatever the position table.

    Shapes:
        b: images.  n: patches.  d: width.
    Args:
        spec: shape of the images.
        patch_size: side of a patch in pixels.
        width: length of a token's feature vector.
        depth: number of blocks.
        num_states: states per channel of the scan.
        expand: channels of the scan, in multiples of `width`.
        conv_kernel: taps of the causal depthwise convolution in front of the scan.
        drop_path: probability of leaving out the last block in training; linear from 0 at the first.
        position: where the learned position table is added: to the item, to the slot, or nowhere.
        readout: features of the class token in the middle, mean over the slots, or of the last slot.
        direction: `bidirectional`, or `forward`, in which a slot hears only of those before it: the
            class token then hears of the first half of the items alone, so read the last slot.
        pretrained: start from weights under the names of hustvl/Vim, or ours: a `.safetensors` file, one of
            `torch.save`, or a folder with one. They are interpolated to the patch size, the grid and the
            channels of the data; the head is kept only if the number of classes is the same. The published ones
            read images normalised by ImageNet's mean and deviation. None: random weights.
    Raises:
        ValueError: if the patch size does not divide the image, or pretrained weights cannot be read or do not fit.
    Source: Zhu et al. 2024, arXiv:2401.09417 (bidirectional block, class token, halved sum of the
        directions, initialisation of the patches); Gu and Dao 2023, arXiv:2312.00752 (block and its initialisation).
    Differs from source: the position table may be added by slot, or left out, and there is a class
        token only where it is read. Parameter names are those of `mamba_ssm.Mamba` and of Vim.
    Cost: O(b depth n d (d + num_states)) time.
    Example:
        >>> spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)
        >>> vim = Vim(spec, patch_size=4, width=8, depth=1, num_states=4, expand=2, conv_kernel=4, drop_path=0.0,
        ...           position="item", readout="cls", direction="bidirectional")
        >>> vim(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    stem = "patch_embed"
    blocks_of = "vim"

    def __init__(
        self,
        spec: DataSpec,
        *,
        patch_size: Side,
        width: PositiveInt,
        depth: PositiveInt,
        num_states: PositiveInt,
        expand: PositiveInt,
        conv_kernel: PositiveInt,
        drop_path: Dropout,
        position: Literal["item", "slot", "none"],
        readout: Literal["cls", "mean", "last"],
        direction: Literal["bidirectional", "forward"],
        pretrained: Annotated[Verbatim | None, AddedLater(None)] = None,
    ) -> None:
        rates = drop_path_rates(drop_path, depth)
        super().__init__(
            spec,
            (
                Block(Mixer(width, num_states, expand, conv_kernel, direction, depth=depth), width, rate)
                for rate in rates
            ),
            nn.RMSNorm(width, eps=1e-5),
            width=width,
            patch_size=patch_size,
            position=position,
            readout=readout,
            has_class=readout == "cls",
            pretrained=pretrained,
        )
        self.direction = direction

    @property
    def idle_parameters(self) -> tuple[str, ...]:
        """The last block's backward decay where the last slot is read: backward that slot comes first, with no past."""
        if self.readout != "last" or self.direction != "bidirectional":
            return ()
        return (f"blocks.{len(self.blocks) - 1}.mixer.A_b_log",)

    def step(
        self, items: Float[Tensor, "b l d"], progress: Progress | None = None
    ) -> tuple[Float[Tensor, "b l d"], Progress]:
        """Read the next slots of a sequence, one or more, at a cost that does not grow with those before.

        Args:
            items: for the next slots, from `embed`, in the order in which they are read.
            progress: what the step before returned; None at the beginning.
        Returns:
            Features of these slots, as `tokens` gives them for the whole sequence; and what the next step takes.
        Raises:
            ValueError: if slots hear of later ones (`direction=bidirectional`), or there is a class token.
        Example:
            >>> spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)
            >>> vim = Vim(spec, patch_size=4, width=8, depth=1, num_states=4, expand=2, conv_kernel=4, drop_path=0.0,
            ...           position="item", readout="last", direction="forward")
            >>> items = vim.embed(torch.rand(3, 1, 8, 8))
            >>> first, progress = vim.step(items[:, :3])
            >>> second, _ = vim.step(items[:, 3:], progress)
            >>> torch.allclose(torch.cat([first, second], 1), vim.tokens(items), atol=1e-5)
            True
        """
        if self.direction != "forward" or self.cls_token is not None:
            raise ValueError(
                f"direction={self.direction}, readout={self.readout}: slots can be read one after the other with "
                "direction=forward and readout=last or mean alone"
            )
        start, memories = progress or (0, (None,) * len(self.blocks))
        tokens, after = items, []
        if self.position == "slot":
            assert self.pos_embed is not None
            tokens = tokens + self.pos_embed[:, start : start + tokens.shape[1]]
        for block, memory in zip(self.blocks, memories, strict=True):
            tokens, memory = block.step(tokens, memory)  # type: ignore[operator]
            after.append(memory)
        return self.norm(tokens), Progress(start + items.shape[1], tuple(after))


class Block(nn.Module):
    """Pre-norm residual block around a mixer."""

    def __init__(self, mixer: "Mixer", width: int, drop_path: float) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(width, eps=1e-5), mixer
        self.drop_path = drop_path_of(drop_path)

    def forward(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return tokens + self.drop_path(self.mixer(self.norm(tokens)))

    def step(self, tokens: Float[Tensor, "b l d"], memory: Memory | None) -> tuple[Float[Tensor, "b l d"], Memory]:
        mixed, memory = self.mixer.step(self.norm(tokens), memory)
        return tokens + self.drop_path(mixed), memory


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Probabilities of leaving out a block's branches, linear from 0 at the first to the given one at the last."""
    return [last * index / max(1, depth - 1) for index in range(depth)]


def drop_path_of(probability: float) -> nn.Module:
    """Leaves out a branch in training, each sample for itself."""
    if probability == 0:
        return nn.Identity()
    from timm.layers import DropPath  # seconds to import, and rarely wanted

    return DropPath(probability)


class SelectiveScans(nn.Module):
    """Gated selective scans in several directions, each with its own convolution and scan parameters.

    Their parameters have Vim's names: those of the second direction are `conv1d_b`, `x_proj_b`, `dt_proj_b`,
    `A_b_log`, `D_b`. Projections in and out are shared.
    """

    def __init__(
        self, width: int, num_states: int, expand: int, conv_kernel: int, suffixes: Sequence[str], *, depth: int
    ) -> None:
        super().__init__()
        inner = expand * width
        self.dt_rank, self.num_states = math.ceil(width / 16), num_states
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        for suffix in suffixes:
            conv = nn.Conv1d(inner, inner, conv_kernel, groups=inner, padding=conv_kernel - 1)
            x_proj = nn.Linear(inner, self.dt_rank + 2 * num_states, bias=False)
            rates = torch.arange(1, num_states + 1, dtype=torch.float32).log().repeat(inner, 1)
            setattr(self, f"conv1d{suffix}", conv)
            setattr(self, f"x_proj{suffix}", x_proj)
            setattr(self, f"dt_proj{suffix}", _step_projection(self.dt_rank, inner))
            setattr(self, f"A{suffix}_log", free_of_decay(nn.Parameter(rates)))
            setattr(self, f"D{suffix}", free_of_decay(nn.Parameter(torch.ones(inner))))
        self.out_proj = nn.Linear(inner, width, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)

    def _scan(self, x: Float[Tensor, "b e l"], z: Float[Tensor, "b e l"], suffix: str) -> Float[Tensor, "b e l"]:
        u = F.silu(getattr(self, f"conv1d{suffix}")(x)[..., : x.shape[-1]])
        bias = getattr(self, f"dt_proj{suffix}").bias
        return selective_scan(*self._coefficients(u, suffix), z=z, delta_bias=bias, delta_softplus=True)

    def _scan_both_ways(
        self, x: Float[Tensor, "b e l"], z: Float[Tensor, "b e l"], forward: str, backward: str
    ) -> Float[Tensor, "b e l"]:
        """Sum of a scan from the first token to the last and of one back, by the suffixes of their parameters."""
        return self._scan(x, z, forward) + self._scan(x.flip(-1), z.flip(-1), backward).flip(-1)

    def _coefficients(
        self, u: Float[Tensor, "b e l"], suffix: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The scan's u, delta, A, B, C and D."""
        x_proj, dt_proj = getattr(self, f"x_proj{suffix}"), getattr(self, f"dt_proj{suffix}")
        rates = getattr(self, f"A{suffix}_log")
        step, B, C = x_proj(u.mT).mT.split([self.dt_rank, self.num_states, self.num_states], dim=1)
        A = -rates.float().exp() if rates.dtype != torch.float64 else -rates.exp()
        return u, dt_proj(step.mT).mT, A, B, C, getattr(self, f"D{suffix}")


class Mixer(SelectiveScans):
    """Selective scan forward and, with `direction=bidirectional`, backward."""

    A_log: nn.Parameter
    A_b_log: nn.Parameter

    def __init__(
        self, width: int, num_states: int, expand: int, conv_kernel: int, direction: str, *, depth: int
    ) -> None:
        suffixes = ("", "_b") if direction == "bidirectional" else ("",)
        super().__init__(width, num_states, expand, conv_kernel, suffixes, depth=depth)
        self.is_bidirectional = direction == "bidirectional"

    def forward(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        x, z = self.in_proj(tokens).mT.chunk(2, dim=1)
        y = self._scan_both_ways(x, z, "", "_b") / 2 if self.is_bidirectional else self._scan(x, z, "")
        return self.out_proj(y.mT)

    def step(self, tokens: Float[Tensor, "b l d"], memory: Memory | None) -> tuple[Float[Tensor, "b l d"], Memory]:
        """Mix the next tokens of a sequence with what is remembered of those before; forward only."""
        x, z = self.in_proj(tokens).mT.chunk(2, dim=1)
        conv, bias = getattr(self, "conv1d"), getattr(self, "dt_proj").bias  # noqa: B009 (their names are made up above)
        length = conv.kernel_size[0] - 1
        window = x.new_zeros(*x.shape[:2], length) if memory is None else memory.window
        x = torch.cat([window, x], dim=-1)
        u = F.silu(F.conv1d(x, conv.weight, conv.bias, groups=conv.groups))
        y, state = selective_scan(
            *self._coefficients(u, ""),
            z=z,
            delta_bias=bias,
            delta_softplus=True,
            initial_state=None if memory is None else memory.state,
            return_last_state=True,
        )
        return self.out_proj(y.mT), Memory(x[..., x.shape[-1] - length :], state)


def _patch_embedding(channels: int, width: int, patch_size: int) -> nn.Conv2d:
    """LeCun's normal law, cut off at two deviations and of variance one over the number of inputs; no bias at first."""
    embedding = nn.Conv2d(channels, width, patch_size, stride=patch_size)
    # The law that is left between -2 and 2 has this deviation.
    std = (channels * patch_size**2) ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(embedding.weight, std=std, a=-2 * std, b=2 * std)
    assert embedding.bias is not None
    nn.init.zeros_(embedding.bias)
    return embedding


def _table(length: int, width: int) -> nn.Parameter:
    return free_of_decay(nn.Parameter(nn.init.trunc_normal_(torch.empty(1, length, width), std=0.02)))


class StepProjection(nn.Linear):
    """Projection to step sizes, whose bias the scan adds."""

    def forward(self, input: Float[Tensor, "b l r"]) -> Float[Tensor, "b l e"]:
        return F.linear(input, self.weight)


def _step_projection(rank: int, inner: int) -> StepProjection:
    """Projection whose bias makes softplus start log-uniform between `DT_MIN` and `DT_MAX`."""
    projection = StepProjection(rank, inner)
    nn.init.uniform_(projection.weight, -(rank**-0.5), rank**-0.5)
    low, high = math.log(DT_MIN), math.log(DT_MAX)
    step = torch.exp(torch.rand(inner) * (high - low) + low).clamp(min=DT_FLOOR)
    with torch.no_grad():
        projection.bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
    return projection
