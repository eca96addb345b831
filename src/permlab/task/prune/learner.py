"""Prune a trained model to N:M structured sparsity: how the orders are learned, and what is made of them."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from permlab.config.plan import Plan
from permlab.data.module import DataModule
from permlab.errors import ConfigError
from permlab.method.site_methods import SiteMethods
from permlab.model.base import Backbone
from permlab.permutation import PermutationSample, gather_items, invert
from permlab.record.checkpoint import load_weights
from permlab.record.provenance import peak_memory_mib
from permlab.record.pulse import Pulse, watched
from permlab.sparsity.calibrate import capture, collect, reconstruction_errors
from permlab.sparsity.layer import SiteLayers, assemble_weights, dense_rows
from permlab.sparsity.mask import hard_mask, relaxed_mask, split_sample, straight_through_prune
from permlab.sparsity.polish import Swappable, polish
from permlab.sparsity.quality import efficacy_of_sums
from permlab.sparsity.site import block_names
from permlab.task.learner import Learner, Parts, Result, Summary
from permlab.task.metric import PERPLEXITY
from permlab.task.optim import Stage
from permlab.task.piece import Amounts, Piece
from permlab.task.prune.exporting import export_run
from permlab.task.prune.losses import distance, divergence
from permlab.task.prune.masks import Masks, masks_of
from permlab.task.prune.reading import Reading, ReadOrder, read_item_order
from permlab.task.prune.rehearsal import Rehearsal
from permlab.task.prune.sites import at_sites
from permlab.task.prune.task import Prune
from permlab.task.score import ImageScores, Scores, TextScores, cross_entropy

# Logits of the calibration set that are kept rather than computed anew for every loss.
MAX_CACHED_LOGITS = 2**26
Orders = dict[str, Int64[Tensor, " k"]]
Keep = Mapping[str, Bool[Tensor, "k r"]]  # masks by item; where there is none, the best scores under the order


class PruneLearner(Learner):
    """Learns the orders of the input channels under which an N:M mask loses least; all weights are frozen.

    The story: statistics of every layer's input are collected on calibration samples; a search,
    where the method has one, finds a starting order for each site; the methods learn, if they
    have parameters, by the loss of the model that is pruned under their present orders; the
    picked orders are hardened, polished where the method asks for it, and the model is pruned.
    Where masks are learned too, that is after the orders: they are hardened and polished at the first
    step of the masks, see `permlab.task.prune.masks`.

    Masks are made in the permuted channel order and mapped back, so the model runs on its
    original inputs throughout. The *calibration loss* is the Kullback-Leibler divergence from
    the dense model's predictions to the pruned one's on the calibration samples, under hard
    orders; checkpoints are picked by it, and polishing lowers it.

    Args:
        task: the options.
        model, method: what is pruned, and a method for each of its sites.
        optim: settings of the optimiser, see `permlab.task.optim`.
        seed: of searches, noise and the choice of calibration samples.
    Source: arXiv:2601.22980 (relaxed training, groups, losses); Zou et al. 2025, arXiv:2510.10136
        (straight-through, blocks, cosine of the last block).
    Differs from source: see docs/pruning.md.
    """

    # What validation picks are orders; `best.ckpt` is the model that is made of them.
    picked = "picked"
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
        self._dense_logits: list[Tensor] = []
        self._seconds = 0.0
        self._memory = 0.0

    @classmethod
    def place(cls, plan: Plan, model: Backbone) -> SiteMethods:
        return at_sites(model, plan.task, plan.config["method"])

    def make_scores(self) -> Scores:
        return TextScores() if self.task.metric == PERPLEXITY else ImageScores(self.spec.num_classes)

    def describe(self) -> str:
        task, left_dense = self.task, self.method.left_out
        line = f" at {len(self.method.sites)} sites, {task.n}:{task.m}, pruner {task.pruner}"
        if left_dense:
            line += f"; too narrow for whole {task.m}s and left dense: {', '.join(left_dense)}"
        return line

    @property
    def reading(self) -> Reading:
        return self._reading[0]

    @property
    def learns(self) -> bool:
        return self.masks.learns or self._orders_learn

    @property
    def _orders_learn(self) -> bool:
        return any(parameter.requires_grad for parameter in self.method.parameters())

    def learned(self) -> Parts:
        return ("method", self.method), ("masks", self.masks)

    def tested(self) -> Parts:
        return ("model", self.model), ("read_order", self.read_order)

    # Before training

    def adopt(self, before: Mapping[str, Path]) -> None:
        """Take over the dense run's weights, and the order in which its model reads."""
        if "dense" in before:
            load_weights(before["dense"] / "checkpoints" / "best.ckpt", ("model", self.model))
            self.read_order.set(read_item_order(before["dense"]))

    def prepare(self, data: DataModule, before: Mapping[str, Path]) -> None:
        """Collect statistics, and let the methods search."""
        began = time.monotonic()
        self._memory = peak_memory_mib()
        self.reading.eval()
        with _as_config_error():
            self.calibration = [self._shorten(batch) for batch in data.sample("train", self.task.num_samples)]
            self.held_out = [self._shorten(batch)[0] for batch in data.sample("val", self.task.num_samples)]
            batches = watched("calibration", "batches", self.calibration)
            statistics = collect(self.reading, self._pruned_modules(), (x.to(self.device) for x, _ in batches))
            for site in self.method.sites:
                weights = [dense_rows(self.model, reader) for reader in site.readers]
                inputs = [statistics[reader.module] for reader in site.readers]
                self.layers[site.name] = SiteLayers(
                    site, weights, inputs, self.task.pruner, self.task.power, self.task.damping
                )
        for site in watched("search", "sites", self.method.sites):
            self._search(site.name)
        self.masks = masks_of(self.task, self.layers, [site.name for site in self.method.sites]).to(self.device)
        self._dense_logits = self._calibration_logits()
        self._seconds = time.monotonic() - began

    def _shorten(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        if self.spec.is_sequence and self.task.sequence_length is not None:
            inputs, targets = inputs[:, : self.task.sequence_length], targets[:, : self.task.sequence_length]
        return inputs, targets

    def _pruned_modules(self) -> dict[str, nn.Linear]:
        names = {reader.module for site in self.method.sites for reader in site.readers}
        return {name: self.model.get_submodule(name) for name in sorted(names)}  # type: ignore[misc]

    def _search(self, name: str) -> None:
        method, layers = self.method[name], self.layers[name]
        inputs = layers.search_inputs(n=self.n, m=self.m, num_groups=self.method.num_groups[name], seed=self.seed)
        found = method.search(inputs)
        if found is not None:
            self.method.rebase(name, found)
        self.method.set_features(name, layers.features())

    @torch.no_grad()
    def _calibration_logits(self) -> list[Tensor]:
        logits = []
        for inputs, _ in self.calibration:
            logits.append(self.reading(inputs.to(self.device)))
            if sum(part.numel() for part in logits) > MAX_CACHED_LOGITS:
                return []
        return logits

    def on_train_start(self) -> None:
        self._seconds -= time.monotonic()

    def on_train_end(self) -> None:
        self._seconds += time.monotonic()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._seconds += checkpoint.get("seconds", 0.0)  # of earlier starts, their search included

    def on_fit_start(self) -> None:
        self._bring_layers()

    def _bring_layers(self) -> None:
        """To where the model is: the trainer moves that to its device, and back to the CPU after training."""
        for layers in self.layers.values():
            layers.items, layers.scores = layers.items.to(self.device), layers.scores.to(self.device)

    # Training

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        self.reading.eval()
        samples = {} if self.masks.settled else self.method.sample(self._noise(batch_idx))
        if not self._is_learnable(samples):
            return self._no_loss()
        with torch.no_grad(), self._states() as states:
            dense_logits = self.reading(inputs)
        dense_states = dict(states)
        draws = self._draws(samples, batch_idx)
        losses = [self._losses(inputs, targets, dense_logits, dense_states, values) for values in draws]
        total = torch.stack([torch.stack(list(terms.values())).sum() for terms in losses])
        loss = total.mean() + self._policy_loss(samples, -total.detach()) + self._untouched_parameters()
        loss = loss + (self.masks.penalty(self.layers) if self.masks.settled else 0.0)
        terms = {f"{name} loss": value for losses_of_draw in losses for name, value in losses_of_draw.items()}
        self._check_finite(loss, {"inputs": inputs.float(), "logits of the dense model": dense_logits, **terms})
        if self._is_log_step():
            named = {f"train/{name}": value.detach() for name, value in losses[0].items()}
            masks = {f"mask/{name}": value for name, value in self.masks.statistics().items()}
            self._record({"train/loss": loss.detach(), **named, **(masks if self.masks.settled else {})})
        return loss

    # Masks that learn do so after the orders, which are settled by then

    @property
    def _first_mask_step(self) -> int:
        if not self.masks.learns:
            return self.num_steps
        return round(self.num_steps * (1 - self.task.mask_share)) if self._orders_learn else 0

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("mask", self.masks, self.masks.lr, self._first_mask_step),) if self.masks.learns else ()

    def clipped(self) -> tuple[tuple[str, nn.Module, str], ...]:
        return ("mask", self.masks, "the rate of task.mask"), super().clipped()[1]

    def advance(self, step: int) -> None:
        first = self._first_mask_step
        if step < first:
            self.method.advance(step, first)
            return
        self.method.advance(self.num_steps, self.num_steps)  # frozen
        self.masks.advance((step - first) / max(1, self.num_steps - first - 1))
        if not self.masks.settled:
            self.masks.settle(self._finished_orders()[0], self.layers)

    def _draws(self, samples: Mapping[str, PermutationSample], batch_idx: int) -> list[dict[str, Tensor]]:
        """Pruned weights by item of every draw, with their gradient."""
        if self.masks.settled:
            return [self.masks.values(self.layers, self._noise(batch_idx))]
        return [{name: self._masked(name, sample) for name, sample in draw.items()} for draw in _draws(samples)]

    def _untouched_parameters(self) -> Tensor | float:
        untouched = super()._untouched_parameters()
        if self.trainer.world_size > 1 and not self.masks.settled:
            untouched = sum((0.0 * parameter.sum() for parameter in self.masks.parameters()), start=untouched)
        return untouched

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.masks.settled:
            self.masks.stepped()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if not self.masks.settled:
            for parameter in self.masks.parameters():
                parameter.grad = None

    def _orders(self) -> Orders:
        """The present hard orders: those of the method until they are settled."""
        return self.masks.orders() or self.method.orders()

    def _losses(
        self,
        inputs: Tensor,
        targets: Tensor,
        dense_logits: Tensor,
        dense_states: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Weighted terms of the loss of the model with these pruned weights by item."""
        with self._states() as states:
            logits = self._run(values, inputs)
        losses = {}
        if self.task.task_weight:
            losses["cross_entropy"] = self.task.task_weight * cross_entropy(logits, targets)
        if self.task.kl_weight:
            losses["kl"] = self.task.kl_weight * divergence(logits, dense_logits)
        if self.task.distill_weight:
            pairs = [(states[name], dense_states[name]) for name in dense_states]
            distances = [distance(ours, theirs, self.task.distill_kind) for ours, theirs in pairs]
            losses["distill"] = self.task.distill_weight * torch.stack(distances).sum()
        return losses or {"nothing": logits.sum() * 0}

    def _states(self) -> Any:
        """Captures the hidden states that distillation compares, if it is wanted."""
        if not self.task.distill_weight:
            return capture({})
        if self.task.distill_over == "every_pruned_layer":
            return capture(self._pruned_modules())
        blocks = block_names(self.model)
        names = blocks if self.task.distill_over == "block" else blocks[-1:]
        return capture({name: self.model.get_submodule(name) for name in names})

    def _masked(self, name: str, sample: PermutationSample) -> Float[Tensor, "k r"]:
        """Pruned weights of a site by item, with the gradient that the estimator gives them."""
        layers, base, count = self.layers[name], self.method.base(name), self.method.num_groups[name]
        order, soft = split_sample(sample, count)
        options: dict[str, Any] = {"n": self.n, "m": self.m, "mask_temperature": self.task.mask_temperature}
        if soft is not None and sample.estimator == "straight_through":
            options["mask_backward"] = self.task.mask_backward
            return straight_through_prune(layers.items, layers.scores, soft, order, base, **options)
        if soft is None or sample.estimator != "relaxed":
            return layers.items * hard_mask(base[sample.order], layers.scores, n=self.n, m=self.m)
        weights = layers.items[base].unflatten(0, (count, -1))
        keep, mask = relaxed_mask(soft, layers.scores[base].unflatten(0, (count, -1)), **options)
        pruned = weights * mask if self.task.mix == "mask" else soft.mT @ ((soft @ weights) * keep)
        return gather_items(pruned.flatten(0, 1), invert(base))

    def _run(self, values: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        rows = {name: self.layers[name].unstack(value) for name, value in values.items()}
        weights = assemble_weights(self.model, self.method.sites, rows)
        return functional_call(self.reading, {f"model.{name}": weight for name, weight in weights.items()}, (inputs,))

    def _policy_loss(self, samples: Mapping[str, PermutationSample], reward: Float[Tensor, " s"]) -> Tensor | float:
        """Score-function term: all sites of a draw share its reward, each has a baseline of its own."""
        terms = []
        for name, sample in samples.items():
            if sample.log_prob is not None:
                advantage = self.method[name].advantage(reward.view(sample.log_prob.shape))
                terms.append(-(advantage * sample.log_prob).mean())
        return torch.stack(terms).sum() if terms else 0.0

    # What a run takes

    def rehearse(self, data: DataModule) -> None:
        self._rehearsal = Rehearsal(self)
        self._rehearsal.prepare(data)

    def pieces(self, data: DataModule, amounts: Amounts) -> Iterator[Piece]:
        yield from super().pieces(data, replace(amounts, test_batches=3 * amounts.test_batches))
        yield from self._rehearsal.pieces(amounts)

    def holds(self) -> dict[str, int]:
        return self._rehearsal.holds()

    # Checkpoints of the training hold what learns

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith("model.")}

    # Evaluation

    def predict(self, inputs: Tensor) -> Tensor:
        """Logits of the pruned model; while it is being learned, of the model under its present hard orders."""
        if not self.layers:
            return self.reading(inputs)
        return self._run(self._hard_values(self._orders(), self.masks.keep()), inputs)

    def on_validation_epoch_end(self) -> None:
        hard = self.calibration_loss(self._hard_values(self._orders(), self.masks.keep()))
        extra = {"calibration_loss": torch.tensor(hard)}
        soft = self._soft_values()
        if soft is not None:
            extra["soft_calibration_loss"] = torch.tensor(self.calibration_loss(soft))
        self._log_scores("val", **extra)

    @torch.no_grad()
    def _soft_values(self) -> dict[str, Tensor] | None:
        """Weights under the relaxed permutation as it is trained; None where training sees hard orders."""
        if self.masks.settled:
            return None
        values = {}
        for site in self.method.sites:
            method, features = self.method[site.name], self.method.features(site.name)
            soft = method.soft_matrix(features) if getattr(method, "estimator", None) == "relaxed" else None
            if soft is None:
                return None
            sample = PermutationSample(method.best(features), soft, None, "relaxed")
            values[site.name] = self._masked(site.name, sample)
        return values

    def _hard_values(self, orders: Orders, keep: Keep | None = None) -> dict[str, Tensor]:
        masks = keep or {
            name: hard_mask(order, self.layers[name].scores, n=self.n, m=self.m) for name, order in orders.items()
        }
        return {name: self.layers[name].items * mask for name, mask in masks.items()}

    @torch.no_grad()
    def calibration_loss(self, values: Mapping[str, Tensor]) -> float:
        """Mean divergence from the dense model, in nats, on the calibration samples."""
        return sum(float(part) for part in self._calibration_losses(lambda inputs: self._run(values, inputs)))

    def _calibration_losses(self, forward: Any) -> Iterator[Tensor]:
        """The calibration loss in parts that add up to it."""
        total = sum(len(inputs) for inputs, _ in self.calibration)
        for index, (inputs, _) in enumerate(self.calibration):
            inputs = inputs.to(self.device)
            with torch.no_grad():
                dense = self._dense_logits[index] if self._dense_logits else self.reading(inputs)
            yield divergence(forward(inputs), dense.to(self.device)) * (len(inputs) / total)

    def _loss_and_gradient(self, orders: Orders) -> tuple[float, dict[str, Tensor]]:
        """Calibration loss of the model as it is pruned under these orders, and its gradient for the weights."""
        leaves = {name: value.requires_grad_() for name, value in self._pruned_values(orders).items()}
        loss = 0.0
        with torch.enable_grad():
            for part in self._calibration_losses(lambda inputs: self._run(leaves, inputs)):
                part.backward()
                loss += float(part.detach())
        return loss, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def _pruned_values(self, orders: Orders, keep: Keep | None = None) -> dict[str, Tensor]:
        """Pruned weights of every site by item, updated where the pruner does that."""
        if self.task.pruner != "sparsegpt":
            return self._hard_values(orders, keep)
        keep, pattern = keep or {}, {"n": self.n, "m": self.m}
        pruned = {name: at.prune(orders[name], **pattern, keep=keep.get(name)) for name, at in self.layers.items()}
        return {name: layers.stack(pruned[name]) for name, layers in self.layers.items()}

    # After training

    def finish(self, test: Callable[[], Summary]) -> Result:
        """Harden, polish and prune; test what the pruned model is compared with, and last of all itself."""
        began = time.monotonic()
        self._bring_layers()
        starts, learned, keep = self.method.bases(), self._orders(), self.masks.keep()
        if keep:
            orders, polished = learned, list[float]()
            losses = [self.calibration_loss(self._pruned_values(*pair)) for pair in ((starts, None), (learned, keep))]
        else:
            orders, losses, polished = self._finished_orders()
        pruned = self._prune(orders, keep)
        seconds = self._seconds + time.monotonic() - began
        summary = {
            "prune/calibration_loss_start": losses[0],
            "prune/calibration_loss_learned": losses[1],
            "prune/calibration_loss": self._pruned_loss(pruned),
            "prune/num_parameters": float(sum(p.numel() for part in self.learned() for p in part[1].parameters())),
            "prune/num_sites": float(len(orders)),
        }
        soft = self._soft_values()
        if soft is not None:
            hard = self.calibration_loss(self._hard_values(learned))
            summary["prune/soft_hard_gap"] = hard - self.calibration_loss(soft)
        quality, arrays = self._quality(orders, pruned, keep)
        summary |= quality
        summary["prune/seconds"] = round(seconds, 3)
        summary["prune/peak_memory_mib"] = peak_memory_mib() - self._memory
        arrays["sites"]["polished_loss"] = np.array(polished)
        arrays |= {"orders": _as_arrays(orders), "starts": _as_arrays(starts)}
        for name, weights in self._variants().items():
            self._use(weights)
            summary |= {f"{key}_{name}": value for key, value in test().items()}
        self._use(pruned)
        return Result(summary | test(), arrays, self._tested_state())

    def _finished_orders(self) -> tuple[Orders, list[float], list[float]]:
        """Hardened and polished orders, the losses of start and learned ones, and those of polishing."""
        starts, learned = self.method.bases(), self.method.orders()
        losses = [self.calibration_loss(self._pruned_values(orders)) for orders in (starts, learned)]
        orders, polished = self._polish(starts if losses[0] <= losses[1] else learned, learned)
        return orders, losses, polished

    def _polish(self, better: Orders, learned: Orders) -> tuple[Orders, list[float]]:
        """The learned orders, or, where the method is polished, the better of start and learned after that."""
        if self.method.num_polish_steps == 0:
            return learned, []
        sites = {
            name: Swappable(layers.items, layers.scores, self.method.num_groups[name])
            for name, layers in self.layers.items()
        }
        steps = self.method.num_polish_steps
        with Pulse("polishing", "losses", steps + 1) as pulse:
            loss = pulse.counting(self._loss_and_gradient)
            return polish(sites, better, loss, n=self.n, m=self.m, num_steps=steps, seed=self.seed)

    def _prune(self, orders: Orders, keep: Keep | None = None) -> dict[str, Tensor]:
        """Whole pruned weights by parameter name."""
        keep, pattern = keep or {}, {"n": self.n, "m": self.m}
        names = watched("pruning", "sites", list(orders))
        rows = {
            name: self.layers[name].prune(orders[name].to(self.device), **pattern, keep=keep.get(name))
            for name in names
        }
        return assemble_weights(self.model, self.method.sites, rows)

    @torch.no_grad()
    def _pruned_loss(self, weights: Mapping[str, Tensor]) -> float:
        named = {f"model.{name}": weight for name, weight in weights.items()}
        parts = self._calibration_losses(lambda inputs: functional_call(self.reading, named, (inputs,)))
        return sum(float(part) for part in parts)

    def _quality(
        self, orders: Orders, pruned: Mapping[str, Tensor], keep: Keep
    ) -> tuple[Summary, dict[str, dict[str, np.ndarray]]]:
        """What is retained and what is lost, as a whole, and by site and layer."""
        names = watched("quality", "sites", list(orders))
        sums = [self.layers[name].kept(orders[name], n=self.n, m=self.m, keep=keep.get(name)) for name in names]
        kept, default, best, total = (sum(column) for column in zip(*sums, strict=True))
        modules = self._pruned_modules()
        pairs = {name: (layer, pruned[f"{name}.weight"]) for name, layer in modules.items()}
        errors = reconstruction_errors(self.reading, pairs, (inputs.to(self.device) for inputs in self.held_out))
        by_site = {
            "site": np.array(list(orders)),
            "retained": np.array([part[0] / part[3] for part in sums]),
            "layer": np.array(list(errors)),
            "reconstruction_error": np.array(list(errors.values())),
        }
        whole = {
            "prune/retained": kept / total,
            "prune/efficacy": efficacy_of_sums(kept, default, best),
            "prune/reconstruction_error": sum(errors.values()) / len(errors),
        }
        return whole, {"sites": by_site}

    def _variants(self) -> dict[str, dict[str, Tensor]]:
        """Other weights that are tested beside the pruned ones; from here on the model is the pruned one."""
        layers = self.layers.items()
        unpermuted = self._prune({name: torch.arange(len(part.items)) for name, part in layers})
        dense = assemble_weights(
            self.model, self.method.sites, {name: part.unstack(part.items) for name, part in layers}
        )
        self.layers = {}
        return {"dense": dense, "unpermuted": unpermuted}

    @torch.no_grad()
    def _use(self, weights: Mapping[str, Tensor]) -> None:
        """Put these weights into the model, under its parameters' names."""
        for name, weight in weights.items():
            self.model.get_parameter(name).copy_(weight)

    def _tested_state(self) -> dict[str, Tensor]:
        """What `checkpoints/best.ckpt` holds: the pruned model and its methods."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        state |= {f"method.{name}": value for name, value in self.method.state_dict().items()}
        return state | {"read_order.order": self.read_order.order}

    def export(self, folder: Path, plan: Plan, data: DataModule, before: Mapping[str, Path], *, sparse: bool) -> None:
        export_run(plan, self.method, data, folder, dense_run=before.get("dense"), sparse=sparse)


def _as_arrays(orders: Orders) -> dict[str, np.ndarray]:
    return {name: order.cpu().numpy() for name, order in orders.items()}


@contextmanager
def _as_config_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"task=prune: {error}") from error


def _draws(samples: Mapping[str, PermutationSample]) -> list[dict[str, PermutationSample]]:
    """One joint draw of all sites for every sample that the methods took."""
    first = next(iter(samples.values()))
    if first.order.ndim == 1:
        return [dict(samples)]
    return [
        {
            name: PermutationSample(sample.order[index].reshape(-1), None, None, sample.estimator)
            for name, sample in samples.items()
        }
        for index in range(len(first.order))
    ]
