"""Prune a trained model to N:M structured sparsity: how the orders of its channels are learned."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from permlab.config.plan import Plan
from permlab.data.module import DataModule
from permlab.method.site_methods import SiteMethods
from permlab.model.base import Backbone
from permlab.permutation import PermutationSample, gather_items, invert
from permlab.sparsity.calibrate import capture
from permlab.sparsity.mask import hard_mask, relaxed_mask, split_sample, straight_through_prune
from permlab.sparsity.site import block_names
from permlab.task.learner import Parts
from permlab.task.metric import PERPLEXITY
from permlab.task.optim import Stage
from permlab.task.piece import Amounts, Piece
from permlab.task.prune.finished import FinishedLearner
from permlab.task.prune.losses import distance, divergence
from permlab.task.prune.rehearsal import Rehearsal
from permlab.task.prune.sites import at_sites
from permlab.task.score import ImageScores, Scores, TextScores, cross_entropy


class PruneLearner(FinishedLearner):
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
    # Weights under the present orders, while a validation lasts.
    _validated: dict[str, Tensor] | None = None

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

    def learned(self) -> Parts:
        return ("method", self.method), ("masks", self.masks)

    def tested(self) -> Parts:
        return ("model", self.model), ("read_order", self.read_order)

    def on_train_start(self) -> None:
        self._seconds -= time.monotonic()

    def on_train_end(self) -> None:
        self._seconds += time.monotonic()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._seconds += checkpoint.get("seconds", 0.0)  # of earlier starts, their search included

    def on_fit_start(self) -> None:
        self._bring_layers()

    # Training

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        self.reading.eval()
        samples = {} if self.masks.settled else self.method.sample(self._noise(batch_idx))
        if not self._is_learnable(samples):
            return self._no_loss()
        dense_logits, dense_states = self._dense(inputs)
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

    @torch.no_grad()
    def _dense(self, inputs: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the dense model gives, where a loss compares with it."""
        if not (self.task.kl_weight or self.task.distill_weight):
            return None, {}
        with self._states() as states:
            logits = self.reading(inputs)
        return logits, dict(states)

    def _losses(
        self,
        inputs: Tensor,
        targets: Tensor,
        dense_logits: Tensor | None,
        dense_states: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Weighted terms of the loss of the model with these pruned weights by item."""
        with self._states() as states:
            logits = self._run(values, inputs)
        losses = {}
        if self.task.task_weight:
            losses["cross_entropy"] = self.task.task_weight * cross_entropy(logits, targets)
        if dense_logits is not None and self.task.kl_weight:
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
        num_batches = round(self.task.num_tests * amounts.test_batches)
        yield from super().pieces(data, replace(amounts, test_batches=num_batches))
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
        weights = self._validated if self._validated is not None else self._present_weights()
        return self._run_with(weights, inputs)

    @torch.no_grad()
    def _present_weights(self) -> dict[str, Tensor]:
        return self._assemble(self._hard_values(self._orders(), self.masks.keep()))

    def on_validation_epoch_start(self) -> None:
        self._validated = self._present_weights() if self.layers else None

    def on_validation_epoch_end(self) -> None:
        weights, self._validated = self._validated, None
        extra = {}
        if weights is not None:
            extra["calibration_loss"] = torch.tensor(self._pruned_loss(weights))
            del weights
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
