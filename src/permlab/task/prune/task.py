"""Prune a trained model to N:M structured sparsity, with a learned permutation of its input channels: what is asked."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from permlab.config.plan import Plan
from permlab.config.schema import component_names, component_options, constant, preset_component
from permlab.data.spec import DataSpec
from permlab.errors import nearest
from permlab.model.pretrained_head import num_head_classes
from permlab.option import (
    AddedLater,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Rate,
    Temperature,
    Verbatim,
)
from permlab.record.stored import read_plan
from permlab.task.metric import ACCURACY, PERPLEXITY, Metric, Row
from permlab.task.task import Companion, Idle, Task

# The task that trains the model, and what that is judged by, for each kind of data.
TRAINED_BY: dict[str, tuple[str, Metric]] = {"image": ("classify", ACCURACY), "text": ("lm", PERPLEXITY)}
# The task that trains a head alone, where pretrained weights come without one for the classes of the data.
HEAD_TRAINED_BY = "probe"
# What the dense run takes over from the pruning's: the model, and where it computes, not how long.
TRAINER_KEYS = (
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "enable_progress_bar"),
    *("on_nonfinite", "max_skips"),
)
SHARED = ("figures", "seed", "paths", "checkpoint", "num_threads", "logger")
# Options of the loss, idle where nothing is learned.
LOSS_OPTIONS = (
    *("task_weight", "kl_weight", "distill_weight", "distill_kind", "distill_over"),
    *("mask_temperature", "mask_backward", "mix"),
)
# A law over more patterns of a group holds more logits than it is worth.
MAX_PATTERNS = 256
# Logits that are kept as they are. Of more, log-probabilities are kept in half precision.
MAX_KEPT_WHOLE = 2**26
# Settings that name the dense model.
DENSE = ("dense", "dense_steps")


class Prune(Task):
    """Learns the orders of the input channels under which an N:M mask loses least; all weights are frozen.

    Args:
        spec: shape of the data.
        n, m: n kept of every m consecutive input channels.
        pruner: importance of a weight: `magnitude`, `wanda`, `ria`, or `sparsegpt`, which also updates
            the weights that are kept. In training `sparsegpt` stands for its static saliency.
        power: of the input norm in `ria`.
        damping: added to the Hessian's diagonal in `sparsegpt`, in multiples of its mean.
        sites: `all`; `foldable`, all of them under orders that fold: one for each residual stream, and those
            inside the blocks; `stream`, the layers that read one alone; or names or kinds of sites.
        coupling: whether layers with the same input share an order (`shared`) or have one each.
        within_heads: keep the order of an attention output's input within heads, which folds.
        num_groups: equal consecutive blocks of channels that no channel leaves; 1 for a global order.
        block_size: channels in a group where `num_groups` is null; narrower sites have one group.
        mask_temperature: of the softmax that gradients take for the choice of the n best.
        mask_backward: what stands for the mask where a straight-through gradient of the permutation that maps
            it back is taken: the `hard` mask, or the `softmax` (PermLLM's code).
        mix: what a relaxed permutation mixes: the `weight`, as the paper has it, or the `mask` alone.
        weight_dtype: precision in which the frozen weights wait, and compute. A block that is being calibrated,
            searched or pruned is in float32 meanwhile, and so is what learns.
        calibrate: what the statistics of a block are taken behind: `dense` blocks, or, as Wanda, SparseGPT, RIA and
            PermLLM are published, blocks that are pruned already (`sequential`).
        num_samples: calibration samples (images, or windows of text).
        sequence_length: tokens of a calibration sample, at most the data's; null for the data's. Text only.
        cache_gib: disk that predictions of the dense model may take; what does not fit is computed again.
        task_weight: of the cross-entropy on labels.
        kl_weight: of the divergence from the dense model's predictions.
        distill_weight: of the distance between hidden states of the dense and the pruned model.
        distill_kind: mean squared error, smooth L1, or one minus the cosine.
        distill_over: outputs of every pruned layer, of every block, or of the last block.
        mask: how the mask comes about in the order that was found: `topk`, the best of each m by score;
            `maskllm`, a learned law over the patterns of each m; `proxsparse`, learned weights shrunk towards
            2:4, of which only the mask is used.
        mask_share: last part of the steps, in which the mask learns and the orders, settled, no longer do.
        gumbel_lr: peak learning rate of the logits.
        gumbel_scale: of the logits beside the noise: a number, or a schedule over the steps of the mask.
        gumbel_temperature: of the relaxed draws, likewise.
        gumbel_prior: strength of the pruner's mask in the logits at the start.
        gumbel_reward: of the squares of the weights that a draw keeps; it falls to 0.
        prox_lr: peak learning rate of the weights whose mask is learned.
        prox_penalty: of the products of three weights of a group, at every step.
        prox_anchor: of the distance to the dense weights of those that are kept.
        dense: run directory of the model to prune; null trains one, or finds it trained.
        dense_steps: optimiser steps of that training; null for its task's own number.
    Source: arXiv:2601.22980 (relaxed training, groups, losses); Zou et al. 2025, arXiv:2510.10136
        (straight-through, blocks, cosine of the last block); Fang et al. 2024, arXiv:2409.17481 (`maskllm`); Liu et
        al. 2025, arXiv:2502.00258 (`proxsparse`).
    Differs from source: see docs/pruning.md.
    """

    takes: ClassVar[tuple[str, ...]] = ("image", "text")
    permutes: ClassVar[str] = "weights"
    exports: ClassVar[bool] = True
    effort: ClassVar[float] = 4.0
    trains_model: ClassVar[bool] = False
    num_tests: ClassVar[float] = 3.0  # the dense model, the one with its channels as they are, and the pruned one
    panels: ClassVar[tuple[tuple[str, Mapping[str, str]], ...]] = (
        ("accuracy", {"train (batch)": "train/accuracy", "validation": "val/accuracy"}),
        ("perplexity", {"validation": "val/perplexity"}),
        ("divergence\nfrom dense", {"hard orders": "val/calibration_loss", "soft orders": "val/soft_calibration_loss"}),
    )
    compared_within: ClassVar[tuple[str, ...]] = (*DENSE, "sites", "num_samples")
    clock: ClassVar[tuple[str, str]] = ("prune/seconds", "time for the orders, statistics included")

    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "coupling": ("sites", ["foldable", "stream"]),
        "within_heads": ("sites", ["foldable", "stream"]),
        "power": ("pruner", ["magnitude", "wanda", "sparsegpt"]),
        "damping": ("pruner", ["magnitude", "wanda", "ria"]),
        "block_size": ("num_groups", ["<set>"]),
        "distill_kind": ("distill_weight", [0]),
        "distill_over": ("distill_weight", [0]),
        "dense_steps": ("dense", ["<set>"]),
        "sequence_length": ("kind", ["image"]),
        "mask_share": ("mask", ["topk"]),
        "gumbel_lr": ("mask", ["topk", "proxsparse"]),
        "gumbel_scale": ("mask", ["topk", "proxsparse"]),
        "gumbel_temperature": ("mask", ["topk", "proxsparse"]),
        "gumbel_prior": ("mask", ["topk", "proxsparse"]),
        "gumbel_reward": ("mask", ["topk", "proxsparse"]),
        "prox_lr": ("mask", ["topk", "maskllm"]),
        "prox_penalty": ("mask", ["topk", "maskllm"]),
        "prox_anchor": ("mask", ["topk", "maskllm"]),
    }

    def __init__(
        self,
        spec: DataSpec,
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
        mask_backward: Annotated[Literal["hard", "softmax"], AddedLater("hard")],
        mix: Literal["weight", "mask"],
        weight_dtype: Annotated[Literal["float32", "bfloat16"], AddedLater("float32")],
        calibrate: Annotated[Literal["dense", "sequential"], AddedLater("dense")],
        num_samples: PositiveInt,
        sequence_length: PositiveInt | None,
        cache_gib: Annotated[NonNegativeFloat, AddedLater(16.0)],
        task_weight: NonNegativeFloat,
        kl_weight: NonNegativeFloat,
        distill_weight: NonNegativeFloat,
        distill_kind: Literal["mse", "smooth_l1", "cosine"],
        distill_over: Literal["every_pruned_layer", "block", "last"],
        mask: Annotated[Literal["topk", "maskllm", "proxsparse"], AddedLater("topk")],
        mask_share: Annotated[Fraction, AddedLater(0.5)],
        gumbel_lr: Annotated[Rate, AddedLater(0.003)],
        gumbel_scale: Annotated[Temperature, AddedLater({"kind": "linear", "start": 100.0, "end": 500.0})],
        gumbel_temperature: Annotated[Temperature, AddedLater({"kind": "linear", "start": 4.0, "end": 0.05})],
        gumbel_prior: Annotated[NonNegativeFloat, AddedLater(3.0)],
        gumbel_reward: Annotated[NonNegativeFloat, AddedLater(1e-5)],
        prox_lr: Annotated[Rate, AddedLater(0.001)],
        prox_penalty: Annotated[PositiveFloat, AddedLater(0.25)],
        prox_anchor: Annotated[NonNegativeFloat, AddedLater(0.0)],
        dense: Verbatim | None,
        dense_steps: PositiveInt | None,
    ) -> None:
        super().__init__(spec)
        self.n, self.m, self.pruner, self.power, self.damping = n, m, pruner, power, damping
        self.sites, self.coupling, self.within_heads = sites, coupling, within_heads
        self.num_groups, self.block_size = num_groups, block_size
        self.mask_temperature, self.mask_backward, self.mix = mask_temperature, mask_backward, mix
        self.calibrate, self.num_samples, self.sequence_length = calibrate, num_samples, sequence_length
        self.weight_dtype, self.cache_gib = weight_dtype, cache_gib
        self.task_weight, self.kl_weight = task_weight, kl_weight
        self.distill_weight, self.distill_kind, self.distill_over = distill_weight, distill_kind, distill_over
        self.mask, self.mask_share = mask, mask_share
        self.gumbel_lr, self.gumbel_scale, self.gumbel_temperature = gumbel_lr, gumbel_scale, gumbel_temperature
        self.gumbel_prior, self.gumbel_reward = gumbel_prior, gumbel_reward
        self.prox_lr, self.prox_penalty, self.prox_anchor = prox_lr, prox_penalty, prox_anchor
        self.dense, self.dense_steps = dense, dense_steps

    @property
    def metric(self) -> Metric:  # type: ignore[override]
        return TRAINED_BY[self.spec.kind][1]

    @property
    def monitor(self) -> Metric:
        return Metric("calibration_loss", "min")

    @property
    def rows(self) -> tuple[Row, ...]:
        key = self.metric.key
        return (
            Row("pruned, channels as they are", f"{key}_unpermuted", "unpermuted"),
            Row("pruned, {order}" + ("" if self.mask == "topk" else f", {self.mask}"), key, "pruned"),
            Row("dense", f"{key}_dense", "dense", once=DENSE),
            Row("retained score", "prune/retained", "retained", ".4f"),
            Row("efficacy", "prune/efficacy", "efficacy", ".3f"),
            Row("reconstruction error, held out", "prune/reconstruction_error", "reconstruction error", ".4f"),
            Row("divergence from dense, calibration", "prune/calibration_loss", "divergence", ".4f"),
            Row("seconds for the orders", "prune/seconds", "seconds", ".1f"),
            Row("", "prune/peak_memory_mib", "MiB", ".0f"),
            Row("parameters learned", "prune/num_parameters", "parameters", ".0f"),
        )

    # Rules between keys

    def problems(self, plan: Plan) -> list[str]:
        problems = []
        if self.n >= self.m:
            problems.append(f"task.n={self.n}: keeps all of every task.m={self.m}; expected less")
        problems += self._problems_of_mask(plan)
        length, longest = self.sequence_length, self.spec.width
        if length is not None and self.spec.is_sequence and length > longest:
            problems.append(f"task.sequence_length={length}: exceeds data.sequence_length={longest}")
        if self.dense is not None and not Path(self.dense, "config.yaml").is_file():
            problems.append(f"task.dense={self.dense}: not a run directory (no config.yaml)")
        elif self.dense is not None and not Path(self.dense, "checkpoints", "best.ckpt").is_file():
            problems.append(f"task.dense={self.dense}: no checkpoints/best.ckpt; the run has not validated yet")
        return problems + self._problems_of_model(plan)

    def _problems_of_mask(self, plan: Plan) -> list[str]:
        if self.mask == "proxsparse" and (self.n, self.m) != (2, 4):
            return [f"task.mask=proxsparse: its regulariser is for 2:4, not {self.n}:{self.m}; nearest: maskllm"]
        if self.mask == "maskllm" and math.comb(self.m, self.n) > MAX_PATTERNS:
            count, most = math.comb(self.m, self.n), MAX_PATTERNS
            return [f"task.mask=maskllm: {self.n}:{self.m} has {count} patterns, more than {most}; nearest: 4:8"]
        if self.mask != "topk" and self._orders_learn(plan) and not 0 < self.mask_share < 1:
            return [f"task.mask_share={self.mask_share}: leaves no steps for the mask, or none for the orders"]
        return []

    def _problems_of_model(self, plan: Plan) -> list[str]:
        if self._has_sites(plan.config["model"]["component"]):
            return []
        name = plan.config["model"]["name"]
        able = [other for other in component_names("model") if self._has_sites(preset_component("model", other))]
        return [f"model={name}: has no linear layers that task=prune knows how to prune{nearest(name, able)}"]

    def _has_sites(self, model: str) -> bool:
        """Whether a backbone is built of known blocks, and reads such data."""
        reads = constant("model", model, "reads") or ("image",)
        return self.spec.kind in reads and constant("model", model, "blocks_of") is not None

    def idle(self, plan: Plan) -> Iterator[Idle]:
        method, pretrained = plan.config["method"], plan.config["model"].get("pretrained")
        options, named = component_options("method", method["component"]), f"method={method['name']}"
        for key in ("optim.lr", "optim.weight_decay"):
            yield key, "task=prune, which freezes the model's weights"
        if self.dense is not None or pretrained:
            yield "model.lr", "a model that is trained already"
        if self._num_logits() <= MAX_KEPT_WHOLE:
            yield "task.cache_gib", f"{self._num_logits():,} predictions, which are kept in memory"
        if not self.learns(plan):
            optim = ("beta1", "beta2", "schedule", "warmup_fraction", "hold_fraction")
            trainer = ("max_steps", "max_epochs", "gradient_clip_val", "on_nonfinite")
            keys = [*(f"task.{key}" for key in LOSS_OPTIONS), *(f"optim.{key}" for key in optim)]
            for key in [*keys, *(f"trainer.{key}" for key in trainer)]:
                yield key, f"{named}, which does not learn"
            yield "data.shuffle_labels", f"{named}, which does not learn"
        if not self.task_weight:
            yield "data.shuffle_labels", f"task.task_weight={self.task_weight}"
        if not self._orders_learn(plan):
            yield "task.mask_share", f"{named}, which does not learn"
        if "estimator" not in options:
            yield "task.mask_temperature", f"{named}, which has no relaxation"
        if method.get("estimator") != "straight_through":
            yield "task.mask_backward", f"{named}, which is not straight-through"
        if method.get("estimator") != "relaxed":
            yield "task.mix", f"{named}, which mixes no items"
        if pretrained and self._trained_by(plan.config) is None:
            yield "task.dense_steps", "model.pretrained"

    def _num_logits(self) -> int:
        """Predictions of the dense model for the calibration samples, at most."""
        length = (self.sequence_length or self.spec.width) if self.spec.is_sequence else 1
        return self.num_samples * length * self.spec.num_classes

    def learns(self, plan: Plan) -> bool:
        return self.mask != "topk" or self._orders_learn(plan)

    def _orders_learn(self, plan: Plan) -> bool:
        return "lr" in component_options("method", plan.config["method"]["component"])

    def passes(self, plan: Plan) -> Mapping[str, float]:
        walks = 2 if self.calibrate == "sequential" else 1
        found = {"calibration": (walks + 1) * self.num_samples, "quality": 2 * self.num_samples}
        method, batch_size = plan.config["method"], plan.config["data"]["batch_size"]
        descended, polished = (method.get(f"num_{name}_steps") or 0 for name in ("descent", "polish"))
        if descended:
            found["descent"] = 3 * descended * min(batch_size, self.num_samples)
        if polished:
            found["polishing"] = 3 * (polished + 1) * self.num_samples
        return found

    def complete(self, config: dict[str, Any]) -> None:
        if self.dense or self._trained_by(config) is None:
            config["task"]["dense_steps"] = None  # nothing is trained before

    # The dense model

    def _trained_by(self, config: Mapping[str, Any]) -> str | None:
        """Task that trains the dense model, or its head alone; None where pretrained weights are whole."""
        pretrained = config["model"].get("pretrained")
        if not pretrained:
            return TRAINED_BY[self.spec.kind][0]
        is_whole = self.spec.kind != "image" or num_head_classes(pretrained) == self.spec.num_classes
        return None if is_whole else HEAD_TRAINED_BY

    def data_seed(self, plan: Plan) -> int:
        """That of the dense run, or its training samples would be tested on."""
        return read_plan(Path(self.dense)).config["seed"] if self.dense else plan.config["seed"]

    def before(self, plan: Plan) -> dict[str, Companion]:
        """The dense run: same model, data, seed and machine, its task's own schedule."""
        config, trained_by = plan.config, self._trained_by(plan.config)
        if self.dense:
            return {"dense": Companion(run=Path(self.dense))}
        if trained_by is None:
            return {}
        names = {group: config[group]["name"] for group in ("model", "data")}
        words = [f"task={trained_by}", "method=fixed", *(f"{k}={v}" for k, v in names.items())]
        own = ("batch_size", "num_workers", "shuffle_labels")  # the dense model is trained on true labels
        data = [f"data.{key}" for key in config["data"] if key not in own]
        change: dict[str, Any] = {} if trained_by == HEAD_TRAINED_BY else {"optim.lr": config["model"]["lr"]}
        if self.dense_steps:
            change |= {"trainer.max_steps": self.dense_steps, "trainer.val_check_interval": None}
        take = ("model", *data, *(f"trainer.{key}" for key in TRAINER_KEYS), *SHARED)
        return {"dense": Companion(tuple(words), take, change, label="dense model", shorten="task.dense_steps")}

    # Tables over runs

    def section(self, plan: Plan) -> str:
        return f", {self.n}:{self.m}"

    def label(self, plan: Plan) -> str:
        name = plan.config["method"]["name"]
        parts = (self.pruner, *((name,) if name != "fixed" else ()), *((self.mask,) if self.mask != "topk" else ()))
        return " + ".join(parts)

    def baseline(self, plan: Plan, summary: Mapping[str, float]) -> float | None:
        """Plain Wanda; runs that prune by it have measured that themselves, on the way."""
        is_plain = plan.config["method"]["name"] == "fixed" and self.mask == "topk"
        plain = self.metric.key if is_plain else f"{self.metric.key}_unpermuted"
        return summary.get(plain) if self.pruner == "wanda" else None
