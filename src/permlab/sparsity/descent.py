"""Descent of the loss among orders: at every step many swaps that a running mean of its gradient proposes are made."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from permlab.sparsity.polish import Orders, Swappable, Values, choose_swaps, propose_swaps


class Descent:
    """Orders that change by a set of swaps at every step, none of which is tried before it is made.

    A step is given the gradient of the loss on some samples for all weights, pruned ones included.
    Averaged over the steps with a falling memory, it tells what switching a weight on does to the
    loss. Of pairs of channels drawn at random at every site those are exchanged whose new masks are
    predicted to lower the loss most, no block of m being touched twice. Their number falls linearly
    from a part of all blocks to one swap, so that the loss may rise on the way: `best` holds the
    orders in which the round of the lowest loss began, `losses` the sum of the losses of every round.

    Args:
        sites: by name.
        orders: where to start.
        n, m: n kept of every m.
        num_steps: steps of the whole descent.
        share: swaps at the first step, at most, as a part of the blocks of m of all sites.
        round_length: steps whose samples, together, are all there are.
        momentum: weight of the past in the running mean of the gradient.
        num_proposals: pairs drawn for each site and step.
        seed: of the pairs.
    Source: this repository; the prediction is that of `permlab.sparsity.polish`.
    Cost: a loss with its gradient on some samples, and O(num_proposals m r) for each site and step; memory of one
        more copy of the weights.
    """

    def __init__(
        self,
        sites: Mapping[str, Swappable],
        orders: Orders,
        *,
        n: int,
        m: int,
        num_steps: int,
        share: float,
        round_length: int = 1,
        momentum: float = 0.8,
        num_proposals: int = 256,
        seed: int = 0,
    ) -> None:
        self.sites, self.n, self.m, self.num_steps = sites, n, m, num_steps
        self.share, self.round_length = share, round_length
        self.momentum, self.num_proposals, self.seed = momentum, num_proposals, seed
        self.start = _copy(orders)
        self.orders, self.began, self.best = _copy(orders), _copy(orders), _copy(orders)
        self.gradients: Values = {}
        self.step, self.loss = 0, 0.0
        self.losses: list[float] = []

    @torch.no_grad()
    def advance(self, loss: float, gradient: Values) -> int:
        """Make a step.

        Args:
            loss: on the step's samples, at the present orders; comparable between rounds only.
            gradient: of it for the weights of every site, by item.
        Returns:
            The number of swaps.
        """
        self.loss += loss
        self._remember(gradient)
        is_end = (self.step + 1) % self.round_length == 0
        if is_end and self.loss < min(self.losses, default=math.inf):
            self.best = self.began
        swaps = choose_swaps((swap for _, swap in self._proposals()), self.m, self._count())
        for name, first, second in swaps:
            self.orders[name][[first, second]] = self.orders[name][[second, first]]
        self.step += 1
        if is_end:
            self.began, self.loss, self.losses = _copy(self.orders), 0.0, [*self.losses, self.loss]
        return len(swaps)

    def _remember(self, gradient: Values) -> None:
        for name in self.orders:
            mean, new = self.gradients.get(name), gradient[name]
            self.gradients[name] = new.clone() if mean is None else mean.lerp_(new, 1 - self.momentum)

    def _proposals(self) -> list[tuple[float, tuple[str, int, int]]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.step)
        return propose_swaps(self.sites, self.orders, self.gradients, self.n, self.m, self.num_proposals, generator)

    def _count(self) -> int:
        num_blocks = sum(len(order) // self.m for order in self.orders.values())
        share = self.share * (1 - self.step / self.num_steps)
        return max(1, round(share * num_blocks))

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from: plain containers of tensors and numbers."""
        names = ("start", "orders", "began", "best", "gradients", "step", "loss", "losses")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: if it is of another descent; nothing has changed then.
        """
        try:
            same = all(torch.equal(order.cpu(), state["start"][name].cpu()) for name, order in self.start.items())
            orders, began, best, gradients = (
                {name: state[kind][name].to(order.device) for name, order in self.orders.items()}
                for kind in ("orders", "began", "best", "gradients")
            )
            step, loss, losses = int(state["step"]), float(state["loss"]), [float(value) for value in state["losses"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no state of a descent ({type(error).__name__}: {error})") from error
        if not same or not 0 <= step <= self.num_steps:
            raise ValueError("the state is of a descent from other orders, or of another length")
        self.orders, self.began, self.best, self.gradients = orders, began, best, gradients
        self.step, self.loss, self.losses = step, loss, losses


def _copy(orders: Orders) -> Orders:
    return {name: order.clone() for name, order in orders.items()}
