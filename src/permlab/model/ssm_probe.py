"""A linear time-invariant state-space probe: the smallest model to which the order matters."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from permlab.data.spec import DataSpec
from permlab.model.base import Backbone, free_of_decay, patchify
from permlab.option import PositiveInt, Range, Side

# Keeps every decay below one even where softplus underflows; a memory of a million slots loses nothing.
_MIN_RATE = 1e-6


class SsmProbe(Backbone):
    r"""Diagonal linear state-space model over raw patches, with a linear classifier on its final state.

    State s follows `h_s[t] = a_s h_s[t-1] + w_s . x[t]` with a decay `a_s = exp(-softplus(dt_s))` in
    [0, 1) whatever the parameter's value, so what is read last weighs most. Linear and time-invariant,
    it is computed as one weighted sum over slots: no loop, and no nonlinearity before the layer norm.
    The initial dt are evenly spaced, so the states start with memories of different lengths.

    Items are the patches' own values. A position table adds the same vector to the state of every image
    read in one order, so unlike in a transformer it does not make up for an unfavourable order.

    Shapes:
        b: images.  n: patches.  d: channels * patch_size^2.  g: directions.  s: states per direction.
    Args:
        spec: shape of the images.
        patch_size: side of a patch in pixels.
        num_states: states per direction, at least 2 in all.
        dt_min: smallest initial dt, the longest memory: at -5 about 150 slots.
        dt_max: largest initial dt, the shortest memory: at 0.5 about one slot.
        position: where a learned position table is added: to the item, to the slot, or nowhere.
        readout: the state after the last slot, or the mean of the states after each slot.
        direction: from the first slot to the last, or also back, with parameters of its own.
    Raises:
        ValueError: if the patch size does not divide the image, there is one state only, or dt_min exceeds dt_max.
    Source: SSMProbe, Wang 2026, arXiv:2605.00915.
    Differs from source: a reconstruction of ours from the abstract, neither code nor equations being at
        hand. Real decays, their initial range and the layer norm are our choices, and the items are raw
        pixels where the source reads frozen features of a pretrained encoder.
    Cost: O(b n d g s) time, one matrix product; O(n d g s) memory.
    Example:
        >>> spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)
        >>> probe = SsmProbe(spec, patch_size=2, num_states=4, dt_min=-5.0, dt_max=0.5,
        ...                  position="none", readout="last", direction="forward")
        >>> probe(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        patch_size: Side,
        num_states: PositiveInt,
        dt_min: Annotated[float, Range(ge=-30, le=30)],
        dt_max: Annotated[float, Range(ge=-30, le=30)],
        position: Literal["item", "slot", "none"],
        readout: Literal["last", "mean"],
        direction: Literal["forward", "bidirectional"],
    ) -> None:
        super().__init__()
        if dt_min > dt_max:
            raise ValueError(f"dt_min {dt_min} exceeds dt_max {dt_max}")
        num_directions = 2 if direction == "bidirectional" else 1
        if num_directions * num_states < 2:
            raise ValueError(f"num_states={num_states}: the layer norm over one state alone is constant")
        self.set_grid(spec, patch_size)
        self.num_features = spec.channels * patch_size**2
        self.patch_size, self.position, self.readout = patch_size, position, readout
        dt = torch.linspace(dt_min, dt_max, num_states).repeat(num_directions, 1)
        self.dt = free_of_decay(nn.Parameter(dt))
        weight = torch.randn(num_directions, num_states, self.num_features)
        self.weight = nn.Parameter(weight / self.num_features**0.5)
        self.position_table = None
        if position != "none":
            table = 0.02 * torch.randn(self.num_items, self.num_features)
            self.position_table = free_of_decay(nn.Parameter(table))
        self.norm = nn.LayerNorm(num_directions * num_states)
        self.head = nn.Linear(num_directions * num_states, spec.num_classes)

    @property
    def decay(self) -> Float[Tensor, "g s"]:
        """Factor by which each state shrinks per slot, in [0, 1)."""
        return torch.exp(-self._rate())

    def _rate(self) -> Float[Tensor, "g s"]:
        # In half precision a slow decay rounds to one, which would make the memory unbounded.
        dt = self.dt.to(torch.promote_types(self.dt.dtype, torch.float32))
        return functional.softplus(dt) + _MIN_RATE

    def slot_weights(self, num_slots: int) -> Float[Tensor, "g s n"]:
        """How much each slot adds to the read-out of each state, per unit of its input."""
        rate = self._rate().unsqueeze(-1)
        lags = torch.arange(num_slots, device=rate.device)
        if self.readout == "mean":
            # A slot stays in its own state and the `lag` that follow: the sum of a geometric series.
            weights = torch.expm1(-rate * (lags + 1)) / torch.expm1(-rate) / num_slots
        else:
            weights = torch.exp(-rate * lags)
        return torch.stack([weights[0].flip(-1), *weights[1:]])

    def embed(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        items = patchify(inputs, self.patch_size)
        return self._add_positions(items) if self.position == "item" else items

    def encode(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b f"]:
        if self.position == "slot":
            items = self._add_positions(items)
        weights = self.slot_weights(items.shape[1]).unsqueeze(-1) * self.weight.unsqueeze(-2)
        return self.norm(items.flatten(1) @ weights.to(items.dtype).flatten(2).flatten(0, 1).T)

    @property
    def item_positions(self) -> tuple[str, int, int] | None:
        return None if self.position_table is None else ("position_table", 0, 0)

    def _add_positions(self, items: Tensor) -> Tensor:
        assert self.position_table is not None
        return items + self.position_table
