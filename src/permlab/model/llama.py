"""LLaMA and its kin, from transformers: a causal transformer over patches or tokens."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from permlab.data.spec import DataSpec
from permlab.model.base import Backbone, free_of_decay, patchify
from permlab.model.pretrained import as_causal_lm_config, check_equal, load_checkpoint, open_checkpoint
from permlab.option import AddedLater, Checkpoint, Divides, PositiveFloat, PositiveInt, Side

# Longest text of the rotary embedding in its published, stretched form; allocates nothing.
_MAX_SLOTS = 131072


class Llama(Backbone):
    """Causal decoder with grouped-query attention, gated MLPs and RMS norms.

    A slot sees itself and the slots before it, so the order matters for every position option:
    `slot` rotates queries and keys by slot, as published; `item` adds a learned table that travels
    with the item and rotates nothing; `none` leaves only the causal mask.

    Images are read as linearly embedded patches and give one row of logits. Text is read as token
    ids and gives logits for the next token in every slot; `readout` plays no part there.

    Mistral, Qwen2 and Qwen3 have the same modules, with a window, biases or norms of queries and keys besides. What
    no option says is as in the configuration of a checkpoint, or in transformers' own for random weights.

    Shapes:
        b: samples.  n: patches or tokens.  d: width.
    Args:
        spec: shape of the images, or of the text: vocabulary and length.
        patch_size: side of a patch in pixels; 1 for text.
        width: length of a token's feature vector, a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: query heads per block.
        num_kv_heads: key and value heads per block, a divisor of `num_heads`.
        mlp_width: hidden width of the MLP in a block.
        norm_eps: added to the mean square in each RMS norm.
        rope_theta: base of the rotary wavelengths, in slots; used with `position=slot`.
        rope_factor: by how much wavelengths beyond 8192 slots are stretched, 1 for not at all; used with
            `position=slot`.
        position: `slot`, `item` or `none`, as above.
        readout: features of the last slot, or the mean over slots; for images.
        tie_embeddings: whether the head of a text model is its embedding table; for text.
        architecture: whose modules they are, by transformers' name of the type.
        pretrained: start from the weights of such a model for text: a folder in transformers' format, or a name
            on the hub such as `meta-llama/Llama-3.2-1B`, which downloads on first use. Only safetensors are
            read. They are meant for the ids of their own tokenizer. None: random weights.
    Raises:
        ValueError: if the patch size does not divide the image, the heads do not fit each other or the width,
            the width of a head is odd, or rope_factor is below 1; if pretrained weights cannot be had, are of
            another shape than the other options say, or are wanted for images or without `position=slot`.
    Source: Touvron et al. 2023, arXiv:2307.09288; Llama Team 2024, arXiv:2407.21783; through
        transformers' `LlamaModel`; Jiang et al. 2023, arXiv:2310.06825; Qwen Team 2024, arXiv:2407.10671.
    Differs from source: patches, the `item` and `none` positions and the two read-outs of images are ours.
    Cost: O(b depth n d (n + mlp_width)) time; no key-value cache is kept.
    Example:
        >>> spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)
        >>> llama = Llama(spec, patch_size=2, width=16, depth=1, num_heads=4, num_kv_heads=2, mlp_width=32,
        ...               norm_eps=1e-5, rope_theta=10000.0, rope_factor=1.0, position="slot",
        ...               readout="last", tie_embeddings=False)
        >>> llama(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    reads = ("image", "text")
    stem = "embedding"
    blocks_of = "llama"
    moves_positions = False  # slots are told by rotation, items by a table

    checkpoints = "transformers"
    from_checkpoint: ClassVar[dict[str, tuple]] = {
        "architecture": ("model_type",),
        "width": ("hidden_size",),
        "depth": ("num_hidden_layers",),
        "num_heads": ("num_attention_heads",),
        "num_kv_heads": ("num_key_value_heads", "num_attention_heads"),
        "mlp_width": ("intermediate_size",),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "rope_theta": ("rope_theta", "rope_parameters.rope_theta", 10000.0),
        "rope_factor": ("rope_scaling.factor", "rope_parameters.factor", 1.0),
        "tie_embeddings": ("tie_word_embeddings", False),
    }
    no_effect: ClassVar[dict[str, tuple[str, list]]] = {
        "rope_theta": ("position", ["item", "none"]),
        "rope_factor": ("position", ["item", "none"]),
        "readout": ("kind", ["text"]),
        "patch_size": ("kind", ["text"]),
        "tie_embeddings": ("kind", ["image"]),
    }

    def __init__(
        self,
        spec: DataSpec,
        *,
        patch_size: Side,
        width: PositiveInt,
        depth: PositiveInt,
        num_heads: Annotated[PositiveInt, Divides("width")],
        num_kv_heads: Annotated[PositiveInt, Divides("num_heads", unit="heads")],
        mlp_width: PositiveInt,
        norm_eps: PositiveFloat,
        rope_theta: PositiveFloat,
        rope_factor: PositiveFloat,
        position: Literal["item", "slot", "none"],
        readout: Literal["last", "mean"],
        tie_embeddings: bool,
        # Saved configurations of older versions do not have these.
        architecture: Annotated[Literal["llama", "mistral", "qwen2", "qwen3"], AddedLater("llama")] = "llama",
        pretrained: Checkpoint | None = None,
    ) -> None:
        super().__init__()
        _check_heads(width, num_heads, num_kv_heads)
        self.set_grid(spec, patch_size)
        self.kind, self.patch_size, self.num_features = spec.kind, patch_size, width
        self.position, self.readout = position, readout
        config: Any = AutoConfig.for_model(
            architecture,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=width // num_heads,
            intermediate_size=mlp_width,
            rms_norm_eps=norm_eps,
            rope_parameters=_rope_parameters(rope_theta, rope_factor),
            max_position_embeddings=_MAX_SLOTS,
        )
        # Checked first, since building a large network takes minutes.
        folder, self.num_slots = None, self.num_items
        if pretrained is not None:
            folder, config = _open_fitting(pretrained, config, spec, position, tie_embeddings)
            self.num_slots = config.max_position_embeddings
        network_class: Any = MODEL_MAPPING[type(config)]
        self.network = network_class(_without_ends(config))
        # Its own table would get no gradient from patches, and ours has to be the head's where tied.
        self.network.embed_tokens = None  # type: ignore[assignment]
        rotation = _Rotation(config) if position == "slot" else _NoRotation(config.head_dim)
        self.network.rotary_emb = rotation  # type: ignore[assignment]
        self.position_table = None
        if position == "item":
            self.position_table = free_of_decay(_normal(torch.empty(self.num_items, width)))
        self._add_ends(spec, tie_embeddings)
        if pretrained is not None and folder is not None:
            load_checkpoint(pretrained, folder, self, rename=_our_name)

    @property
    def idle_parameters(self) -> tuple[str, ...]:
        """Biases of keys, which a softmax takes off again where keys are not rotated."""
        names = () if self.position == "slot" else dict(self.network.named_parameters())
        return tuple(f"network.{name}" for name in names if name.endswith("k_proj.bias"))

    def causal_lm(self, tokenizer: Any = None) -> tuple[PreTrainedConfig, Callable[[str], str]]:
        """Configuration of transformers' model that computes the same logits, and its names of our tensors.

        Args:
            tokenizer: of the text, as `transformers.AutoTokenizer` gives it; any will do here.
        Returns:
            A copy, complete but for the tokenizer's special tokens, the architecture named; and a function.
        Raises:
            ValueError: where transformers has no such model: for images, and without `position=slot`; or would
                take the tokenizer for another, as it does with any beside a Qwen2 or Qwen3.
        """
        network_type = self.network.config.model_type
        if self.kind != "text" or self.position != "slot":
            raise ValueError(
                f"LlamaForCausalLM is a Llama of text with position=slot, got a Llama of {self.kind} "
                f"with {self.position}"
            )
        own = type(tokenizer).__name__
        if network_type.startswith("qwen") and tokenizer is not None and not own.startswith("Qwen2Tokenizer"):
            raise ValueError(f"beside a {network_type} transformers takes a {own} for Qwen's own tokenizer")
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[network_type]
        config = as_causal_lm_config(
            self.network.config, architecture, head=self.head, embedding=self.embedding, num_slots=self.num_slots
        )
        return config, _their_name

    def _add_ends(self, spec: DataSpec, tie_embeddings: bool) -> None:
        """Embedding and head, which depend on the kind of data."""
        self.embedding: nn.Module
        if spec.kind == "text":
            self.embedding = nn.Embedding(spec.num_classes, self.num_features)
            self.embedding.weight = _normal(self.embedding.weight)
            self.head = nn.Linear(self.num_features, spec.num_classes, bias=False)
            self.head.weight = self.embedding.weight if tie_embeddings else _normal(self.head.weight)
        else:
            # Weights and biases of torch's default size: from a small embedding without bias the first norm
            # would leave nothing of a one-pixel patch but its sign.
            self.embedding = nn.Linear(spec.channels * self.patch_size**2, self.num_features)
            self.head = nn.Linear(self.num_features, spec.num_classes)

    def embed(self, inputs: Tensor) -> Float[Tensor, "b n d"]:
        items = self.embedding(inputs if self.kind == "text" else patchify(inputs, self.patch_size))
        return items if self.position_table is None else items + self.position_table[: items.shape[1]]

    def encode(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b *slots d"]:
        return self.pool(self.tokens(items))

    def tokens(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.network(inputs_embeds=items).last_hidden_state

    def pool(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b *slots d"]:
        if self.kind == "text":
            return tokens
        return tokens[:, -1] if self.readout == "last" else tokens.mean(1)

    @property
    def stages(self) -> Sequence[nn.Module]:
        return tuple(self.network.layers)

    @property
    def item_positions(self) -> tuple[str, int, int] | None:
        return None if self.position_table is None else ("position_table", 0, 0)


class _Rotation(LlamaRotaryEmbedding):
    """Rotary embedding whose frequencies stay in single precision when the network is cast.

    Rounded to bfloat16 they would be off by a radian after some hundred slots.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Rotation":
        frequencies = self.inv_freq
        super()._apply(fn, recurse)
        if not frequencies.is_meta:
            self.inv_freq = frequencies.to(self.inv_freq.device)  # type: ignore[assignment]
        return self


class _NoRotation(nn.Module):
    """Rotary embedding by no angle.

    Position ids of zero would say the same, but transformers takes a position that does not follow its
    predecessor for the start of another packed sequence, and no slot would see any other.
    """

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*position_ids.shape, self.head_width)
        return x.new_ones(shape), x.new_zeros(shape)


def _check_heads(width: int, num_heads: int, num_kv_heads: int) -> None:
    if width % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide width={width}")
    if width // num_heads % 2:
        raise ValueError(
            f"width={width} over num_heads={num_heads}: an odd head width of {width // num_heads} cannot be rotated"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")


def _rope_parameters(theta: float, factor: float) -> dict[str, float | int | str]:
    if factor < 1:
        raise ValueError(f"rope_factor={factor} is below 1")
    if factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _without_ends(config: Any) -> Any:
    """A copy for the blocks alone: their embedding and head are ours."""
    config = copy.deepcopy(config)
    config.vocab_size = 1
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    config.use_cache = False
    config._attn_implementation = "sdpa"
    return config


def _open_fitting(name: str, config: Any, spec: DataSpec, position: str, tie_embeddings: bool) -> tuple[Path, Any]:
    """Folder of a checkpoint that fits, and its own configuration, which says more than our options.

    Raises:
        ValueError: if there is none, or it does not fit.
    """
    if spec.kind != "text":
        raise ValueError(f"pretrained={name}: these weights read text, the data is {spec.kind}")
    if position != "slot":
        raise ValueError(f"pretrained={name}: these weights rotate by slot, not position={position}")
    folder, theirs = open_checkpoint(name, type(config))
    settings = {option: (getattr(theirs, key), getattr(config, key)) for option, key in _SETTINGS.items()}
    settings["vocabulary"] = (theirs.vocab_size, spec.num_classes)
    settings["tie_embeddings"] = (bool(theirs.tie_word_embeddings), tie_embeddings)
    for option, default in (("rope_theta", None), ("factor", 1.0)):
        both = [part.rope_parameters.get(option, default) for part in (theirs, config)]
        settings["rope_factor" if option == "factor" else option] = (both[0], both[1])
    check_equal(name, settings)
    theirs.head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    return folder, theirs


# Our names of transformers' settings.
_SETTINGS = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}


def _our_name(key: str) -> str | None:
    if key.endswith("rotary_emb.inv_freq"):
        return None  # old checkpoints store the wavelengths, which follow from the settings
    renamed = {"model.embed_tokens.weight": "embedding.weight", "lm_head.weight": "head.weight"}
    return renamed.get(key, key.replace("model.", "network.", 1))


def _their_name(name: str) -> str:
    renamed = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    return renamed.get(name, name.replace("network.", "model.", 1))


def _normal(weight: Tensor) -> nn.Parameter:
    """Parameter of this shape, initialised as the rest of the network is."""
    return nn.Parameter(nn.init.normal_(weight.detach(), std=0.02))
