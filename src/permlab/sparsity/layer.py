"""The tensors of a site: weights, input statistics and scores of the layers that share an order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from permlab.sparsity.calibrate import InputStatistics
from permlab.sparsity.importance import magnitude, ria, saliency_of, sparsegpt, wanda
from permlab.sparsity.mask import hard_mask
from permlab.sparsity.search_inputs import SearchInputs
from permlab.sparsity.weight_site import Reader, WeightSite

PRUNERS = ("magnitude", "wanda", "ria", "sparsegpt")
# Statistics of a channel that a cost network or a scorer may read.
NUM_FEATURES = 6


@dataclass
class SiteLayers:
    """Dense weights of a site's layers with their statistics, in the layout in which orders act on them.

    The weights are the model's own, in its precision. What stands for them by item and their scores, both in
    float32 at least, follow from them and the statistics' vectors: they are made whenever they are
    asked for, unless the layers are told to keep them.

    Shapes:
        k: items of the site, in original order.  r: rows of all layers, one after the other.
    Args:
        site: where the order acts.
        weights: dense weight rows `[out, in]` of every reader.
        statistics: of every reader's input.
        pruner: importance of a weight, one of `PRUNERS`.
        power: of the input norm in `ria`.
        damping: of the Hessian in `sparsegpt`.
        keep: items and scores once they are made.
    Raises:
        ValueError: if a weight or a statistic is not finite.
    """

    site: WeightSite
    weights: Sequence[Float[Tensor, "_ i"]]
    statistics: Sequence[InputStatistics]
    pruner: str
    power: float
    damping: float
    keep: bool = False
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for reader, weight in zip(self.site.readers, self.weights, strict=True):
            if not torch.isfinite(weight).all():
                raise ValueError(f"the weights of layer {reader.module} are not finite")
        if self.pruner == "sparsegpt":
            for part in self.statistics:
                part.inverse_diagonal(self.damping)  # what the scores need when the Hessian is gone

    @property
    def items(self) -> Float[Tensor, "k r"]:
        """Weights, channels before rows."""
        return self._made("items", self.weights)

    @property
    def scores(self) -> Float[Tensor, "k r"]:
        """Importance of every weight, channels before rows."""
        if "scores" in self._kept:
            return self._kept["scores"]
        pairs = zip(self.weights, self.statistics, strict=True)
        return self._made("scores", [self._score(*pair) for pair in pairs])

    def _made(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        made = self.stack([_wide(part) for part in parts])
        if self.keep:
            self._kept[name] = made
        return made

    @property
    def num_weights(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    def forget(self) -> None:
        """Keep neither items nor scores from here on."""
        self.keep, self._kept = False, {}

    def bring(self, model: nn.Module) -> None:
        """To where a model is that has been moved: its weights, and with them all that is kept of them."""
        self.weights = [dense_rows(model, reader) for reader in self.site.readers]
        self._kept = {name: made.to(self.weights[0].device) for name, made in self._kept.items()}
        for part in self.statistics:
            part.to(self.weights[0].device)

    def _score(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, statistics.norm.dtype))
        if self.pruner == "magnitude":
            return magnitude(wide)
        if self.pruner == "wanda":
            return wanda(wide, statistics.norm)
        if self.pruner == "ria":
            return ria(wide, statistics.norm, power=self.power)
        return saliency_of(wide, statistics.inverse_diagonal(self.damping))

    def stack(self, parts: Sequence[Tensor]) -> Float[Tensor, "k r"]:
        """Values by item, from weight rows of every reader."""
        return torch.cat([self.site.to_items(part) for part in parts]).mT.contiguous()

    def unstack(self, values: Float[Tensor, "k r"]) -> list[Float[Tensor, "_ i"]]:
        """Weight rows of every reader, from values by item."""
        lengths = [len(weight) * self.site.repeats for weight in self.weights]
        return [self.site.from_items(part) for part in values.mT.split(lengths)]

    def search_inputs(self, *, n: int, m: int, num_groups: int, seed: int) -> SearchInputs:
        """What a search is given; a layer with several query heads for a key-value head counts as that many."""
        weights, hessians, made = [], [], {}
        for weight, statistics in zip(self.weights, self.statistics, strict=True):
            weights += list(self.site.to_items(weight).chunk(self.site.repeats))
            columns = torch.arange(weight.shape[1]).view(self.site.num_heads, self.site.repeats, -1)
            for repeat in range(self.site.repeats):
                # Layers that share their input share its Hessian, which a search then stores once.
                key = (id(statistics), repeat)
                if key not in made:
                    index = columns[:, repeat].flatten()
                    whole = self.site.repeats == 1
                    made[key] = statistics.hessian if whole else statistics.hessian[index][:, index]
                hessians.append(made[key])
        scores = list(self.scores.mT.split([len(weight) for weight in weights]))
        updates = self.pruner == "sparsegpt"
        return SearchInputs(weights, hessians, scores, n, m, num_groups, seed, updates_weights=updates)

    def features(self) -> Float[Tensor, "k f"]:
        """Statistics of every channel's weights, scores and input, standardised over the channels."""
        size, scores = self.items.abs(), self.scores
        norm = torch.stack([self.site.to_items(s.norm.unsqueeze(0)).mean(0) for s in self.statistics]).mean(0)
        columns = [
            size.mean(1).clamp_min(1e-12).log(),
            size.amax(1).clamp_min(1e-12).log(),
            norm.clamp_min(1e-12).log(),
            scores.mean(1),
            scores.std(1, correction=0) / scores.mean(1).clamp_min(1e-12),
            (scores > scores.median(0).values).to(scores.dtype).mean(1),
        ]
        raw = torch.stack(columns, dim=-1)
        assert raw.shape[-1] == NUM_FEATURES
        return (raw - raw.mean(0)) / raw.std(0, correction=0).clamp_min(1e-6)

    def kept(
        self, order: Int64[Tensor, " k"], *, n: int, m: int, keep: Bool[Tensor, "k r"] | None = None
    ) -> tuple[float, float, float, float]:
        """Sums of scores: kept under this order, kept under the default one, the n/m highest of every row, and all.

        What is kept under this order is the best of every m, or the given mask.

        The first three are the arguments of `permlab.sparsity.quality.efficacy_of_sums`.
        """
        scores = self.scores
        whole = torch.arange(len(scores), device=scores.device)
        num_kept = round(len(scores) * n / m)
        orders = [order.to(whole), whole] if not torch.equal(order.to(whole), whole) else [whole]
        masked = [_sum(scores * hard_mask(order, scores, n=n, m=m)) for order in orders]
        first = masked[0] if keep is None else _sum(scores * keep.to(scores.device))
        return first, masked[-1], _sum(scores.topk(num_kept, dim=0, sorted=False).values), _sum(scores)

    def prune(
        self, order: Int64[Tensor, " k"], *, n: int, m: int, keep: Bool[Tensor, "k r"] | None = None
    ) -> list[Float[Tensor, "_ i"]]:
        """Pruned weight rows of every reader, in original column order; `sparsegpt` also updates what it keeps.

        Args:
            order: of the channels, in which the groups of m lie.
            n, m: n kept of every m.
            keep: the mask, by item; None for the one that the pruner chooses.
        """
        if self.pruner != "sparsegpt":
            items = self.items
            mask = hard_mask(order, self.scores, n=n, m=m) if keep is None else keep.to(items.device)
            return self.unstack(items * mask.to(items.dtype))
        columns = self.site.column_order(order)
        masks: list[Tensor | None] = [None] * len(self.weights)
        if keep is not None:
            masks = [mask > 0 for mask in self.unstack(keep.to(self.items.dtype))]
        return [
            sparsegpt(
                _wide(weight),
                statistics.hessian.to(weight.device),
                n=n,
                m=m,
                order=columns,
                damping=self.damping,
                mask=mask,
            )[0]
            for weight, statistics, mask in zip(self.weights, self.statistics, masks, strict=True)
        ]


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def dense_rows(model: nn.Module, reader: Reader) -> Float[Tensor, "o i"]:
    """Weight rows of a reader, without gradient."""
    weight = model.get_parameter(f"{reader.module}.weight").detach()
    return weight if reader.rows is None else weight[slice(*reader.rows)]


def assemble_weights(
    model: nn.Module, sites: Sequence[WeightSite], rows: Mapping[str, Sequence[Tensor]]
) -> dict[str, Tensor]:
    """Whole weights by parameter name, from the rows of every site's readers; other rows stay as they are.

    Args:
        model: holds the weights.
        rows: for each site by name, one tensor for each of its readers.
    """
    parts: dict[str, list[tuple[Reader, Tensor]]] = {}
    for site in sites:
        for reader, values in zip(site.readers, rows[site.name], strict=True):
            parts.setdefault(reader.module, []).append((reader, values))
    return {f"{module}.weight": _join(model, module, pieces) for module, pieces in parts.items()}


def _join(model: nn.Module, module: str, pieces: Sequence[tuple[Reader, Tensor]]) -> Tensor:
    weight = model.get_parameter(f"{module}.weight").detach()
    if pieces[0][0].rows is None:
        return pieces[0][1].to(weight.dtype)
    joined, place = [], 0
    for reader, values in sorted(pieces, key=lambda piece: piece[0].rows or (0, 0)):
        assert reader.rows is not None
        joined += [weight[place : reader.rows[0]], values.to(weight.dtype)]
        place = reader.rows[1]
    return torch.cat([*joined, weight[place:]])
