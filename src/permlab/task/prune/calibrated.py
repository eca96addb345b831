"""Before the orders of a pruned model are learned: statistics behind dense or pruned blocks, and the searches."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from permlab.data.module import DataModule
from permlab.errors import ConfigError
from permlab.method.site_methods import SiteMethods
from permlab.model.base import Backbone
from permlab.record.checkpoint import load_weights
from permlab.record.provenance import peak_memory_mib
from permlab.record.pulse import Pulse
from permlab.sparsity.calibrate import InputStatistics
from permlab.sparsity.layer import SiteLayers, assemble_weights, dense_rows
from permlab.sparsity.offload import Waiting
from permlab.sparsity.site import WeightSite, block_names
from permlab.sparsity.walk import Visit, walk
from permlab.task.learner import Learner
from permlab.task.prune.losses import divergence
from permlab.task.prune.masks import Masks, masks_of
from permlab.task.prune.predictions import Predictions, fingerprint
from permlab.task.prune.reading import Reading, ReadOrder, read_item_order
from permlab.task.prune.task import Prune

# Bytes of weights and scores by item, of all sites together, up to which they are kept rather than made on demand.
KEPT_BYTES = 2**30
# Samples of the test split whose bits tell whether it is the same; its settings and seed do, too.
NUM_FINGERPRINTED = 64
Orders = dict[str, Int64[Tensor, " k"]]
Keep = Mapping[str, Bool[Tensor, "k r"]]  # masks by item; where there is none, the best scores under the order
Statistics = dict[str, InputStatistics]


class CalibratedLearner(Learner):
    """What pruning knows of the dense model when the learning begins.

    The model is run block after block. At a time one block has weights, scores and Hessians in working
    precision; of the others there are the weights as the model has them, and of every layer that has been
    visited the vectors that its scores need. Hessians stay only where weights will be updated by them.

    With `task.calibrate=sequential` a block is pruned under its starting order before the next is looked
    at. An order that several blocks share has to be known before the first of them is pruned: it is
    searched on statistics of the dense model.
    """

    method: SiteMethods
    task: Prune

    def __init__(self, task: Prune, model: Backbone, method: SiteMethods, optim: Mapping[str, Any], seed: int) -> None:
        super().__init__(task, model, method, optim, seed)
        self.strict_loading = False  # checkpoints of the training hold no frozen weights
        self.n, self.m = task.n, task.m
        model.requires_grad_(False)
        self.read_order = ReadOrder(model.num_items)
        # In a tuple, as its parts are this task's own.
        self._reading = (Reading(model, self.read_order),)
        self.masks = Masks(task, {})
        self.layers: dict[str, SiteLayers] = {}
        self.calibration: list[tuple[Tensor, Tensor]] = []
        self.held_out: list[Tensor] = []
        self._predictions: Predictions | None = None
        self._hessians = Waiting()
        # Weights that were pruned on the way, with the orders under which they were.
        self._ready: tuple[Orders, dict[str, Tensor]] | None = None
        self._ready_loss: float | None = None
        self._fingerprint = ""  # of the dense model and what it is tested on
        self._seconds = 0.0
        self._memory = 0.0

    @property
    def reading(self) -> Reading:
        return self._reading[0]

    @property
    def learns(self) -> bool:
        return self.masks.learns or self._orders_learn

    @property
    def _orders_learn(self) -> bool:
        return any(parameter.requires_grad for parameter in self.method.parameters())

    @property
    def is_sequential(self) -> bool:
        return self.task.calibrate == "sequential"

    def adopt(self, before: Mapping[str, Path]) -> None:
        """Take over the dense run's weights, and the order in which its model reads."""
        if "dense" in before:
            load_weights(before["dense"] / "checkpoints" / "best.ckpt", ("model", self.model))
            self.read_order.set(read_item_order(before["dense"]))

    def prepare(self, data: DataModule, before: Mapping[str, Path]) -> None:
        """Collect statistics, let the methods search, and prune already where the orders will not change."""
        began = time.monotonic()
        self._memory = peak_memory_mib()
        self.reading.eval()
        self.masks = masks_of(self.task, self.model, self.method.sites).to(self.device)
        with as_config_error():
            self.calibration = [self._shorten(batch) for batch in data.sample("train", self.task.num_samples)]
            self.held_out = [self._shorten(batch)[0] for batch in data.sample("val", self.task.num_samples)]
            self._survey()
        if self.known is not None:
            state = {**self.model.state_dict(), "read order": self.read_order.order}
            tested = (inputs for inputs, _ in data.sample("test", NUM_FINGERPRINTED))
            self._fingerprint = f"{fingerprint(state.values())} {fingerprint(tested)}"
        self._seconds = time.monotonic() - began

    def _shorten(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        if self.spec.is_sequence and self.task.sequence_length is not None:
            inputs, targets = inputs[:, : self.task.sequence_length], targets[:, : self.task.sequence_length]
        return inputs, targets

    # The walk through the blocks

    def _survey(self) -> None:
        sites = self.method.sites
        keep = 8 * sum(reader_size(self.model, site) for site in sites) <= KEPT_BYTES
        with Pulse("calibration and search", "sites", len(sites)) as pulse:
            self._search_across_blocks()
            found: Statistics = {}
            pruned: dict[str, Tensor] = {}

            def visit(path: str, statistics: Statistics) -> Mapping[str, Tensor] | None:
                found.update(statistics)
                here = [site for site in sites if site.name not in self.layers and is_among(site, found)]
                for site in here:
                    layers = self.layers[site.name] = self._layers_of(site, found)
                    layers.keep = True
                    self._start(site.name)
                    pulse.beat(len(self.layers))
                weights = self._pruned_block(statistics) if self._prunes_on_the_way else None
                if weights and not self._may_change:
                    pruned.update({name: weight.cpu() for name, weight in weights.items()})
                self._put_away(here, found, keep)
                return weights

            if self.is_sequential:
                self._remember_all()
                self._walk(visit, behind=True, end=None if self._may_change else self._measure)
            else:
                self._walk(visit, behind=False, end=self._remember)
                self._remember_all()
        if self._prunes_on_the_way and not self._may_change:
            self._ready = (self.method.bases(), pruned)

    @property
    def _may_change(self) -> bool:
        """Whether the orders that the search leaves are not the last word."""
        return self.learns or self.method.num_polish_steps + self.method.num_descent_steps > 0

    @property
    def _prunes_on_the_way(self) -> bool:
        """In a single pass no order that several blocks share is known in time."""
        return self.is_sequential or not (self._may_change or self._across())

    def _walk(
        self,
        visit: Visit,
        *,
        behind: bool,
        modules: Mapping[str, nn.Module] | None = None,
        end: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """Through the model on the calibration samples.

        What comes out behind a walk in float32 is not what a model in half precision gives, so nobody is told.
        """
        is_narrow = next(self.model.parameters()).dtype.itemsize < 4
        batches = [inputs.to(self.device) for inputs, _ in self.calibration]
        names = self._pruned_modules() if modules is None else modules
        blocks = block_names(self.model)
        walk(
            self.reading, self.model, blocks, names, batches, visit,
            behind=behind, waiting=Waiting(folder=self.cache_folder), end=None if is_narrow else end,
        )  # fmt: skip

    @torch.no_grad()
    def _remember_all(self) -> None:
        """What the dense model predicts, unless a walk has told it or there is no room."""
        if self._predictions is None:
            for index, (inputs, _) in enumerate(self.calibration):
                self._remember(index, self.reading(inputs.to(self.device)))
                if not self._kept_predictions.is_kept:
                    break

    def _remember(self, index: int, logits: Tensor) -> None:
        if self._predictions is None:
            num_logits = logits[0].numel() * sum(len(inputs) for inputs, _ in self.calibration)
            self._predictions = Predictions(num_logits, limit_gib=self.task.cache_gib, folder=self.cache_folder)
        self._predictions.put(index, logits)

    @property
    def _kept_predictions(self) -> Predictions:
        assert self._predictions is not None, "nothing has been calibrated"
        return self._predictions

    def _measure(self, index: int, logits: Tensor) -> None:
        """Add up the calibration loss of the model that was pruned on the way."""
        loss = self._share_of_loss(index, logits)
        self._ready_loss = (self._ready_loss or 0.0) + float(loss)

    def _share_of_loss(self, index: int, logits: Tensor) -> Tensor:
        """What a batch of calibration samples adds to the mean divergence from the dense model."""
        inputs, total = self.calibration[index][0], sum(len(inputs) for inputs, _ in self.calibration)
        dense = self._kept_predictions.get(index, logits.device)
        if dense is None:
            with torch.no_grad():
                dense = self.reading(inputs.to(self.device))
        return divergence(logits, dense) * (len(inputs) / total)

    def _across(self) -> list[WeightSite]:
        """Sites whose layers are in several blocks."""
        blocks = block_names(self.model)
        homes = {site.name: {home(r.module, blocks) for r in site.readers} for site in self.method.sites}
        return [site for site in self.method.sites if len(homes[site.name]) > 1]

    def _search_across_blocks(self) -> None:
        sites = self._across() if self.is_sequential else []
        if not sites:
            return
        found: Statistics = {}
        visit: Visit = lambda _, statistics: found.update(statistics)  # noqa: E731
        self._walk(visit, behind=False, modules=modules_of(self.model, sites), end=self._remember)
        for site in sites:
            self._search(site.name, self._layers_of(site, found))

    def _start(self, name: str) -> None:
        """Let the method search, unless it has, and tell it of its channels."""
        if name not in {site.name for site in (self._across() if self.is_sequential else [])}:
            self._search(name, self.layers[name])
        if self.method[name].needs_items:
            self.method.set_features(name, self.layers[name].features())

    def _search(self, name: str, layers: SiteLayers) -> None:
        inputs = layers.search_inputs(n=self.n, m=self.m, num_groups=self.method.num_groups[name], seed=self.seed)
        found = self.method[name].search(inputs)
        if found is not None:
            self.method.rebase(name, found)

    def _layers_of(self, site: WeightSite, statistics: Mapping[str, InputStatistics]) -> SiteLayers:
        """The tensors of a site, as far as there are statistics."""
        site = replace(site, readers=tuple(reader for reader in site.readers if reader.module in statistics))
        weights = [dense_rows(self.model, reader) for reader in site.readers]
        inputs = [statistics[reader.module] for reader in site.readers]
        return SiteLayers(site, weights, inputs, self.task.pruner, self.task.power, self.task.damping)

    def _pruned_block(
        self, statistics: Statistics, orders: Orders | None = None, keep: Keep | None = None
    ) -> dict[str, Tensor]:
        """Weights of a block's layers, pruned under these orders, or under the starting ones, by parameter name."""
        parts, rows = [], {}
        for site in self.method.sites:
            if any(reader.module in statistics for reader in site.readers):
                layers = self.layers.get(site.name) if orders is None else None
                if layers is None or not is_among(site, statistics):
                    layers = self._layers_of(site, statistics)
                order = (self.method.base(site.name) if orders is None else orders[site.name]).to(self.device)
                rows[site.name] = layers.prune(order, n=self.n, m=self.m, keep=(keep or {}).get(site.name))
                parts.append(layers.site)
        return assemble_weights(self.model, parts, rows)

    def _put_away(self, sites: list[WeightSite], found: Statistics, keep: bool) -> None:
        """Let go of what these sites no longer need, and put the Hessians of the others where there is room."""
        holds = self.task.pruner == "sparsegpt" and self._may_change
        for site in sites:
            if not keep:
                self.layers[site.name].forget()
        open_ones = {r.module for site in self.method.sites if site.name not in self.layers for r in site.readers}
        names: dict[int, list[str]] = {}
        for name, statistics in found.items():
            names.setdefault(id(statistics), []).append(name)
        for name, *others in names.values():
            statistics = found[name]
            if statistics.is_released or name in self._hessians:
                continue
            if holds or not open_ones.isdisjoint([name, *others]):
                self._hessians.put(name, statistics.hessian)
                statistics.exchange(self._hessians.get(name))
            else:
                statistics.release()

    def _pruned_modules(self) -> dict[str, nn.Linear]:
        return modules_of(self.model, self.method.sites)


def modules_of(model: nn.Module, sites: list[WeightSite]) -> dict[str, nn.Linear]:
    names = {reader.module for site in sites for reader in site.readers}
    return {name: model.get_submodule(name) for name in sorted(names)}  # type: ignore[misc]


def reader_size(model: nn.Module, site: WeightSite) -> int:
    """Weights of a site's layers."""
    return sum(dense_rows(model, reader).numel() for reader in site.readers)


def is_among(site: WeightSite, modules: Mapping[str, object]) -> bool:
    return all(reader.module in modules for reader in site.readers)


def home(module: str, blocks: list[str]) -> str:
    """The block that a module is in."""
    return next(block for block in blocks if module.startswith(f"{block}."))


@contextmanager
def as_config_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"task=prune: {error}") from error
