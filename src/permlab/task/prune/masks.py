"""How the mask comes about in the channel order that was found: by the best scores, or learned."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from permlab.ops.schedule import parse
from permlab.sparsity.layer import SiteLayers, dense_rows
from permlab.sparsity.learned_mask import best_mask, num_patterns, prior_logits, soft_mask
from permlab.sparsity.mask import keep_best
from permlab.sparsity.proximal import shrink_to_two_of_four
from permlab.sparsity.weight_site import WeightSite
from permlab.task.prune.task import Prune

Layers = Mapping[str, SiteLayers]
Orders = Mapping[str, Int64[Tensor, " k"]]
# Added to the dense weights that ProxSparse divides by, as its code's default.
_ANCHOR_OFFSET = 0.1


class Masks(nn.Module):
    """Nothing is learned: under every order the best of each m by score (`task.mask=topk`).

    Learned masks belong to groups of m channels, whose members change with the order. So they are learned
    after it: at one step the orders are settled, from which on they stay as they are, and the masks start
    from what the pruner keeps in them.

    Args:
        task: the options.
        shapes: channels and rows of every site, by name.
    """

    lr: float = 0.0
    is_settled: Tensor

    def __init__(self, task: Prune, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.task, self.names = task, tuple(shapes)

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return False

    @property
    def settled(self) -> bool:
        """Whether orders stay as they are, and masks learn or have learned."""
        return False

    def orders(self) -> dict[str, Int64[Tensor, " k"]]:
        """Settled orders; none before."""
        return {}

    def settle(self, orders: Orders, layers: Layers) -> None:
        """Keep these orders, and start from the masks that the pruner makes in them."""
        raise NotImplementedError(f"{type(self).__name__} learns no mask")

    def advance(self, progress: float) -> None:
        """Set what changes with the progress of the masks' training, 0 at its first step and 1 at its last."""

    def values(self, layers: Layers, generator: torch.Generator | None) -> dict[str, Float[Tensor, "k r"]]:
        """Weights by item as training sees them, with their gradient."""
        raise NotImplementedError(f"{type(self).__name__} learns no mask")

    def penalty(self, layers: Layers) -> Tensor | float:
        """What joins the loss."""
        return 0.0

    def stepped(self) -> None:
        """What follows a step of the optimiser."""

    def keep(self) -> dict[str, Bool[Tensor, "k r"]]:
        """The n:m masks by item as they are now; none before the orders are settled."""
        return {}

    def statistics(self) -> dict[str, Tensor]:
        """What is logged of the masks' training."""
        return {}


class LearnedMasks(Masks):
    """What `MaskLLM` and `ProxSparse` have in common: settled orders in the state, a parameter for each site.

    Shapes:
        k: channels.  r: rows of all layers of the site.
    """

    def __init__(self, task: Prune, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(task, shapes)
        self.register_buffer("is_settled", torch.zeros((), dtype=torch.bool))
        self.learned = nn.ParameterDict()
        for name, (num_channels, num_rows) in shapes.items():
            self.register_buffer(f"order_{_key(name)}", torch.arange(num_channels))
            self.learned[_key(name)] = nn.Parameter(torch.zeros(self._shape(num_channels, num_rows)))

    def _shape(self, num_channels: int, num_rows: int) -> tuple[int, ...]:
        """Of what is learned for a site."""
        raise NotImplementedError(f"{type(self).__name__} defines no _shape")

    def _start(self, slots: Float[Tensor, "k r"], keep: Bool[Tensor, "k r"]) -> Tensor:
        """What is learned, at its start, from the dense weights and the pruner's mask, both by slot."""
        raise NotImplementedError(f"{type(self).__name__} defines no _start")

    def _keep(self, learned: Tensor) -> Bool[Tensor, "k r"]:
        """The mask of a site by slot."""
        raise NotImplementedError(f"{type(self).__name__} defines no _keep")

    @property
    def learns(self) -> bool:
        return True

    @property
    def settled(self) -> bool:
        return bool(self.is_settled)

    def order(self, name: str) -> Int64[Tensor, " k"]:
        return self.get_buffer(f"order_{_key(name)}")

    def orders(self) -> dict[str, Int64[Tensor, " k"]]:
        return {name: self.order(name).clone() for name in self.names} if self.settled else {}

    @torch.no_grad()
    def settle(self, orders: Orders, layers: Layers) -> None:
        n, m = self.task.n, self.task.m
        for name, order in orders.items():
            site, learned = layers[name], self.learned[_key(name)]
            pruned = site.stack(site.prune(order, n=n, m=m))
            keep = keep_best(pruned.abs()[order], n=n, m=m)
            self.order(name).copy_(order)
            learned.copy_(self._start(site.items[order], keep))
        self.is_settled.fill_(True)

    @torch.no_grad()
    def keep(self) -> dict[str, Bool[Tensor, "k r"]]:
        if not self.settled:
            return {}
        return {name: self._by_item(name, self._keep(self.learned[_key(name)])) for name in self.names}

    def _by_item(self, name: str, slots: Tensor) -> Tensor:
        return torch.empty_like(slots).index_copy(0, self.order(name), slots)


class MaskLLM(LearnedMasks):
    """A law over the n:m patterns of every group, whose relaxed draws mask the frozen weights.

    The mask is the likeliest pattern. The loss is given the squared weights that a draw keeps, so that
    gradients do not vanish with them; that reward falls to 0 over the training.

    Source: Fang et al. 2024, arXiv:2409.17481, and its code.
    Differs from source: no random logits at the start, so that the first mask is the prior's; no weight
        decay of the logits; the order of the channels; any n:m with few enough patterns.
    Cost: C(m, n) / m logits for each weight, of which a step keeps one copy for the gradient.
    """

    def __init__(self, task: Prune, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(task, shapes)
        self.lr = task.gumbel_lr
        self._scales, self._temperatures = parse(task.gumbel_scale), parse(task.gumbel_temperature)
        self._kept: Tensor | float = 0.0
        self._certainty: list[Tensor] = []
        self.advance(0.0)

    def _shape(self, num_channels: int, num_rows: int) -> tuple[int, ...]:
        return num_channels // self.task.m, num_patterns(self.task.n, self.task.m), num_rows

    def _start(self, slots: Float[Tensor, "k r"], keep: Bool[Tensor, "k r"]) -> Tensor:
        return prior_logits(keep, n=self.task.n, m=self.task.m, strength=self.task.gumbel_prior)

    def _keep(self, learned: Tensor) -> Bool[Tensor, "k r"]:
        return best_mask(learned, n=self.task.n, m=self.task.m)

    def advance(self, progress: float) -> None:
        self.scale, self.temperature = self._scales.at(progress), self._temperatures.at(progress)
        self.reward = self.task.gumbel_reward * (1 - progress)

    def values(self, layers: Layers, generator: torch.Generator | None) -> dict[str, Float[Tensor, "k r"]]:
        found, self._kept, self._certainty = {}, 0.0, []
        for name in self.names:
            mask, weights = soft_mask(
                self.learned[_key(name)],
                n=self.task.n,
                m=self.task.m,
                scale=self.scale,
                temperature=self.temperature,
                generator=generator,
            )
            found[name] = layers[name].items * self._by_item(name, mask)
            self._certainty.append(weights.detach().amax(1).mean())
            if self.reward:
                self._kept = self._kept + found[name].square().sum()
        return found

    def penalty(self, layers: Layers) -> Tensor | float:
        kept, self._kept = self._kept, 0.0  # and with it the graph
        return -self.reward * kept

    def statistics(self) -> dict[str, Tensor]:
        return {"certainty": torch.stack(self._certainty).mean()} if self._certainty else {}


class ProxSparse(LearnedMasks):
    """Weights that learn, and are shrunk towards two of four after every step; only their mask is used.

    The mask keeps the two largest of each four learned weights, and is applied to the dense ones.

    Source: Liu et al. 2025, arXiv:2502.00258, and its code.
    Differs from source: the proximal step is exact (`permlab.sparsity.proximal`); the order of the channels.
    Cost: a copy of all weights that learns, and a proximal step on it after every step of the optimiser.
    """

    def __init__(self, task: Prune, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(task, shapes)
        self.lr = task.prox_lr

    def _shape(self, num_channels: int, num_rows: int) -> tuple[int, ...]:
        return num_channels, num_rows

    def _start(self, slots: Float[Tensor, "k r"], keep: Bool[Tensor, "k r"]) -> Tensor:
        return slots

    def _keep(self, learned: Tensor) -> Bool[Tensor, "k r"]:
        return keep_best(learned.abs(), n=self.task.n, m=self.task.m)

    def values(self, layers: Layers, generator: torch.Generator | None) -> dict[str, Float[Tensor, "k r"]]:
        return {name: self._by_item(name, self.learned[_key(name)]) for name in self.names}

    def penalty(self, layers: Layers) -> Tensor | float:
        """Squared distance to the dense weights of those that are not about to go."""
        if not self.task.prox_anchor:
            return 0.0
        return self.task.prox_anchor * torch.stack([self._drift(name, layers[name]) for name in self.names]).sum()

    def _drift(self, name: str, site: SiteLayers) -> Tensor:
        learned, dense = self.learned[_key(name)], site.items[self.order(name)]
        offset = torch.where(dense < 0, -_ANCHOR_OFFSET, _ANCHOR_OFFSET)
        return (learned / (dense + offset) * (learned - dense)).square().sum()

    @torch.no_grad()
    def stepped(self) -> None:
        for weights in self.learned.values():
            weights.copy_(shrink_to_two_of_four(weights, self.task.prox_penalty))

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        counts = [(w.unflatten(0, (-1, 4)) != 0).sum(1).le(2).float().mean() for w in self.learned.values()]
        return {"groups_done": torch.stack(counts).mean()}


KINDS: Mapping[str, type[Masks]] = {"topk": Masks, "maskllm": MaskLLM, "proxsparse": ProxSparse}


def masks_of(task: Prune, model: nn.Module, sites: Sequence[WeightSite]) -> Masks:
    """Masks of the kind that the task asks for, for these sites of a model."""
    rows = {site.name: sum(len(dense_rows(model, reader)) for reader in site.readers) * site.repeats for site in sites}
    return KINDS[task.mask](task, {site.name: (site.num_items, rows[site.name]) for site in sites})


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's name holds no dot
