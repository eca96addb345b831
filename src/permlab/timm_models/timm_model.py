"""A backbone that answers to timm: features, head, classifier, sizes."""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from permlab.config.build import component_class
from permlab.config.schema import component_options
from permlab.data.spec import DataSpec
from permlab.errors import nearest
from permlab.model.base import Backbone

# timm's words for what is read out, and ours.
_POOLS = {"token": "cls", "avg": "mean", "last": "last"}
_PATCH_SIZE = 16  # where neither the preset nor the caller has one


def model_class(settings: Mapping[str, Any]) -> Any:
    """Constructor of the backbone that a preset describes, with timm's interface.

    Args:
        settings: `component`, and the values of its options.
    """
    return partial(_class_of(settings["component"]), settings)


@cache
def _class_of(component: str) -> type["TimmModel"]:
    backbone = component_class("model", component)
    return type(f"Timm{backbone.__name__}", (TimmModel, backbone), {"__doc__": backbone.__doc__})


class TimmModel(Backbone):
    """What timm expects of a vision model, in front of one of our backbones, whose state dict it keeps.

    Features have one level for the items as they are embedded and one after each block.

    Args:
        settings: of the preset: `component`, and the values of its options.
        num_classes: 0 for no classifier.
        in_chans: channels of the images.
        img_size: side of the images in pixels, or height and width.
        patch_size: side of a patch in pixels; None: the preset's, or 16.
        global_pool: `token`, `avg` or `last`; empty for the features of all tokens. None: as the preset reads out.
        drop_rate: dropout in front of the head.
        drop_path_rate: the backbone's `drop_path`, where it has one.
        options: other options of the backbone's constructor, in place of the preset's.
    Raises:
        ValueError: if the backbone has no such option, or refuses a value.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        patch_size: int | None = None,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        **options: Any,
    ) -> None:
        known = component_options("model", settings["component"])
        wanted = {"patch_size": patch_size, "drop_path": drop_path_rate, "readout": _POOLS.get(global_pool or "")}
        given = options | {key: value for key, value in wanted.items() if value is not None}
        if global_pool and global_pool not in _POOLS:
            raise ValueError(f"global_pool={global_pool}: unknown{nearest(global_pool, [*_POOLS])}")
        for key in given:
            if key not in known:
                raise ValueError(f"{key}: {settings['component']} has no such option{nearest(key, [*known])}")
        values = {key: settings[key] for key in known if key in settings} | given
        values["patch_size"] = values["patch_size"] or _PATCH_SIZE
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        spec = DataSpec("image", num_classes or 1, channels=in_chans, height=height, width=width)
        super().__init__(spec, **values)
        self._made = (settings, {"in_chans": in_chans, "drop_rate": drop_rate, "global_pool": global_pool} | values)
        self.img_size, self.num_classes = (height, width), num_classes
        reads_out = getattr(self, "readout", "last")
        self.readouts = next(pool for pool, ours in _POOLS.items() if ours == reads_out)
        self.global_pool = self.readouts if global_pool is None else global_pool
        self.head_drop = nn.Dropout(drop_rate)
        # An item's features may be fewer than those of a token.
        self.item_width = self.num_features
        self.num_features = self.head_hidden_size = self.embed_dim = int(self.head.in_features)  # type: ignore[arg-type]
        if num_classes == 0:
            self.head = nn.Identity()
        widths = [self.item_width, *[self.num_features] * len(self.stages)]
        paths = {id(module): path for path, module in self.named_modules()}
        modules = [self.stem, *(paths[id(stage)] for stage in self.stages)]
        self.feature_info = [
            {"num_chs": channels, "reduction": height // self.height, "module": module}
            for channels, module in zip(widths, modules, strict=True)
        ]

    # Forward

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Features of all tokens, `[b, tokens, num_features]`, not pooled."""
        return self.tokens(self._embedded(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, and classify unless `pre_logits`."""
        x = self.head_drop(self.pool(x) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features of the items on several levels, beside those of all tokens at the end.

        Args:
            indices: levels, or how many of the last; None for all.
            return_prefix_tokens, norm: not to be had; of `stop_early` nothing comes.
            output_fmt: `NCHW` for maps, `NLC` for sequences.
            intermediates_only: return the list alone.
        Raises:
            ValueError: on what is not to be had, levels included.
        """
        if return_prefix_tokens or norm or output_fmt not in ("NCHW", "NLC"):
            raise ValueError(
                "forward_intermediates gives maps (NCHW) or sequences (NLC), without norm or prefix tokens"
            )
        wanted = self._levels(indices)
        items = self._embedded(x)
        found = [items]
        hooks = [
            stage.register_forward_hook(lambda _, __, tokens: found.append(self.items_of(tokens)))
            for stage in self.stages
        ]
        try:
            tokens = self.tokens(items)
        finally:
            for hook in hooks:
                hook.remove()
        levels = [found[index] for index in wanted]
        if output_fmt == "NCHW":
            levels = [level.mT.unflatten(-1, (self.height, self.width)) for level in levels]
        return levels if intermediates_only else (tokens, levels)

    def _levels(self, indices: int | Sequence[int] | None) -> list[int]:
        """Levels that are meant by their numbers, from the end if negative, or by how many of the last."""
        count = len(self.feature_info)
        if indices is None or isinstance(indices, int):
            indices = range(count - (count if indices is None else indices), count)
        levels = [index + count if index < 0 else index for index in indices]
        if not levels or not all(0 <= level < count for level in levels):
            raise ValueError(f"levels {list(indices)}: this model has {count}")
        return levels

    def _embedded(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.img_size:
            size, wanted = ("x".join(map(str, sides)) for sides in (x.shape[-2:], self.img_size))
            raise ValueError(f"images are {size}, the model reads {wanted}: set_input_size((height, width)) changes it")
        return self.embed(x)

    # What can be changed

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier, or none for 0, behind the features.

        Args:
            global_pool: as the model was made to read out, or empty for no pooling; None: as it is.
        Raises:
            ValueError: for another pooling, of which the model has not the parts.
        """
        if global_pool not in (None, "", self.readouts):
            raise ValueError(f"global_pool={global_pool}: this model was made with global_pool={self.readouts}")
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        parameter = next(self.parameters())
        self.head = nn.Identity()
        if num_classes:
            head = nn.Linear(self.head_hidden_size, num_classes, device=parameter.device, dtype=parameter.dtype)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.head = head

    @torch.no_grad()
    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Read images of another size, the position table being interpolated.

        Parameters are made anew: call it before an optimiser holds them.

        Args:
            img_size: side in pixels, or height and width; None: as it is.
            patch_size: cannot be changed.
        Raises:
            ValueError: if patches do not divide the size, or a patch size is given.
        """
        if patch_size is not None:
            raise ValueError("the patch size cannot be changed; create the model with another patch_size")
        if img_size is None:
            return
        settings, values = self._made
        fresh = type(self)(settings, img_size=img_size, num_classes=self.num_classes, **values)
        parameter = next(self.parameters())
        fresh.to(parameter.device, parameter.dtype).train(self.training)
        fresh.global_pool = self.global_pool
        nn.Module.load_state_dict(fresh, fresh.adapt(self.state_dict(), (self.height, self.width)))
        for theirs, ours in zip(fresh.parameters(), self.parameters(), strict=True):
            theirs.requires_grad_(ours.requires_grad)
        kept = {key: self.__dict__[key] for key in ("pretrained_cfg", "default_cfg", "_traits") if key in self.__dict__}
        self.__dict__.update(fresh.__dict__ | kept)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module does, of another grid too."""
        return super().load_state_dict(self.adapt(state_dict), strict, assign)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise ValueError(f"{type(self).__name__} keeps its activations; there is no gradient checkpointing")

    # What is told

    def no_weight_decay(self) -> set[str]:
        """Names of parameters for an optimiser to leave out of weight decay."""
        return {name for name, parameter in self.named_parameters() if getattr(parameter, "_no_weight_decay", False)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters are of the stem and of which block, for learning rates by layer."""
        blocks = str(self.feature_info[-1]["module"]).rpartition(".")[0].replace(".", r"\.")
        return {"stem": r"^cls_token|^pos|^patch_embed|^embedding", "blocks": [(rf"^{blocks}\.(\d+)", None)]}

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take away the head where only features are wanted; the blocks stay."""
        if prune_head:
            self.reset_classifier(0, "")
        return self._levels(indices)
