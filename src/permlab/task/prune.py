"""Prune a trained model to N:M structured sparsity, with a learned permutation of its input channels."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from permlab.data.module import DataModule
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError
from permlab.model.base import Backbone
from permlab.option import NonNegativeFloat, PositiveFloat, PositiveInt
from permlab.permutation import PermutationSample, gather_items, invert
from permlab.rundir import is_rank_zero, write_checkpoint, write_npz
from permlab.sparsity.calibrate import capture, collect, reconstruction_errors
from permlab.sparsity.layer import SiteLayers, assemble_weights, dense_rows
from permlab.sparsity.mask import hard_mask, relaxed_mask, split_sample, straight_through_prune
from permlab.sparsity.polish import Swappable, polish
from permlab.sparsity.quality import efficacy_of_sums
from permlab.sparsity.site import block_names
from permlab.sparsity.site_methods import SiteMethods
from permlab.task.base import Task
from permlab.task.score import cross_entropy

# Logits of the calibration set that are kept rather than computed anew for every loss.
MAX_CACHED_LOGITS = 2**26
Orders = dict[str, Int64[Tensor, " k"]]


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
        return self.model.read(self.read_order(self.model.embed(inputs)))


class Prune(Task):
    """Learns the orders of the input channels under which an N:M mask loses least; all weights are frozen.

    The story: statistics of every layer's input are collected on calibration samples; a search,
    where the method has one, finds a starting order for each site; the methods learn, if they
    have parameters, by the loss of the model that is pruned under their present orders; the
    picked orders are hardened, polished where the method asks for it, and the model is pruned.

    Masks are made in the permuted channel order and mapped back, so the model runs on its
    original inputs throughout. The *calibration loss* is the Kullback-Leibler divergence from
    the dense model's predictions to the pruned one's on the calibration samples, under hard
    orders; checkpoints are picked by it, and polishing lowers it.

    Args:
        spec, model, method: what is pruned, and a method for each of its sites.
        optim: settings of the optimiser, see `permlab.optim`.
        seed: of searches, noise and the choice of calibration samples.
        n, m: n kept of every m consecutive input channels.
        pruner: importance of a weight: `magnitude`, `wanda`, `ria`, or `sparsegpt`, which also updates
            the weights that are kept. In training `sparsegpt` stands for its static saliency.
        power: of the input norm in `ria`.
        damping: added to the Hessian's diagonal in `sparsegpt`, in multiples of its mean.
        sites: `all`, `foldable`, `stream`, or names or kinds of sites.
        coupling: whether layers with the same input share an order (`shared`) or have one each.
        within_heads: keep the order of an attention output's input within heads, which folds.
        num_groups: equal consecutive blocks of channels that no channel leaves; 1 for a global order.
        block_size: channels in a group where `num_groups` is null; narrower sites have one group.
        mask_temperature: of the softmax that gradients take for the choice of the n best.
        mix: what a relaxed permutation mixes: the `weight`, as the paper has it, or the `mask` alone.
        num_samples: calibration samples (images, or windows of text).
        sequence_length: tokens of a calibration sample, at most the data's; null for the data's. Text only.
        task_weight: of the cross-entropy on labels.
        kl_weight: of the divergence from the dense model's predictions.
        distill_weight: of the distance between hidden states of the dense and the pruned model.
        distill_kind: mean squared error, smooth L1, or one minus the cosine.
        distill_over: outputs of every pruned layer, of every block, or of the last block.
        dense, dense_steps: see `permlab.run`: the model to prune, or how long to train one.
    Raises:
        ValueError, ConfigError: if a weight is not finite or the calibration set is empty.
    Source: arXiv:2601.22980 (relaxed training, groups, losses); Zou et al. 2025, arXiv:2510.10136
        (straight-through, blocks, cosine of the last block).
    Differs from source: see docs/pruning.md.
    """

    takes: ClassVar[tuple[str, ...]] = ("image", "text")
    permutes: ClassVar[str] = "weights"
    method: SiteMethods

    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "power": ("pruner", ["magnitude", "wanda", "sparsegpt"]),
        "damping": ("pruner", ["magnitude", "wanda", "ria"]),
        "block_size": ("num_groups", ["<set>"]),
        "distill_kind": ("distill_weight", [0]),
        "distill_over": ("distill_weight", [0]),
        "dense_steps": ("dense", ["<set>"]),
        "sequence_length": ("kind", ["image"]),
    }

    def __init__(
        self,
        spec: DataSpec,
        model: Backbone,
        method: SiteMethods,
        optim: Mapping[str, Any],
        seed: int,
        *,
        n: PositiveInt,
        m: PositiveInt,
        pruner: Literal["magnitude", "wanda", "ria", "sparsegpt"],
        power: NonNegativeFloat,
        damping: PositiveFloat,
        sites: Literal["all", "foldable", "stream"] | list[str] | str,
        coupling: Literal["shared", "independent"],
        within_heads: bool,
        num_groups: PositiveInt | None,
        block_size: PositiveInt,
        mask_temperature: PositiveFloat,
        mix: Literal["weight", "mask"],
        num_samples: PositiveInt,
        sequence_length: PositiveInt | None,
        task_weight: NonNegativeFloat,
        kl_weight: NonNegativeFloat,
        distill_weight: NonNegativeFloat,
        distill_kind: Literal["mse", "smooth_l1", "cosine"],
        distill_over: Literal["every_pruned_layer", "block", "last"],
        dense: str | None,
        dense_steps: PositiveInt | None,
    ) -> None:
        super().__init__(spec, model, method, optim, seed)
        self.strict_loading = False  # checkpoints of the training hold no frozen weights
        self.n, self.m, self.pruner, self.power, self.damping = n, m, pruner, power, damping
        self.mask_temperature, self.mix = mask_temperature, mix
        self.num_samples, self.sequence_length = num_samples, sequence_length
        self.task_weight, self.kl_weight = task_weight, kl_weight
        self.distill_weight, self.distill_kind, self.distill_over = distill_weight, distill_kind, distill_over
        model.requires_grad_(False)
        self.read_order = ReadOrder(model.num_items)
        # In a tuple, as its parts are this task's own.
        self._reading = (Reading(model, self.read_order),)
        self.layers: dict[str, SiteLayers] = {}
        self.calibration: list[tuple[Tensor, Tensor]] = []
        self.held_out: list[Tensor] = []
        self._dense_logits: list[Tensor] = []
        self._seconds = 0.0
        self._memory = 0.0

    @property
    def reading(self) -> Reading:
        return self._reading[0]

    @property
    def monitor(self) -> tuple[str, str]:
        return "val/calibration_loss", "min"

    @property
    def learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.method.parameters())

    def tested(self) -> tuple[tuple[str, nn.Module], ...]:
        return ("model", self.model), ("read_order", self.read_order)

    # Before training

    def begin(self, data: DataModule) -> None:
        """Collect statistics, and let the methods search."""
        began = time.monotonic()
        self._memory = _peak_memory_mib()
        self.reading.eval()
        with _as_config_error():
            self.calibration = [self._shorten(batch) for batch in data.sample("train", self.num_samples)]
            self.held_out = [self._shorten(batch)[0] for batch in data.sample("val", self.num_samples)]
            statistics = collect(self.reading, self._pruned_modules(), (x.to(self.device) for x, _ in self.calibration))
            for site in self.method.sites:
                weights = [dense_rows(self.model, reader) for reader in site.readers]
                inputs = [statistics[reader.module] for reader in site.readers]
                self.layers[site.name] = SiteLayers(site, weights, inputs, self.pruner, self.power, self.damping)
        for site in self.method.sites:
            self._search(site.name)
        self._dense_logits = self._calibration_logits()
        self._seconds = time.monotonic() - began

    def _shorten(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        if self.spec.kind == "text" and self.sequence_length is not None:
            inputs, targets = inputs[:, : self.sequence_length], targets[:, : self.sequence_length]
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
        samples = self.method.sample(self._noise(batch_idx))
        if not self._is_learnable(samples):
            return self._no_loss()
        with torch.no_grad(), self._states() as states:
            dense_logits = self.reading(inputs)
        dense_states = dict(states)
        draws = _draws(samples)
        losses = [self._losses(inputs, targets, dense_logits, dense_states, draw) for draw in draws]
        total = torch.stack([torch.stack(list(terms.values())).sum() for terms in losses])
        loss = total.mean() + self._policy_loss(samples, -total.detach()) + self._untouched_parameters()
        terms = {f"{name} loss": value for losses_of_draw in losses for name, value in losses_of_draw.items()}
        self._check_finite(loss, {"inputs": inputs.float(), "logits of the dense model": dense_logits, **terms})
        if self._is_log_step():
            named = {f"train/{name}": value.detach() for name, value in losses[0].items()}
            self._record({"train/loss": loss.detach(), **named})
        return loss

    def _losses(
        self,
        inputs: Tensor,
        targets: Tensor,
        dense_logits: Tensor,
        dense_states: Mapping[str, Tensor],
        samples: Mapping[str, PermutationSample],
    ) -> dict[str, Tensor]:
        """Weighted terms of the loss of the model that is pruned under these permutations."""
        values = {name: self._masked(name, sample) for name, sample in samples.items()}
        with self._states() as states:
            logits = self._run(values, inputs)
        losses = {}
        if self.task_weight:
            losses["cross_entropy"] = self.task_weight * cross_entropy(logits, targets)
        if self.kl_weight:
            losses["kl"] = self.kl_weight * divergence(logits, dense_logits)
        if self.distill_weight:
            pairs = [(states[name], dense_states[name]) for name in dense_states]
            distances = [distance(ours, theirs, self.distill_kind) for ours, theirs in pairs]
            losses["distill"] = self.distill_weight * torch.stack(distances).sum()
        return losses or {"nothing": logits.sum() * 0}

    def _states(self) -> Any:
        """Captures the hidden states that distillation compares, if it is wanted."""
        if not self.distill_weight:
            return capture({})
        if self.distill_over == "every_pruned_layer":
            return capture(self._pruned_modules())
        blocks = block_names(self.model)
        names = blocks if self.distill_over == "block" else blocks[-1:]
        return capture({name: self.model.get_submodule(name) for name in names})

    def _masked(self, name: str, sample: PermutationSample) -> Float[Tensor, "k r"]:
        """Pruned weights of a site by item, with the gradient that the estimator gives them."""
        layers, base, count = self.layers[name], self.method.base(name), self.method.num_groups[name]
        order, soft = split_sample(sample, count)
        options: dict[str, Any] = {"n": self.n, "m": self.m, "mask_temperature": self.mask_temperature}
        if soft is not None and sample.estimator == "straight_through":
            return straight_through_prune(layers.items, layers.scores, soft, order, base, **options)
        if soft is None or sample.estimator != "relaxed":
            return layers.items * hard_mask(base[sample.order], layers.scores, n=self.n, m=self.m)
        weights = layers.items[base].unflatten(0, (count, -1))
        keep, mask = relaxed_mask(soft, layers.scores[base].unflatten(0, (count, -1)), **options)
        pruned = weights * mask if self.mix == "mask" else soft.mT @ ((soft @ weights) * keep)
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

    # Checkpoints of the training hold what learns

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith("model.")}

    # Evaluation

    def predict(self, inputs: Tensor) -> Tensor:
        """Logits of the pruned model; while it is being learned, of the model under its present hard orders."""
        if not self.layers:
            return self.reading(inputs)
        return self._run(self._hard_values(self.method.orders()), inputs)

    def on_validation_epoch_end(self) -> None:
        hard = self.calibration_loss(self._hard_values(self.method.orders()))
        extra = {"calibration_loss": torch.tensor(hard)}
        soft = self._soft_values()
        if soft is not None:
            extra["soft_calibration_loss"] = torch.tensor(self.calibration_loss(soft))
        self._log_scores("val", **extra)

    @torch.no_grad()
    def _soft_values(self) -> dict[str, Tensor] | None:
        """Weights under the relaxed permutation as it is trained; None where training sees hard orders."""
        values = {}
        for site in self.method.sites:
            method, features = self.method[site.name], self.method.features(site.name)
            soft = method.soft_matrix(features) if getattr(method, "estimator", None) == "relaxed" else None
            if soft is None:
                return None
            sample = PermutationSample(method.best(features), soft, None, "relaxed")
            values[site.name] = self._masked(site.name, sample)
        return values

    def _hard_values(self, orders: Orders) -> dict[str, Tensor]:
        masks = {name: hard_mask(order, self.layers[name].scores, n=self.n, m=self.m) for name, order in orders.items()}
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

    def _pruned_values(self, orders: Orders) -> dict[str, Tensor]:
        """Pruned weights of every site by item, updated where the pruner does that."""
        if self.pruner != "sparsegpt":
            return self._hard_values(orders)
        pruned = {name: layers.prune(orders[name], n=self.n, m=self.m) for name, layers in self.layers.items()}
        return {name: layers.stack(pruned[name]) for name, layers in self.layers.items()}

    # After training

    def finish(self, run_dir: Path) -> dict[str, float]:
        """Harden, polish, prune; write `checkpoints/best.ckpt`, `arrays/sites.npz` and `arrays/orders.npz`."""
        began = time.monotonic()
        self._bring_layers()
        starts, learned = self.method.bases(), self.method.orders()
        losses = [self.calibration_loss(self._pruned_values(orders)) for orders in (starts, learned)]
        orders, polished = self._polish(starts if losses[0] <= losses[1] else learned, learned)
        pruned = self._prune(orders)
        seconds = self._seconds + time.monotonic() - began
        results = {
            "prune/calibration_loss_start": losses[0],
            "prune/calibration_loss_learned": losses[1],
            "prune/calibration_loss": self._pruned_loss(pruned),
            "prune/num_parameters": float(sum(p.numel() for p in self.method.parameters())),
            "prune/num_sites": float(len(orders)),
        }
        soft = self._soft_values()
        if soft is not None:
            hard = self.calibration_loss(self._hard_values(learned))
            results["prune/soft_hard_gap"] = hard - self.calibration_loss(soft)
        results |= self._quality(run_dir, orders, starts, pruned, polished)
        results["prune/seconds"] = round(seconds, 3)
        results["prune/peak_memory_mib"] = _peak_memory_mib() - self._memory
        self._take(run_dir, pruned)
        return results

    def _polish(self, better: Orders, learned: Orders) -> tuple[Orders, list[float]]:
        """The learned orders, or, where the method is polished, the better of start and learned after that."""
        if self.method.num_polish_steps == 0:
            return learned, []
        sites = {
            name: Swappable(layers.items, layers.scores, self.method.num_groups[name])
            for name, layers in self.layers.items()
        }
        steps = self.method.num_polish_steps
        return polish(sites, better, self._loss_and_gradient, n=self.n, m=self.m, num_steps=steps, seed=self.seed)

    def _prune(self, orders: Orders) -> dict[str, Tensor]:
        """Whole pruned weights by parameter name."""
        device = self.device
        rows = {name: self.layers[name].prune(order.to(device), n=self.n, m=self.m) for name, order in orders.items()}
        return assemble_weights(self.model, self.method.sites, rows)

    @torch.no_grad()
    def _pruned_loss(self, weights: Mapping[str, Tensor]) -> float:
        named = {f"model.{name}": weight for name, weight in weights.items()}
        parts = self._calibration_losses(lambda inputs: functional_call(self.reading, named, (inputs,)))
        return sum(float(part) for part in parts)

    def _quality(
        self, run_dir: Path, orders: Orders, starts: Orders, pruned: Mapping[str, Tensor], polished: Sequence[float]
    ) -> dict[str, float]:
        sums = [self.layers[name].kept(order, n=self.n, m=self.m) for name, order in orders.items()]
        kept, default, best, total = (sum(column) for column in zip(*sums, strict=True))
        modules = self._pruned_modules()
        pairs = {name: (layer, pruned[f"{name}.weight"]) for name, layer in modules.items()}
        errors = reconstruction_errors(self.reading, pairs, (inputs.to(self.device) for inputs in self.held_out))
        if is_rank_zero():
            write_npz(
                run_dir / "arrays" / "sites.npz",
                site=np.array(list(orders)),
                retained=np.array([part[0] / part[3] for part in sums]),
                layer=np.array(list(errors)),
                reconstruction_error=np.array(list(errors.values())),
                polished_loss=np.array(list(polished)),
            )
            named = {name: order.cpu().numpy() for name, order in orders.items()}
            write_npz(run_dir / "arrays" / "orders.npz", **named)
            write_npz(
                run_dir / "arrays" / "starts.npz", **{name: order.cpu().numpy() for name, order in starts.items()}
            )
        return {
            "prune/retained": kept / total,
            "prune/efficacy": efficacy_of_sums(kept, default, best),
            "prune/reconstruction_error": sum(errors.values()) / len(errors),
        }

    def _take(self, run_dir: Path, pruned: Mapping[str, Tensor]) -> None:
        """Put the pruned weights into the model, and model and orders into the checkpoint that is tested."""
        layers = self.layers.items()
        unpermuted = self._prune({name: torch.arange(len(part.items)) for name, part in layers})
        dense = assemble_weights(
            self.model, self.method.sites, {name: part.unstack(part.items) for name, part in layers}
        )
        self.variants = {"dense": dense, "unpermuted": unpermuted}
        self.layers = {}  # from here on the model is the pruned one
        self.use(pruned)
        if is_rank_zero():
            state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
            state |= {f"method.{name}": value for name, value in self.method.state_dict().items()}
            state["read_order.order"] = self.read_order.order
            write_checkpoint(run_dir / "checkpoints" / "best.ckpt", {"state_dict": state})


def _peak_memory_mib() -> float:
    """Highest use of memory so far: of the GPU's where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


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


def divergence(logits: Tensor, dense_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the dense model's predictions, in nats, mean over samples and tokens."""
    ours, theirs = logits.float().log_softmax(-1), dense_logits.float().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()


def distance(states: Tensor, dense_states: Tensor, kind: str) -> Tensor:
    """Distance of hidden states `[..., d]`: mean over entries (`mse`, `smooth_l1`) or tokens (`cosine`)."""
    if kind == "mse":
        return F.mse_loss(states, dense_states)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(states, dense_states)
    return 1 - F.cosine_similarity(states, dense_states, dim=-1).mean()
