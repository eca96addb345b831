"""Any model pruned to N:M under orders of its channels that a search finds: one call from Python."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from permlab.errors import nearest
from permlab.sparsity.calibrate import Forward, collect
from permlab.sparsity.export_folder import export
from permlab.sparsity.layer import PRUNERS, SiteLayers, assemble_weights, dense_rows
from permlab.sparsity.quality import efficacy_of_sums
from permlab.sparsity.read_sites import read_sites
from permlab.sparsity.reconstruction_search import reconstruction_search
from permlab.sparsity.retained_search import deal_and_match, swap_search
from permlab.sparsity.search_argument import check_pruning
from permlab.sparsity.search_inputs import SearchInputs
from permlab.sparsity.weight_site import WeightSite

SEARCHES = ("swap_search", "deal_and_match", "reconstruction_search", "none")


@dataclass(frozen=True)
class SparsifiedModel:
    """A pruned copy of a model, and what it takes to write it down.

    Args:
        model: the copy, with zeros, its channels in their original order: it takes the place of the dense one.
        dense: the model as it was.
        sites: that were pruned.
        orders: int64 order of each site's channels under which its weights are n:m, by name.
        efficacy: by site, what the order won of what any order can win, see `permlab.sparsity.quality.efficacy`.
        n, m: n kept of every m consecutive channels.
    """

    model: nn.Module
    dense: nn.Module
    sites: Sequence[WeightSite]
    orders: Mapping[str, Tensor]
    efficacy: Mapping[str, float]
    n: int
    m: int

    def export(self, folder: str | Path, inputs: Any, *, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Fold the orders, verify that nothing changes, and write a folder; see `permlab.sparsity.export.export`.

        Args:
            folder: new or empty; `load_export(folder, fresh model)` reads it.
            inputs: what the models are compared on.
            config: of the model, plain containers only; becomes `permlab.json`.
        """
        return export(
            folder,
            dense=self.dense,
            pruned=self.model,
            sites=self.sites,
            orders=self.orders,
            n=self.n,
            m=self.m,
            inputs=inputs,
            config=config or {},
        )


@torch.no_grad()
def sparsify(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sites: Sequence[WeightSite] | None = None,
    n: int = 2,
    m: int = 4,
    pruner: str = "wanda",
    search: str = "swap_search",
    num_groups: int = 1,
    power: float = 0.5,
    damping: float = 0.01,
    seed: int = 0,
    forward: Forward | None = None,
) -> SparsifiedModel:
    """Prune the readers of every site to n:m, after bringing their channels into the order that a search finds.

    Args:
        model: runs in evaluation mode, and stays as it is.
        batches: inputs of the model that statistics are collected on; a few hundred samples.
        sites: layers that share their input, and what moves along for their order to fold; None reads those of
            known families, see `permlab.sparsity.site.read_sites`.
        n, m: n kept of every m consecutive channels.
        pruner: importance of a weight: `magnitude`, `wanda`, `ria`, or `sparsegpt`, which also updates weights.
        search: `swap_search`, `deal_and_match`, `reconstruction_search`, or `none`, channels as they are.
        num_groups: equal consecutive blocks of channels that no channel leaves; a site within heads has as many
            as heads.
        power: of the input norm in `ria`.
        damping: of the Hessian in `sparsegpt`, in multiples of its mean diagonal.
        seed: of the search.
        forward: runs the model on a batch; None calls it.
    Raises:
        ValueError: if a name is unknown, a site does not fit the model, the pattern or the groups, or a
            calibration input is not finite.
    Cost: a pass over the batches, a matrix of its width squared for every layer, and the search.
    Example:
        >>> from permlab.sparsity.site import Move, Reader
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> site = WeightSite("mlp", "mlp", (Reader("2", None),), 8, (Move("0.weight", 0), Move("0.bias", 0)))
        >>> pruned = sparsify(mlp, [torch.rand(16, 2)], sites=[site], n=2, m=4)
        >>> int((pruned.model[2].weight != 0).sum())
        12
    """
    for key, value, valid in (("pruner", pruner, PRUNERS), ("search", search, SEARCHES)):
        if value not in valid:
            raise ValueError(f"{key}={value}{nearest(value, valid)}")
    dense = copy.deepcopy(model).eval()
    sites = list(read_sites(dense) if sites is None else sites)
    layers = _layers(dense, sites, batches, forward, pruner, power, damping)
    orders, efficacy, rows = {}, {}, {}
    for site in sites:
        count = site.num_heads if site.num_heads > 1 else num_groups
        at_site = layers[site.name]
        try:
            check_pruning(at_site.scores.mT, n, m, count)
        except ValueError as error:
            raise ValueError(f"site {site.name}: {error}") from error
        order = _search(search, at_site.search_inputs(n=n, m=m, num_groups=count, seed=seed))
        orders[site.name], rows[site.name] = order, at_site.prune(order, n=n, m=m)
        efficacy[site.name] = efficacy_of_sums(*at_site.kept(order, n=n, m=m)[:3])
    pruned = copy.deepcopy(dense)
    for name, weight in assemble_weights(dense, sites, rows).items():
        pruned.get_parameter(name).copy_(weight)
    return SparsifiedModel(pruned.train(model.training), dense, sites, orders, efficacy, n, m)


def _layers(
    model: nn.Module,
    sites: Sequence[WeightSite],
    batches: Iterable[Any],
    forward: Forward | None,
    pruner: str,
    power: float,
    damping: float,
) -> dict[str, SiteLayers]:
    """Weights, statistics and scores of every site, by name."""
    modules = {}
    for reader in (reader for site in sites for reader in site.readers):
        try:
            modules[reader.module] = model.get_submodule(reader.module)
        except AttributeError as error:
            names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise ValueError(f"there is no layer {reader.module}{nearest(reader.module, names)}") from error
    statistics = collect(forward or model, modules, batches)
    found = {}
    for site in sites:
        weights = [dense_rows(model, reader) for reader in site.readers]
        inputs = [statistics[reader.module] for reader in site.readers]
        found[site.name] = SiteLayers(site, weights, inputs, pruner, power, damping)
    return found


def _search(name: str, inputs: SearchInputs) -> Int64[Tensor, " k"]:
    scores = inputs.joint_scores()
    pattern: dict[str, Any] = {"n": inputs.n, "m": inputs.m, "num_groups": inputs.num_groups}
    if name == "swap_search":
        return swap_search(scores, **pattern, seed=inputs.seed)
    if name == "deal_and_match":
        return deal_and_match(scores, **pattern)
    if name == "reconstruction_search":
        return reconstruction_search(inputs.weights, inputs.hessians, inputs.scores, **pattern, seed=inputs.seed)
    return torch.arange(scores.shape[1], device=scores.device)
