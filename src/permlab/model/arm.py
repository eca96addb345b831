"""ARM: a Mamba over patches that scans rows and columns of the grid both ways."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from permlab.data.spec import DataSpec
from permlab.model.vim import ScanBackbone, SelectiveScans, drop_path_of, drop_path_rates
from permlab.ops.scan_order import scan_order
from permlab.option import AddedLater, Dropout, PositiveInt, Side, Verbatim


class Arm(ScanBackbone):
    """Mamba with four scans: patches, a class token in the middle, and blocks of scans and a gated MLP.

    Slots are laid on the grid row by row, in the order in which they are read. Two scans go through the rows, which
    is the sequence itself, forward and backward; two through the columns. So all four follow the order, on a grid
    of any shape. The class token has no place in the grid: it stands in the middle of either sequence.

    Every state-space layer forgets with distance, so the logits depend on the order of the items
    whatever the position table.

    Shapes:
        b: images.  n: patches.  d: width.
    Args:
        spec: shape of the images.
        patch_size: side of a patch in pixels.
        width: length of a token's feature vector.
        depth: number of blocks.
        num_states: states per channel of a scan.
        expand: channels of a scan, in multiples of `width`.
        conv_kernel: taps of the causal depthwise convolution in front of a scan.
        mlp_width: hidden width of the MLP in a block; two thirds of 4 `width` as published.
        drop_path: probability of leaving out the last block's branches in training; linear from 0 at the first.
        position: where the learned position table is added: to the item, to the slot, or nowhere.
        readout: features of the class token in the middle, mean over the slots, or of the last slot. The class
            token is in the sequence whatever is read.
        pretrained: start from weights under the names of OliverRensu/ARM, or ours: a `.safetensors` file, one of
            `torch.save`, or a folder with one. They are interpolated to the patch size, the grid and the
            channels of the data; the head is kept only if the number of classes is the same. Those from before
            fine-tuning have one scan, whose parameters begin all four. The published ones read images normalised
            by ImageNet's mean and deviation, and their mean. None: random weights.
        class_token: where it stands. `middle`, outside the grid; or `front`, a defect of the released code of the
            second source, whose scans still leave out the middle of the sequence: the class token is the first cell
            of the grid, the first half of the slots stand one cell further on, and the slot before the middle is
            outside.
    Raises:
        ValueError: if the patch size does not divide the image, or pretrained weights cannot be read or do not fit.
    Source: Ren et al. 2024, arXiv:2406.07537, the network that is fine-tuned; as a backbone of learned orders,
        Kutscher et al. 2025, arXiv:2505.23751.
    Differs from source: columns of any rectangle, where the published code has squares; the position table may be
        added by slot, or left out; the mean is over all slots, where the published one averages the means of the
        slots before and behind the class token, which differ in number where that of the slots is odd. Of the
        second source: the class token is in the middle, and the last token's features are read, where options say so.
    Cost: O(b depth n d (d + num_states)) time.
    Example:
        >>> spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=12)
        >>> arm = Arm(spec, patch_size=4, width=8, depth=1, num_states=4, expand=1, conv_kernel=4, mlp_width=16,
        ...           drop_path=0.0, position="item", readout="cls", pretrained=None)
        >>> arm(torch.rand(3, 1, 8, 12)).shape
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
        num_states: PositiveInt,
        expand: PositiveInt,
        conv_kernel: PositiveInt,
        mlp_width: PositiveInt,
        drop_path: Dropout,
        position: Literal["item", "slot", "none"],
        readout: Literal["cls", "mean", "last"],
        pretrained: Verbatim | None,
        class_token: Annotated[Literal["middle", "front"], AddedLater("middle")] = "middle",
    ) -> None:
        grid = spec.grid(patch_size)
        super().__init__(
            spec,
            (
                Block(GridScans(width, num_states, expand, conv_kernel, grid, depth=depth), width, mlp_width, rate)
                for rate in drop_path_rates(drop_path, depth)
            ),
            nn.LayerNorm(width),
            width=width,
            patch_size=patch_size,
            position=position,
            readout=readout,
            has_class=True,
            pretrained=pretrained,
            class_slot=0 if class_token == "front" else None,
        )

    @property
    def idle_parameters(self) -> tuple[str, ...]:
        """The last block's decays in scans that begin with the token that is read: it has no past there."""
        names: tuple[str, ...] = ()
        if self.readout == "last":
            names = ("A_b_log", "A_c_b_log")
        elif self.readout == "cls" and self.class_slot == 0:
            names = ("A_log", "A_c_log")
        return tuple(f"blocks.{len(self.blocks) - 1}.scans.{name}" for name in names)


class Block(nn.Module):
    """Pre-norm residual block: scans, then a gated MLP."""

    def __init__(self, scans: "GridScans", width: int, mlp_width: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.scans = nn.LayerNorm(width), scans
        self.norm2, self.mlp = nn.LayerNorm(width), GatedMlp(width, mlp_width)
        self.drop_path = drop_path_of(drop_path)

    def forward(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        tokens = tokens + self.drop_path(self.scans(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class GatedMlp(nn.Module):
    """SwiGLU: one projection, gated by silu of another, projected back; biases begin at zero."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in (self.w1, self.w2, self.w3):
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return self.w3(F.silu(self.w1(tokens)) * self.w2(tokens))


class GridScans(SelectiveScans):
    """Mean of four selective scans: rows forward and backward, columns forward (`_c`) and backward (`_c_b`).

    Tokens are the cells of a grid, row by row, around one in the middle that has no cell: the class token, if that
    stands there.

    Args:
        grid: rows and columns.
    """

    columns: Tensor
    ranks: Tensor

    def __init__(
        self,
        width: int,
        num_states: int,
        expand: int,
        conv_kernel: int,
        grid: tuple[int, int],
        *,
        depth: int,
    ) -> None:
        super().__init__(width, num_states, expand, conv_kernel, ("", "_b", "_c", "_c_b"), depth=depth)
        columns = column_order(*grid)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("ranks", columns.argsort(), persistent=False)

    def forward(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        x, z = self.in_proj(tokens).mT.chunk(2, dim=1)
        y = self._scan_both_ways(x, z, "", "_b")
        y = y + self._scan_both_ways(x[..., self.columns], z[..., self.columns], "_c", "_c_b")[..., self.ranks]
        return self.out_proj(y.mT / 4)


def column_order(height: int, width: int) -> Tensor:
    """Order that reads tokens column by column, of a grid whose slots stand row by row around a class token.

    Returns:
        Order of height * width + 1 tokens, the class token in the middle of both sequences.
    Example:
        >>> column_order(2, 3)  # rows [0 1 2] and [4 5 6], and 3 for the class token
        tensor([0, 4, 1, 3, 5, 2, 6])
    """
    middle = height * width // 2
    slots = scan_order("column", height, width)
    tokens = slots + (slots >= middle)
    return torch.cat([tokens[:middle], torch.tensor([middle]), tokens[middle:]])
