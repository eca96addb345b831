"""A trained model, read in the order in which it was trained to read its items."""

from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from permlab.errors import ConfigError
from permlab.model.base import Backbone
from permlab.permutation import check_order, gather_items
from permlab.record.stored import UNREADABLE_ARRAYS, read_arrays


class ReadOrder(nn.Module):
    """The order in which a trained model reads its items; none where that is their own."""

    order: Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(num_items))
        self.register_load_state_dict_post_hook(lambda module, _: module._check())
        self._check()

    def set(self, order: Int64[Tensor, " n"]) -> None:
        if order.shape != self.order.shape:
            raise ConfigError(f"task.dense: that model reads {len(order)} items, the data has {len(self.order)}")
        self.order.copy_(order)
        self._check()

    def _check(self) -> None:
        self.trivial = bool((self.order == torch.arange(len(self.order), device=self.order.device)).all())

    def forward(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return items if self.trivial else gather_items(items, self.order)


class Reading(nn.Module):
    """A backbone that reads its items in the order it was trained with."""

    def __init__(self, model: Backbone, read_order: ReadOrder) -> None:
        super().__init__()
        self.model, self.read_order = model, read_order

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.is_floating_point():
            inputs = inputs.to(next(self.model.parameters()).dtype)
        return self.model.read(self.read_order(self.model.embed(inputs)))


def read_item_order(run_dir: Path) -> Int64[Tensor, " n"]:
    """The order in which a run's model reads its items.

    Raises:
        ConfigError: if the run has none, or one for each image.
    """
    path = run_dir / "arrays" / "order.npz"
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        arrays = read_arrays(path)
        if "order" in arrays:
            order = torch.from_numpy(arrays["order"])
            check_order(order)
            return order
    except UNREADABLE_ARRAYS as error:
        raise ConfigError(f"task.dense={run_dir}: no readable arrays/order.npz ({error})") from error
    raise ConfigError(f"task.dense={run_dir}: its order depends on the image; prune a run with one order for all")
