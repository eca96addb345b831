"""Qwen2.5-VL, from transformers: a vision tower and a causal language model, cut between the two."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen2_5_VLConfig, Qwen2Config, SeedOssConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLTextModel,
    Qwen2_5_VLVisionAttention,
    Qwen2_5_VLVisionRotaryEmbedding,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from permlab.data.spec import DataSpec
from permlab.model.base import Backbone, patchify
from permlab.model.pretrained import as_causal_lm_config, check_equal, load_checkpoint, open_checkpoint
from permlab.option import Checkpoint, Divides, PositiveFloat, PositiveInt, Side

# Of the published models: an image is a film of two equal frames, windows are eight patches wide, and every
# eighth block of the tower sees beyond them.
_NUM_FRAMES, _WINDOW, _PERIOD = 2, 8, 8
# Longest text as published; allocates nothing.
_MAX_SLOTS = 128000


class QwenVl(Backbone):
    """Vision tower whose merged patches a causal language model reads; for text, the language model alone.

    The items of an image are the tower's outputs, one for `merge_size` x `merge_size` patches. They have met
    each other and their places there: attention in windows of eight by eight patches, rotated by row and column,
    and across the whole image in every eighth block and the last. So an item says where it comes from whichever
    slot it is put into. The language model rotates by slot, each slot having the row and column of its place
    on the merged grid, and reads the logits off the last one, which alone sees all.

    Text is read as token ids and gives logits for the next token in every slot. No tower is built then, and what
    describes it has no effect.

    Shapes:
        b: samples.  n: merged patches or tokens.  d: width.
    Args:
        spec: shape of the images, or of the text: vocabulary and length.
        patch_size: side of a patch in pixels, before merging; 1 for text.
        merge_size: patches that are merged along either side; for images.
        width: length of a token's feature vector in the language model, a multiple of `num_heads`.
        depth: blocks of the language model.
        num_heads: query heads per block of the language model.
        num_kv_heads: key and value heads per block of the language model, a divisor of `num_heads`.
        mlp_width: hidden width of the MLPs of the language model.
        norm_eps: added to the mean square in the RMS norms of the language model; the tower adds 1e-6.
        rope_theta: base of the rotary wavelengths of the language model; that of the tower is 10000.
        vision_width: length of a patch's feature vector in the tower, a multiple of four times `vision_heads`.
        vision_depth: blocks of the tower.
        vision_heads: attention heads per block of the tower.
        vision_mlp_width: hidden width of the MLPs of the tower.
        tie_embeddings: whether the head of a text model is its embedding table; for text.
        pretrained: start from the weights of a Qwen2.5-VL: a folder in transformers' format, or a name on the
            hub such as `Qwen/Qwen2.5-VL-3B-Instruct`, which downloads on first use. Only safetensors are read.
            For images the head is new. None: random weights.
    Raises:
        ValueError: if a merged patch does not divide the image, the heads do not fit each other or the widths,
            or pretrained weights cannot be had or are of another shape than the other options say.
    Source: Bai et al. 2025, arXiv:2502.13923, through transformers' modules, with their parameter names.
    Differs from source: an image is read bare, without a prompt or the tokens around it, and classified; text
        is read without images. Wavelengths are shared out between time, row and column as in the published
        models, 16 : 24 : 24, rounded in favour of time. The tower takes windows of one size together.
    Cost: O(vision_depth p vision_width (p + vision_mlp_width) + depth n d (n + mlp_width)) time for p patches;
        no key-value cache is kept.
    Example:
        >>> spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)
        >>> qwen = QwenVl(spec, patch_size=1, merge_size=2, width=32, depth=1, num_heads=2, num_kv_heads=1,
        ...               mlp_width=48, norm_eps=1e-6, rope_theta=1e6, vision_width=16, vision_depth=1,
        ...               vision_heads=2, vision_mlp_width=24, tie_embeddings=True)
        >>> qwen.embed(torch.rand(3, 1, 8, 8)).shape, qwen(torch.rand(3, 1, 8, 8)).shape
        (torch.Size([3, 16, 32]), torch.Size([3, 10]))
    """

    reads = ("image", "text")
    stem = "visual.patch_embed.proj"
    blocks_of = "qwen2_5_vl"

    checkpoints = "transformers"
    from_checkpoint: ClassVar[dict[str, tuple]] = {
        "patch_size": ("vision_config.patch_size", 14),
        "merge_size": ("vision_config.spatial_merge_size", 2),
        "width": ("text_config.hidden_size", "hidden_size"),
        "depth": ("text_config.num_hidden_layers", "num_hidden_layers"),
        "num_heads": ("text_config.num_attention_heads", "num_attention_heads"),
        "num_kv_heads": ("text_config.num_key_value_heads", "num_key_value_heads"),
        "mlp_width": ("text_config.intermediate_size", "intermediate_size"),
        "norm_eps": ("text_config.rms_norm_eps", "rms_norm_eps", 1e-6),
        "rope_theta": ("text_config.rope_parameters.rope_theta", "text_config.rope_theta", "rope_theta", 1e6),
        "vision_width": ("vision_config.hidden_size",),
        "vision_depth": ("vision_config.depth", 32),
        "vision_heads": ("vision_config.num_heads", 16),
        "vision_mlp_width": ("vision_config.intermediate_size",),
        "tie_embeddings": ("tie_word_embeddings", "text_config.tie_word_embeddings", False),
    }
    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "merge_size": ("kind", ["text"]),
        "patch_size": ("kind", ["text"]),
        "vision_width": ("kind", ["text"]),
        "vision_depth": ("kind", ["text"]),
        "vision_heads": ("kind", ["text"]),
        "vision_mlp_width": ("kind", ["text"]),
        "tie_embeddings": ("kind", ["image"]),
    }

    def __init__(
        self,
        spec: DataSpec,
        *,
        patch_size: Side,
        merge_size: Side,
        width: PositiveInt,
        depth: PositiveInt,
        num_heads: Annotated[PositiveInt, Divides("width")],
        num_kv_heads: Annotated[PositiveInt, Divides("num_heads", unit="heads")],
        mlp_width: PositiveInt,
        norm_eps: PositiveFloat,
        rope_theta: PositiveFloat,
        vision_width: PositiveInt,
        vision_depth: PositiveInt,
        vision_heads: PositiveInt,
        vision_mlp_width: PositiveInt,
        tie_embeddings: bool,
        pretrained: Checkpoint | None = None,
    ) -> None:
        super().__init__()
        _check_heads(width, num_heads, num_kv_heads, vision_width, vision_heads)
        self.kind, self.patch_size, self.merge_size = spec.kind, patch_size, merge_size
        self.num_features = width
        self._set_merged_grid(spec)
        language = _language_config(width, depth, num_heads, num_kv_heads, mlp_width, norm_eps, rope_theta)
        vision = Qwen2_5_VLVisionConfig(
            depth=vision_depth,
            hidden_size=vision_width,
            intermediate_size=vision_mlp_width,
            num_heads=vision_heads,
            in_channels=spec.channels,
            patch_size=patch_size,
            spatial_merge_size=merge_size,
            temporal_patch_size=_NUM_FRAMES,
            window_size=patch_size * merge_size * max(1, _WINDOW // merge_size),
            fullatt_block_indexes=sorted({*range(_PERIOD - 1, vision_depth, _PERIOD), vision_depth - 1}),
            out_hidden_size=width,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
        # Checked first, since building a large network takes minutes.
        folder, self.num_slots = None, self.num_items
        if pretrained is not None:
            folder, self.num_slots = _open_fitting(pretrained, language, vision, spec, tie_embeddings)
        self._add_parts(spec, language, vision, tie_embeddings)
        if pretrained is not None and folder is not None:
            image = spec.kind == "image"
            fresh = ("head.weight", "head.bias") if image else ()
            load_checkpoint(pretrained, folder, self, rename=_our_image_name if image else _our_text_name, fresh=fresh)

    def causal_lm(self, tokenizer: Any = None) -> tuple[PreTrainedConfig, Callable[[str], str]]:
        """Configuration of transformers' model that computes the same logits, and its names of our tensors.

        On text time, row and column of a slot are the same number, so the language model is a Qwen2. Transformers
        takes any tokenizer beside a Qwen2 for Qwen's own, and would cut and normalise text in its way. Beside
        another tokenizer the model is therefore a Seed-OSS, which has the same layers under the same names.

        Args:
            tokenizer: of the text, as `transformers.AutoTokenizer` gives it; None where it plays no part.
        Returns:
            A copy, complete but for the tokenizer's special tokens, the architecture named; and a function.
        Raises:
            ValueError: for images, as transformers has no Qwen2.5-VL that classifies them.
        """
        if self.kind != "text":
            raise ValueError(
                f"Qwen2ForCausalLM is a QwenVl of text, got a QwenVl of {self.kind} with a head of classes"
            )
        is_qwens = tokenizer is None or type(tokenizer).__name__.startswith("Qwen2Tokenizer")
        config: PreTrainedConfig = (Qwen2Config if is_qwens else SeedOssConfig)(**self._language_settings(is_qwens))
        config = as_causal_lm_config(
            config,
            "Qwen2ForCausalLM" if is_qwens else "SeedOssForCausalLM",
            head=self.head,
            embedding=self.language_model.embed_tokens,
            num_slots=self.num_slots,
        )
        return config, _their_name

    def _language_settings(self, is_qwens: bool) -> dict[str, Any]:
        """Settings of the language model on text; of a Seed-OSS also where it differs from a Qwen2 by itself."""
        ours = self.language_model.config
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        settings = {name: getattr(ours, name) for name in (*names, "rms_norm_eps", "hidden_act")}
        assert ours.rope_parameters is not None
        settings["rope_parameters"] = {k: v for k, v in ours.rope_parameters.items() if k != "mrope_section"}
        if not is_qwens:
            settings |= {"head_dim": self.num_features // ours.num_attention_heads, "attention_out_bias": False}
            settings |= {"attention_bias": True, "mlp_bias": False, "attention_dropout": 0.0, "residual_dropout": 0.0}
            settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return settings

    def _set_merged_grid(self, spec: DataSpec) -> None:
        """Take the number of items from the data's shape; text is not merged."""
        if spec.kind == "text":
            self.set_grid(spec, self.patch_size)
            return
        try:
            self.set_grid(spec, self.patch_size * self.merge_size)
        except ValueError as error:
            raise ValueError(f"merge_size={self.merge_size} x patch_size={self.patch_size}: {error}") from error

    def _add_parts(
        self, spec: DataSpec, language: Qwen2_5_VLTextConfig, vision: Qwen2_5_VLVisionConfig, tie_embeddings: bool
    ) -> None:
        """Networks and head; only those that this kind of data reaches."""
        is_text = spec.kind == "text"
        if is_text:
            language.vocab_size = spec.num_classes
        else:
            self.visual = Qwen2_5_VisionTransformerPretrainedModel(vision)
            self.visual.rotary_pos_emb = _VisionRotation(vision)
            for block in self.visual.blocks:
                block.attn.__class__ = _VisionAttention
        self.language_model = Qwen2_5_VLTextModel(language)
        self.language_model.rotary_emb = _Rotation(language)  # type: ignore[arg-type]
        self.head = nn.Linear(self.num_features, spec.num_classes, bias=not is_text)
        if not is_text:
            # Its table would get no gradient from patches.
            self.language_model.embed_tokens = None  # type: ignore[assignment]
        elif tie_embeddings:
            self.head.weight = self.language_model.embed_tokens.weight
        else:
            nn.init.normal_(self.head.weight, std=language.initializer_range)

    def embed(self, inputs: Tensor) -> Float[Tensor, "b n d"]:
        if self.kind == "text":
            return self.language_model.embed_tokens(inputs)
        merged = patchify(inputs, self.patch_size * self.merge_size)
        size, side = self.patch_size, self.merge_size
        # The tower wants the patches of a merged patch after each other, each as channel, frame, row, column.
        patches = merged.unflatten(2, (-1, side, size, side, size)).permute(0, 1, 3, 5, 2, 4, 6)
        frames = patches.unsqueeze(5).expand(-1, -1, -1, -1, -1, _NUM_FRAMES, -1, -1)
        features = self.visual(frames.flatten(0, 3).flatten(1), **self._layout(len(inputs), inputs.device))
        return features.pooler_output.view(len(inputs), self.num_items, -1)

    def _layout(self, num_images: int, device: torch.device) -> dict[str, Tensor]:
        """Places and windows of the patches of several images of one shape.

        The tower would find the same by going through the images one by one.
        """
        side = self.merge_size
        one = torch.tensor([[1, self.height * side, self.width * side]])
        window_size = self.visual.window_size
        index, ends = get_vision_window_index(one, side, window_size, self.patch_size)
        length = one.prod()
        starts = torch.arange(num_images).unsqueeze(1)
        layout = {
            "grid_thw": one.expand(num_images, -1),
            "position_ids": get_vision_position_ids(one, side).repeat(num_images, 1),
            "window_index": (index + starts * self.num_items).flatten(),
            "cu_window_seqlens": torch.cat([ends[:1], (ends[1:] + starts * length).flatten()]).int(),
        }
        return {name: value.to(device) for name, value in layout.items()}

    def encode(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b *slots d"]:
        return self.pool(self.tokens(items))

    def tokens(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if self.kind == "text":
            return self.language_model(inputs_embeds=items).last_hidden_state
        places = self._places(items.device).unsqueeze(1).expand(-1, len(items), -1)
        return self.language_model(inputs_embeds=items, position_ids=places).last_hidden_state

    def pool(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b *slots d"]:
        return tokens if self.kind == "text" else tokens[:, -1]

    @property
    def stages(self) -> Sequence[nn.Module]:
        return tuple(self.language_model.layers)

    def _places(self, device: torch.device) -> Int64[Tensor, "3 n"]:
        """Time, row and column of the slots, as transformers counts them in a sequence that is one image."""
        slots = torch.arange(self.num_items, device=device)
        return torch.stack([torch.zeros_like(slots), slots // self.width, slots % self.width])


class _ExactAngles(nn.Module):
    """Rotary embedding whose frequencies stay in single precision when the network is cast.

    Rounded to bfloat16 they would be off by a radian after some hundred slots.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_ExactAngles":
        frequencies = self.get_buffer("inv_freq")
        super()._apply(fn, recurse)
        if not frequencies.is_meta:
            self.register_buffer("inv_freq", frequencies.to(self.get_buffer("inv_freq").device), persistent=False)
        return self


class _Rotation(_ExactAngles, Qwen2_5_VLRotaryEmbedding):
    """Rotation of the language model."""


class _VisionRotation(_ExactAngles, Qwen2_5_VLVisionRotaryEmbedding):
    """Rotation of the vision tower."""


class _VisionAttention(Qwen2_5_VLVisionAttention):
    """Attention that takes windows of one size together, instead of one after the other."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        length, *others = cu_seqlens.diff().unique().tolist()
        if others:
            return super().forward(hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs)
        assert position_embeddings is not None
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        return self.proj(mixed.transpose(1, 2).flatten(0, 1).flatten(1))


def _language_config(
    width: int, depth: int, num_heads: int, num_kv_heads: int, mlp_width: int, norm_eps: float, rope_theta: float
) -> Qwen2_5_VLTextConfig:
    num_wavelengths = width // num_heads // 2
    space = 3 * num_wavelengths // 8
    sections = [num_wavelengths - 2 * space, space, space]
    return Qwen2_5_VLTextConfig(
        vocab_size=1,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=mlp_width,
        rms_norm_eps=norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta, "mrope_section": sections},
        max_position_embeddings=_MAX_SLOTS,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )


def _check_heads(width: int, num_heads: int, num_kv_heads: int, vision_width: int, vision_heads: int) -> None:
    if width % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide width={width}")
    if width // num_heads % 2:
        raise ValueError(
            f"width={width} over num_heads={num_heads}: an odd head width of {width // num_heads} cannot be rotated"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
    if vision_width % vision_heads:
        raise ValueError(f"vision_heads={vision_heads} does not divide vision_width={vision_width}")
    if vision_width // vision_heads % 4:
        raise ValueError(
            f"vision_width={vision_width} over vision_heads={vision_heads}: a head of the tower is rotated along "
            f"two axes, so its width is a multiple of four, not {vision_width // vision_heads}"
        )


# Pretrained weights

# Our names of transformers' settings, of which some are not to be chosen.
_LANGUAGE_SETTINGS = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "use_sliding_window": "use_sliding_window",
}
_VISION_SETTINGS = {
    "vision_width": "hidden_size",
    "vision_depth": "depth",
    "vision_heads": "num_heads",
    "vision_mlp_width": "intermediate_size",
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "number of channels": "in_channels",
    "number of frames": "temporal_patch_size",
    "window_size": "window_size",
    "vision activation": "hidden_act",
}


def _open_fitting(
    name: str,
    language: Qwen2_5_VLTextConfig,
    vision: Qwen2_5_VLVisionConfig,
    spec: DataSpec,
    tie_embeddings: bool,
) -> tuple[Path, int]:
    """Folder of a checkpoint that fits, and the longest text that it was made for.

    Raises:
        ValueError: if there is none, or it does not fit.
    """
    folder, config = open_checkpoint(name, Qwen2_5_VLConfig)
    theirs: Any = config.text_config
    settings = _pairs(theirs, language, _LANGUAGE_SETTINGS)
    rope, our_rope = theirs.rope_parameters, language.rope_parameters
    assert our_rope is not None
    for key in ("rope_theta", "rope_type", "mrope_section"):
        settings[key] = (rope.get(key), our_rope.get(key))
    if spec.kind == "text":
        settings["vocabulary"] = (theirs.vocab_size, spec.num_classes)
        settings["tie_embeddings"] = (bool(config.tie_word_embeddings), tie_embeddings)
    else:
        tower: Any = config.vision_config
        settings |= _pairs(tower, vision, _VISION_SETTINGS)
        blocks = (list(tower.fullatt_block_indexes), list(vision.fullatt_block_indexes))
        settings["blocks with full attention"] = blocks
    check_equal(name, settings)
    return folder, theirs.max_position_embeddings


def _pairs(theirs: Any, ours: Any, names: dict[str, str]) -> dict[str, tuple[Any, Any]]:
    return {option: (getattr(theirs, key), getattr(ours, key)) for option, key in names.items()}


def _our_image_name(key: str) -> str | None:
    ours = _our_name(key)
    return None if ours in ("head.weight", "language_model.embed_tokens.weight") else ours


def _our_text_name(key: str) -> str | None:
    ours = _our_name(key)
    return None if ours.startswith("visual.") else ours


def _our_name(key: str) -> str:
    # The published files say `model.layers` where transformers now says `model.language_model.layers`.
    key = key.removeprefix("model.")
    if key == "lm_head.weight":
        return "head.weight"
    return key if key.startswith(("visual.", "language_model.")) else f"language_model.{key}"


def _their_name(name: str) -> str:
    return "lm_head.weight" if name == "head.weight" else name.replace("language_model.", "model.", 1)
