"""Classify images whose patches are read in a learned order: how it is trained."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from permlab.data.module import DataModule
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError
from permlab.method.base import Method
from permlab.method.training_items import TrainingItems
from permlab.model.base import Backbone
from permlab.ops.distance import adjacency, kendall
from permlab.permutation import PermutationSample, invert, permute
from permlab.task.classify.task import Classify
from permlab.task.classify.teacher import load_teacher, probe
from permlab.task.learner import Learner, Result, Summary
from permlab.task.score import ImageScores, Scores


class ClassifyLearner(Learner):
    """Cross-entropy, plus the policy term where the method samples, plus distillation.

    One backward pass on `loss - policy_weight * advantage * log_prob` with one optimiser. The
    reward of a sampled order is the negative cross-entropy of the images that were read in it.

    Args:
        task: the options.
        model, method: what is trained; the method's order is applied between `embed` and `read`.
        optim: settings of the optimiser, see `permlab.task.optim`.
        seed: of the method's noise, which is drawn from (seed, step) and so is the same on every rank.
    Raises:
        ConfigError: if the teacher cannot be loaded, or has other classes where soft targets are wanted; or if the
            model has no position table to move.
    """

    method: Method
    task: Classify

    def __init__(self, task: Classify, model: Backbone, method: Method, optim: Mapping[str, Any], seed: int) -> None:
        super().__init__(task, model, method, optim, seed)
        self._check_position()
        self._set_teacher(task.teacher, task.spec)
        self.confusion = MulticlassConfusionMatrix(task.spec.num_classes)
        self.confusion_counts: Tensor | None = None

    def make_scores(self) -> Scores:
        return ImageScores(self.spec.num_classes)

    def _check_position(self) -> None:
        position, name = getattr(self.model, "position", "none"), type(self.model).__name__
        if self.task.warmup_position == "slot" and not (position == "item" and self.model.moves_positions):
            reason = f"{name} has no table that slots share with items" if position == "item" else f"not {position}"
            raise ConfigError(f"task.warmup_position=slot: needs model.position=item; {reason}")

    def advance(self, step: int) -> None:
        super().advance(step)
        if self.task.warmup_position == "slot":
            self.model.position = "slot" if self.method.phase == "warmup" else "item"

    def _set_teacher(self, name: str | None, spec: DataSpec) -> None:
        # In a tuple, so that the teacher's weights stay out of the checkpoints.
        self.teacher: tuple[nn.Module, ...] = (load_teacher(name, spec),) if name else ()
        self.projection: nn.Module = nn.Identity()
        if not self.teacher:
            return
        num_classes, num_features = probe(self.teacher[0], spec)
        if self.task.distill_weight and num_classes != spec.num_classes:
            raise ConfigError(f"task.teacher={name}: {num_classes} classes, the data has {spec.num_classes}")
        if self.task.feature_weight:
            # A private generator: a teacher must not change the draws of what comes after.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.projection = nn.LazyLinear(num_features)
                with torch.no_grad():
                    items = self.model.embed(torch.zeros(1, spec.channels, spec.height, spec.width))
                    self.projection(self.model.encode(items))

    # Before training

    def prepare(self, data: DataModule, before: Mapping[str, Path]) -> None:
        """Let the method look at training items, where it wants to.

        Raises:
            ConfigError: if there are too few of them for what the method does.
        """
        try:
            self.method.prepare(TrainingItems(partial(self._draw, data), self.seed))
        except ValueError as error:
            raise ConfigError(f"method, before training: {error}") from error

    @torch.no_grad()
    def _draw(self, data: DataModule, count: int) -> tuple[Float[Tensor, "b n d"], Int64[Tensor, " b"]]:
        """Items and labels of up to so many training images, on the CPU."""
        was_training = self.model.training
        self.model.eval()
        batches = data.sample("train", count)
        items = [self.model.embed(images.to(self.device)).float().cpu() for images, _ in batches]
        self.model.train(was_training)
        return torch.cat(items), torch.cat([labels for _, labels in batches])

    # Training

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        items = self.model.embed(images)
        sample = self.method(items, generator=self._noise(batch_idx))
        if not self._is_learnable({"patches": sample}, images=images, items=items):
            return self._no_loss()
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
        cross_entropy = F.cross_entropy(flat, flat_targets, label_smoothing=self.task.label_smoothing)
        losses: dict[str, Tensor] = {"cross_entropy": cross_entropy}
        if sample.log_prob is not None:
            reward = -F.cross_entropy(flat.detach(), flat_targets, reduction="none").view(targets.shape)
            advantage = self.method.advantage(reward).detach()
            losses["policy"] = -self.task.policy_weight * (advantage * sample.log_prob).mean()
        if self.teacher:
            losses |= self._distillation(images, features, logits)
        return losses

    def _distillation(self, images: Tensor, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            theirs, their_features = self.teacher[0](images)
        losses = {}
        if self.task.distill_weight:
            scale = self.task.distill_temperature
            target = F.log_softmax(theirs / scale, -1).expand(logits.shape)
            divergence = F.kl_div(F.log_softmax(logits / scale, -1), target, reduction="none", log_target=True)
            losses["distill"] = self.task.distill_weight * scale**2 * divergence.sum(-1).mean()
        if self.task.feature_weight:
            mapped = self.projection(features).unflatten(0, logits.shape[:-1])
            losses["feature"] = self.task.feature_weight * F.mse_loss(mapped, their_features.expand(mapped.shape))
        return losses

    # Evaluation

    def predict(self, inputs: Tensor) -> Tensor:
        items = self.model.embed(inputs)
        return self.model.read(permute(items, self.method(items)))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.confusion.update(self._evaluate("test", batch), batch[1])

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self.confusion_counts = self.confusion.compute()  # on every rank: it gathers
        self.confusion.reset()

    def finish(self, test: Callable[[], Summary]) -> Result:
        summary = test()
        assert self.confusion_counts is not None
        arrays = {"order": self.order_arrays(), "confusion": {"confusion": self.confusion_counts.cpu().numpy()}}
        return Result(summary | self._found_of_the_truth(), arrays)

    def _found_of_the_truth(self) -> Summary:
        """How much of an order that the data set hides the learned order is; nothing where there is none of either."""
        truth = self.trainer.datamodule.truth()  # type: ignore[attr-defined]
        orders = self.method.orders()
        if truth is None or not orders:
            return {}
        (order,) = orders.values()
        # The path of the learned order through the image as it was.
        path = invert(torch.from_numpy(truth).to(order.device))[order]
        raster = torch.arange(len(path), device=path.device)
        along = kendall(path, raster).abs()  # reversed, an order is negated
        beside = adjacency(path, self.model.height, self.model.width)
        return {"truth/kendall": float(along), "truth/adjacency": float(beside)}

    def on_fit_start(self) -> None:
        for teacher in self.teacher:
            teacher.to(self.device)
