"""Classify images whose patches are read in a learned order."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from permlab.data.spec import DataSpec
from permlab.errors import ConfigError, NonFiniteError
from permlab.method.base import Method
from permlab.model.base import Backbone
from permlab.optim import build_optimizer
from permlab.option import Fraction, NonNegativeFloat, PositiveFloat
from permlab.permutation import PermutationSample, permute
from permlab.task.teacher import load_teacher, probe


class Classify(L.LightningModule):
    """Cross-entropy, plus the policy term where the method samples, plus distillation.

    One backward pass on `loss - policy_weight * advantage * log_prob` with one optimiser. The
    reward of a sampled order is the negative cross-entropy of the images that were read in it.

    Args:
        spec, model, method: what is trained; the method's order is applied between `embed` and `read`.
        optim: settings of the optimiser, see `permlab.optim`.
        seed: of the method's noise, which is drawn from (seed, step) and so is the same on every rank.
        label_smoothing: of the cross-entropy that is minimised, not of the reward.
        policy_weight: weight of the policy term.
        teacher: a run directory or `timm/<name>`; null for none.
        distill_weight, distill_temperature: soft-target KL times the squared temperature
            (Hinton et al. 2015, arXiv:1503.02531).
        feature_weight: mean squared error between the student's pooled features, through a
            learned linear map, and the teacher's.
    Raises:
        ConfigError: if the teacher cannot be loaded, or has other classes where soft targets are wanted.
    """

    takes: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(
        self,
        spec: DataSpec,
        model: Backbone,
        method: Method,
        optim: Mapping[str, Any],
        seed: int,
        *,
        label_smoothing: Fraction,
        policy_weight: NonNegativeFloat,
        teacher: str | None,
        distill_weight: NonNegativeFloat,
        distill_temperature: PositiveFloat,
        feature_weight: NonNegativeFloat,
    ) -> None:
        super().__init__()
        self.model, self.method, self.optim, self.seed = model, method, dict(optim), seed
        self.label_smoothing, self.policy_weight = label_smoothing, policy_weight
        self.distill_weight, self.distill_temperature = distill_weight, distill_temperature
        self.feature_weight = feature_weight
        self.num_steps = 1
        self._set_teacher(teacher, spec)
        metrics = {split: _metrics(spec.num_classes) for split in ("val", "test")}
        self.metrics = nn.ModuleDict(metrics)
        self.confusion = MulticlassConfusionMatrix(spec.num_classes)

    def _set_teacher(self, name: str | None, spec: DataSpec) -> None:
        # In a tuple, so that the teacher's weights stay out of the checkpoints.
        self.teacher = (load_teacher(name, spec),) if name else ()
        self.projection: nn.Module = nn.Identity()
        if not self.teacher:
            return
        num_classes, num_features = probe(self.teacher[0], spec)
        if self.distill_weight and num_classes != spec.num_classes:
            raise ConfigError(f"task.teacher={name}: {num_classes} classes, the data has {spec.num_classes}")
        if self.feature_weight:
            # A private generator: a teacher must not change the draws of what comes after.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.projection = nn.LazyLinear(num_features)
                with torch.no_grad():
                    items = self.model.embed(torch.zeros(1, spec.channels, spec.height, spec.width))
                    self.projection(self.model.encode(items))

    # Training

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        items = self.model.embed(images)
        sample = self.method(items, generator=self._noise(batch_idx))
        permuted = permute(items, sample)
        features = self.model.encode(permuted.flatten(0, -3))
        logits = self.model.head(features).unflatten(0, permuted.shape[:-2])
        losses = self._losses(images, labels, features, logits, sample)
        loss = torch.stack(list(losses.values())).sum() + self._untouched_parameters()
        tensors = {"items": items, "soft": sample.soft, "log_prob": sample.log_prob, "logits": logits}
        self._check_finite(loss, {"images": images, **tensors, **{f"{k} loss": v for k, v in losses.items()}})
        if self._is_log_step():
            accuracy = (logits.argmax(-1) == labels).float().mean()
            logged = {f"train/{name}": value.detach() for name, value in losses.items()}
            self._record({"train/loss": loss.detach(), "train/accuracy": accuracy, **logged})
        return loss

    def _losses(
        self,
        images: Tensor,
        labels: Int64[Tensor, " b"],
        features: Float[Tensor, "kb f"],
        logits: Float[Tensor, "*k b c"],
        sample: PermutationSample,
    ) -> dict[str, Tensor]:
        """Weighted terms of the loss; logits carry an axis of samples where there are several."""
        targets = labels.expand(logits.shape[:-1])
        flat, flat_targets = logits.flatten(0, -2), targets.flatten()
        losses = {"cross_entropy": F.cross_entropy(flat, flat_targets, label_smoothing=self.label_smoothing)}
        if sample.log_prob is not None:
            reward = -F.cross_entropy(flat.detach(), flat_targets, reduction="none").view(targets.shape)
            advantage = self.method.advantage(reward).detach()
            losses["policy"] = -self.policy_weight * (advantage * sample.log_prob).mean()
        if self.teacher:
            losses |= self._distillation(images, features, logits)
        return losses

    def _distillation(self, images: Tensor, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            theirs, their_features = self.teacher[0](images)
        losses = {}
        if self.distill_weight:
            scale = self.distill_temperature
            target = F.log_softmax(theirs / scale, -1).expand(logits.shape)
            divergence = F.kl_div(F.log_softmax(logits / scale, -1), target, reduction="none", log_target=True)
            losses["distill"] = self.distill_weight * scale**2 * divergence.sum(-1).mean()
        if self.feature_weight:
            mapped = self.projection(features).unflatten(0, logits.shape[:-1])
            losses["feature"] = self.feature_weight * F.mse_loss(mapped, their_features.expand(mapped.shape))
        return losses

    def _noise(self, batch_idx: int) -> torch.Generator:
        """Noise of this step: a function of (seed, step, batch), so a resumed run draws what it would have drawn."""
        generator = torch.Generator(device=self.device)
        return generator.manual_seed((self.seed << 40) + (self.global_step << 16) + batch_idx % (1 << 16))

    def _untouched_parameters(self) -> Tensor | float:
        """Zero, through the parameters of a method that is not learning: DDP wants each in every graph."""
        if self.method.phase == "active":
            return 0.0
        return sum((0.0 * parameter.sum() for parameter in self.method.parameters()), start=0.0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.method.phase != "active":
            for parameter in self.method.parameters():
                parameter.grad = None  # a zero gradient would let Adam's momentum move it

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient norm of model and permutation separately, and log both before clipping."""
        limit = float("inf") if gradient_clip_val is None else gradient_clip_val
        scaled = self.trainer.precision in ("16-mixed", "16")  # its scaler skips steps that overflow
        for name, module in (("model", self.model), ("permutation", self.method)):
            parameters = [p for p in module.parameters() if p.grad is not None]
            if not parameters:
                continue
            norm = nn.utils.clip_grad_norm_(parameters, limit)
            if not scaled and not torch.isfinite(norm):
                key = "method.lr or raise method.temperature" if name == "permutation" else "optim.lr"
                raise NonFiniteError(
                    f"step {self.global_step}: gradient norm of the {name} is {norm.item()} "
                    f"({_first_bad_gradient(module)}); lower {key}"
                )
            if self._is_log_step():
                self._record({f"{name}/grad_norm": norm})

    def _check_finite(self, loss: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
        if torch.isfinite(loss):
            return
        weights = {f"weight {name}": weight for name, weight in self.named_parameters()}
        suspects = {**weights, **tensors}
        bad = [name for name, value in suspects.items() if value is not None and not torch.isfinite(value).all()]
        raise NonFiniteError(
            f"step {self.global_step}: the loss is {loss.item()}; first non-finite tensor: {[*bad, 'loss'][0]}; "
            "lower optim.lr or method.lr, or raise method.temperature; checkpoints/last.ckpt is the last good state"
        )

    def _is_log_step(self) -> bool:
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def _record(self, values: Mapping[str, Tensor]) -> None:
        """Log for the step that is being made, counted as done.

        Straight to the logger: by the time a checkpoint is written, all that was logged for its
        steps is in the run's files, so a resumed run neither misses nor repeats a line.
        """
        if self.logger is not None:
            self.logger.log_metrics({key: float(value) for key, value in values.items()}, step=self.global_step + 1)

    def configure_optimizers(self) -> dict[str, Any]:
        self.num_steps = int(self.trainer.estimated_stepping_batches)
        model = nn.ModuleList([self.model, self.projection])
        optimizer, scheduler = build_optimizer(model, self.method, self.optim, num_steps=self.num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Evaluation

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.confusion.update(self._evaluate("test", batch), batch[1])

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        items = self.model.embed(images)
        logits = self.model.read(permute(items, self.method(items))).float()
        metrics = self.metrics[split]
        metrics["scores"].update(logits, labels)  # type: ignore[index]
        metrics["loss"].update(F.cross_entropy(logits, labels, reduction="none"))  # type: ignore[index]
        return logits

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, split: str) -> None:
        metrics = self.metrics[split]
        values = {**metrics["scores"].compute(), "loss": metrics["loss"].compute()}  # type: ignore[index]
        named = {f"{split}/{name}": value for name, value in values.items()}
        self.log_dict(named, logger=False)
        if self.logger is not None and self.global_step:
            self.logger.log_metrics({key: float(value) for key, value in named.items()}, step=self.global_step)
        for metric in metrics.values():  # type: ignore[union-attr, operator]
            metric.reset()

    def on_fit_start(self) -> None:
        for teacher in self.teacher:
            teacher.to(self.device)


def _metrics(num_classes: int) -> nn.ModuleDict:
    scores = {
        "accuracy": MulticlassAccuracy(num_classes, average="micro"),
        "accuracy_top5": MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes)),
        "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
    }
    return nn.ModuleDict({"scores": MetricCollection(scores, compute_groups=False), "loss": MeanMetric()})


def _first_bad_gradient(module: nn.Module) -> str:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"first in {name}"
    return "by overflow of the sum"
