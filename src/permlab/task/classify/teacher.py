"""Teachers for distillation: a finished run, or a timm model."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from permlab.config.build import build
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError, nearest
from permlab.permutation import permute
from permlab.record.checkpoint import load_weights
from permlab.record.stored import read_plan
from permlab.task.place import at_items


class RunTeacher(nn.Module):
    """The picked model of a run, reading in its learned order."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        plan = read_plan(run_dir)
        self.spec = plan.spec
        self.model = build("model", plan.config["model"], plan.spec)
        self.method = at_items(self.model, plan)
        load_weights(run_dir / "checkpoints" / "best.ckpt", ("model", self.model), ("method", self.method))

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b f"]]:
        items = self.model.embed(images)
        features = self.model.encode(permute(items, self.method(items)))
        return self.model.head(features), features


class TimmTeacher(nn.Module):
    """A timm model; images are resized to the size it was trained on.

    Args:
        name: a timm model name.
        pretrained: load timm's weights (needs the network, or timm's cache).
    """

    def __init__(self, name: str, spec: DataSpec, *, pretrained: bool = True) -> None:
        super().__init__()
        import timm

        model: Any = timm.create_model(name, pretrained=pretrained, in_chans=spec.channels)
        self.model, self.size = model, list(model.pretrained_cfg["input_size"][-2:])

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b f"]]:
        if list(images.shape[-2:]) != self.size:
            images = nn.functional.interpolate(images, self.size, mode="bilinear", antialias=True)
        model: Any = self.model
        hidden = model.forward_head(model.forward_features(images), pre_logits=True)
        return model.get_classifier()(hidden), hidden


def load_teacher(name: str, spec: DataSpec) -> nn.Module:
    """A frozen teacher in evaluation mode.

    Args:
        name: a run directory, or `timm/<model name>`.
    Raises:
        ConfigError: if the run reads other data, or timm does not know the model or cannot get its weights.
    """
    if name.startswith("timm/"):
        teacher: nn.Module = _load_timm(name, spec)
    else:
        teacher = RunTeacher(Path(name))
        theirs = teacher.spec
        assert isinstance(theirs, DataSpec)
        if (theirs.channels, theirs.height, theirs.width) != (spec.channels, spec.height, spec.width):
            raise ConfigError(
                f"task.teacher={name}: reads {theirs.channels}x{theirs.height}x{theirs.width} images, "
                f"the data has {spec.channels}x{spec.height}x{spec.width}"
            )
    return teacher.eval().requires_grad_(False)


def _load_timm(name: str, spec: DataSpec) -> nn.Module:
    import timm

    model_name = name.removeprefix("timm/")
    if not timm.is_model(model_name):
        raise ConfigError(f"task.teacher={name}: timm has no such model{nearest(model_name, timm.list_models())}")
    try:
        return TimmTeacher(model_name, spec)
    except Exception as error:  # timm and the hub raise many kinds; all mean that there are no weights
        raise ConfigError(f"task.teacher={name}: no weights ({type(error).__name__}: {error})") from error


def probe(teacher: nn.Module, spec: DataSpec) -> tuple[int, int]:
    """Number of logits and of features a teacher gives."""
    with torch.no_grad():
        logits, features = teacher(torch.zeros(1, spec.channels, spec.height, spec.width))
    return logits.shape[-1], features.shape[-1]
