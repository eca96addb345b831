"""Our backbones by timm's names: `import permlab.timm_models`, then `timm.create_model("permlab_vim_tiny")`.

Every preset of `conf/model` that reads images is there, its `ti`, `s`, `b` and `l` written out; the options of
its constructor are keywords beside timm's own (`num_classes`, `in_chans`, `img_size`, `patch_size`,
`global_pool`, `drop_rate`, `drop_path_rate`). No weights are downloaded: `checkpoint_path=` takes a file of
ours or, for Vision Mamba, one with the published names.

Example:
    >>> import timm
    >>> model = timm.create_model("permlab_vim_nano", num_classes=10, img_size=32, patch_size=8)
    >>> model(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> [features.shape[1:] for features in model.forward_intermediates(torch.rand(2, 3, 32, 32))[1]]
    [torch.Size([32, 4, 4]), torch.Size([32, 4, 4]), torch.Size([32, 4, 4])]
"""

import sys
from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model

from permlab.config.checkpoint import derived
from permlab.config.compose import preset
from permlab.config.schema import component_names, constant
from permlab.timm_models.timm_model import model_class

_SIZES = {"ti": "tiny", "s": "small", "b": "base", "l": "large"}

__all__: list[str] = []  # timm adds the names
default_cfgs: dict[str, dict[str, Any]] = {}


def timm_name(choice: str) -> str:
    """What a preset is called in timm.

    Example:
        >>> timm_name("vit_s"), timm_name("ssm_probe")
        ('permlab_vit_small', 'permlab_ssm_probe')
    """
    *words, last = choice.split("_")
    return "_".join(["permlab", *words, _SIZES.get(last, last)])


def _entry(name: str, settings: dict[str, Any]) -> Callable[..., Any]:
    """The function by which timm creates a model."""

    def create(pretrained: bool = False, **options: Any) -> Any:
        return build_model_with_cfg(
            model_class(settings),
            name,
            pretrained,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            pretrained_filter_fn=lambda state, model: model.adapt(state),
            **options,
        )

    create.__name__ = create.__qualname__ = name
    return create


def _register() -> None:
    for choice in component_names("model"):
        settings = preset("model", choice)
        component, name = settings["component"], timm_name(choice)
        if "image" not in (constant("model", component, "reads") or ("image",)):
            continue
        if any(settings.get(option, 0) is None for option in derived(component) if option != "patch_size"):
            continue  # of the size of a checkpoint
        default_cfgs[name] = {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": constant("model", component, "stem") or "",
            "classifier": "head",
        }
        setattr(sys.modules[__name__], name, register_model(_entry(name, settings)))


_register()
