"""Write a pruned model in the layout that sparse kernels want, checked before it is written; and read it back.

An export is a folder: `model.safetensors` (folded weights with their zeros, and the orders of gathers),
`permutation.safetensors` (the order of every site), `sparsity.json` (which tensors follow which pattern, and how
each site was carried out) and `config.json`.
"""

import copy
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from permlab.record.rundir import checksums, sync
from permlab.sparsity.fold import GatheredLinear, fold, install_gather
from permlab.sparsity.site import WeightSite

MODEL, PERMUTATION, SPARSITY, CONFIG = "model.safetensors", "permutation.safetensors", "sparsity.json", "config.json"
SUMS = "SHA256SUMS"  # as sha256sum --check reads them

# A tensor's pattern as `sparsity.json` has it: n, m and, where only some rows are pruned, their ranges as `rows`.
Pattern = Mapping[str, Any]


# Checks


def verify_pattern(state: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> dict[str, int | float]:
    """Check that of every m consecutive columns at most n are not zero, in every row that is to be pruned.

    Args:
        state: tensors by name, such as a model's state dict or the file of an export.
        patterns: `{"n": .., "m": ..}` by tensor name, with `"rows": [[start, stop], ..]` where not all are pruned.
    Returns:
        `num_tensors`, `num_groups` and `nonzero_fraction` of what was checked.
    Raises:
        ValueError: naming the first tensor that is missing or breaks its pattern, with the place.
    Example:
        >>> verify_pattern({"w": torch.tensor([[1.0, 0.0, 0.0, 2.0]])}, {"w": {"n": 1, "m": 2}})
        {'num_tensors': 1, 'num_groups': 2, 'nonzero_fraction': 0.5}
    """
    num_groups = num_nonzero = num_weights = 0
    for name, pattern in patterns.items():
        n, m = int(pattern["n"]), int(pattern["m"])
        if name not in state:
            raise ValueError(f"there is no tensor {name}")
        weight = state[name]
        if weight.shape[1] % m:
            raise ValueError(f"{name}: groups of {m} do not divide {weight.shape[1]} columns")
        for start, stop in pattern.get("rows", [[0, len(weight)]]):
            counts = (weight[start:stop] != 0).unflatten(1, (-1, m)).sum(-1)
            if (counts > n).any():
                row, group = (counts > n).nonzero()[0].tolist()
                raise ValueError(
                    f"{name} is not {n}:{m} in columns {group * m} to {group * m + m - 1} of row {start + row}, "
                    f"which hold {int(counts[row, group])} values that are not zero"
                )
            num_groups += counts.numel()
            num_nonzero += int(counts.sum())
            num_weights += counts.numel() * m
    fraction = num_nonzero / num_weights if num_weights else 0.0
    return {"num_tensors": len(patterns), "num_groups": num_groups, "nonzero_fraction": fraction}


def read_patterns(sites: Sequence[WeightSite], *, n: int, m: int) -> dict[str, Pattern]:
    """Pattern of every weight that these sites prune, by tensor name."""
    rows: dict[str, list[tuple[int, int] | None]] = {}
    for site in sites:
        for reader in site.readers:
            rows.setdefault(f"{reader.module}.weight", []).append(reader.rows)
    patterns: dict[str, Pattern] = {}
    for name, ranges in rows.items():
        some = sorted(list(stretch) for stretch in ranges if stretch is not None)
        patterns[name] = {"n": n, "m": m} | ({"rows": some} if len(some) == len(ranges) else {})
    return patterns


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


# Writing


@torch.no_grad()
def export(
    folder: str | Path,
    *,
    dense: nn.Module,
    pruned: nn.Module,
    sites: Sequence[WeightSite],
    orders: Mapping[str, Tensor],
    n: int,
    m: int,
    inputs: Any,
    config: Mapping[str, Any],
    tolerance: float = 1e-4,
) -> dict[str, Any]:
    """Fold a pruned model's orders into it, check the result, and write it as a folder.

    Three things are checked: the dense model computes the same after folding, the pruned model computes the
    same after folding, and every pruned weight is contiguously N:M in the folded layout. Only then is
    anything written, to a folder beside the wanted one that is renamed when it is complete. The models are
    copied, compared in evaluation mode and in float32 at least, and saved in the dtypes they came in.

    Args:
        folder: new or empty.
        dense: the model before pruning, in its original channel order.
        pruned: the same with zeros, and perhaps other weights, in the original channel order.
        sites: every layer that was pruned is a reader of one of them.
        orders: int64 order of each site's items, by name.
        n, m: n kept of every m consecutive columns.
        inputs: what the models are compared on: a tensor, a tuple of arguments or a dict of keywords.
        config: of the model or the run, plain containers only; becomes `config.json`.
        tolerance: largest difference allowed, relative to the largest output.
    Returns:
        `dense_difference`, `pruned_difference`, `num_tensors`, `num_groups`, `nonzero_fraction` as
        verified, and `num_folded`, `num_gathered` sites.
    Raises:
        ValueError: if a check fails, the folder has something in it, or the models differ in structure.
    Cost: two forward passes of each model, one copy of a model at a time.
    """
    folder = Path(folder)
    _check_free(folder)
    texts = {CONFIG: _to_json(config, "config")}
    _check_structure(dense, pruned)
    _, modes, dense_difference = _fold_copy(dense, sites, orders, inputs)
    folded, _, pruned_difference = _fold_copy(pruned, sites, orders, inputs)
    for name, difference in (("dense", dense_difference), ("pruned", pruned_difference)):
        if not difference <= tolerance:  # NaN is refused too
            raise ValueError(f"folding changes the {name} model by {difference:.3g} of its output, over {tolerance:g}")
    patterns = read_patterns(sites, n=n, m=m)
    state, tied = _unique_state(folded, pruned)
    counts = verify_pattern(state, patterns)
    texts[SPARSITY] = _to_json(_describe(folded, sites, modes, patterns, tied, n=n, m=m), "sparsity")
    permutation = {site.name: orders[site.name].detach().cpu().clone() for site in sites}
    _write(folder, {MODEL: state, PERMUTATION: permutation}, texts)
    gathered = sum(mode == "gather" for mode in modes.values())
    return {
        "dense_difference": dense_difference,
        "pruned_difference": pruned_difference,
        **counts,
        "num_folded": len(modes) - gathered,
        "num_gathered": gathered,
    }


def _fold_copy(
    model: nn.Module, sites: Sequence[WeightSite], orders: Mapping[str, Tensor], inputs: Any
) -> tuple[nn.Module, dict[str, str], float]:
    """Folded copy, how each site was carried out, and by how much the output changed."""
    folded = copy.deepcopy(model).eval()
    if any(parameter.dtype.itemsize < 4 for parameter in folded.parameters()):
        folded.float()
        inputs = _widen(inputs)
    before = _run(folded, inputs)
    modes = fold(folded, sites, orders)
    return folded, modes, _difference(_run(folded, inputs), before)


def _run(model: nn.Module, inputs: Any) -> Tensor:
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    # transformers' models return a mapping of which the logits, or a base model's features, are compared.
    output = output if isinstance(output, Tensor) else getattr(output, "logits", output[0])
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _widen(inputs: Any) -> Any:
    """The same inputs, numbers of half precision in single."""
    if isinstance(inputs, Mapping):
        return {name: _widen(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_widen(value) for value in inputs)
    is_half = isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.dtype.itemsize < 4
    return inputs.float() if is_half else inputs


def _unique_state(folded: nn.Module, original: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict in the original dtypes without repeated tied parameters, and for each of these the name kept."""
    dtypes = {name: value.dtype for name, value in original.state_dict().items()}
    kept: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in folded.named_parameters(remove_duplicate=False):
        first = kept.setdefault(id(parameter), name)
        if first != name:
            tied[name] = first
    state = {name: value for name, value in folded.state_dict().items() if name not in tied}
    return {name: value.to("cpu", dtypes.get(name, value.dtype)).contiguous() for name, value in state.items()}, tied


def _describe(
    folded: nn.Module,
    sites: Sequence[WeightSite],
    modes: Mapping[str, str],
    patterns: Mapping[str, Pattern],
    tied: Mapping[str, str],
    *,
    n: int,
    m: int,
) -> dict[str, Any]:
    return {
        "n": n,
        "m": m,
        "tensors": patterns,
        "sites": [
            {
                "name": site.name,
                "kind": site.kind,
                "mode": modes[site.name],
                "num_items": site.num_items,
                "num_heads": site.num_heads,
                "repeats": site.repeats,
                "readers": [{"module": reader.module, "rows": reader.rows} for reader in site.readers],
            }
            for site in sites
        ],
        # Rows of each part of a layer that gathers its input; the orders are in the model's file.
        "gathers": {name: module.splits for name, module in _gathers(folded).items()},
        "tied": tied,
    }


def _gathers(model: nn.Module) -> dict[str, GatheredLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GatheredLinear)}


def _check_structure(dense: nn.Module, pruned: nn.Module) -> None:
    ours, theirs = ({name: tuple(v.shape) for name, v in model.state_dict().items()} for model in (dense, pruned))
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise ValueError(f"{name} is {ours.get(name)} in the dense model and {theirs.get(name)} in the pruned one")


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; nothing is written over it")


def _to_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, indent=2, default=_plain) + "\n"
    except TypeError as error:
        raise ValueError(f"the {what} cannot be written as JSON: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no plain container")


def _write(folder: Path, tensors: Mapping[str, dict[str, Tensor]], texts: Mapping[str, str]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        for name, values in tensors.items():
            save_file(values, partial / name, metadata={"format": "pt"})
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        (partial / SUMS).write_text(checksums(partial, [*tensors, *texts]), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
        try:
            os.replace(partial, folder)
            sync(folder.parent)
        except OSError:
            _check_free(folder)  # something came to be there in the meantime
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# Reading


@torch.no_grad()
def load_export(folder: str | Path, model: nn.Module) -> nn.Module:
    """Load an export into a freshly built model of the same architecture.

    Args:
        folder: what `export` wrote.
        model: plain: ours, timm's or transformers'; changed in place. Its dtypes stay.
    Returns:
        The model, with a `GatheredLinear` where the export has a gather.
    Raises:
        ValueError: if the folder is no export, or its tensors are not those of the model.
    """
    folder = Path(folder)
    sparsity = json.loads(_file(folder, SPARSITY).read_text(encoding="utf-8"))
    state = load_file(_file(folder, MODEL))
    for alias, name in sparsity["tied"].items():
        state[alias] = state[name]
    for path, splits in sparsity["gathers"].items():
        order = state.get(f"{path}.input_order")
        if order is None:
            raise ValueError(f"{folder} has no order for the gather in front of {path}")
        install_gather(model, path, order, splits=splits if order.ndim == 2 else None)
    _load_state(model, state, str(folder))
    return model


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(f"{folder} is no export: it has no {name}")
    return folder / name


def _load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    expected = model.state_dict()
    for name in [*state, *expected]:
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (state, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in {source} and {shapes[1]} in {type(model).__name__}")
    model.load_state_dict(state)


# Models of other libraries


@torch.no_grad()
def as_causal_lm(source: str | Path | nn.Module) -> Any:
    """A text model of ours as transformers' `LlamaForCausalLM`, which computes the same logits.

    With every site folded it is a model like any other, and `save_pretrained` and `from_pretrained` keep it
    whole. With gathers it computes the same in memory, but `from_pretrained` knows nothing of them and would
    read its columns in the wrong order: such a model is read back from its export, by this function.

    Args:
        source: a `Llama` backbone on text with `position=slot`, or the folder of its export, whose
            `config.json` has the backbone's options, under `model` if it is the configuration of a run.
    Returns:
        A copy, in evaluation mode.
    Raises:
        ValueError: if it is not a text model, or one whose positions transformers has not.
    Example:
        >>> from permlab.data.spec import DataSpec
        >>> from permlab.model.llama import Llama
        >>> spec = DataSpec(kind="text", num_classes=10, channels=1, height=1, width=8)
        >>> backbone = Llama(spec, patch_size=1, width=8, depth=1, num_heads=2, num_kv_heads=1, mlp_width=16,
        ...                  norm_eps=1e-5, rope_theta=1e4, rope_factor=1.0, position="slot", readout="last",
        ...                  tie_embeddings=True)
        >>> tokens = torch.arange(4).unsqueeze(0)
        >>> torch.allclose(as_causal_lm(backbone)(tokens).logits, backbone(tokens), atol=1e-6)
        True
    """
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from permlab.model.llama import Llama

    backbone = source if isinstance(source, nn.Module) else _load_llama(Path(source))
    if not isinstance(backbone, Llama) or backbone.kind != "text" or backbone.position != "slot":
        kind = f"{type(backbone).__name__} of {getattr(backbone, 'kind', '?')}"
        position = getattr(backbone, "position", "?")
        raise ValueError(f"LlamaForCausalLM is a Llama of text with position=slot, got a {kind} with {position}")
    head = backbone.head.weight
    assert isinstance(head, Tensor)
    config = copy.deepcopy(backbone.network.config)
    config.vocab_size = len(head)
    config.tie_word_embeddings = head is backbone.embedding.weight
    config.use_cache = True
    model: Any = LlamaForCausalLM(config)
    model.to(head.dtype)
    # A cast to bfloat16 has rounded the angles of late slots away.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.to(head.device)
    names = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    _copy_into(model, backbone, lambda name: names.get(name, name.replace("network.", "model.", 1)))
    return model.eval()


def _load_llama(folder: Path) -> nn.Module:
    """Our backbone from its export."""
    from permlab.config import build
    from permlab.data.spec import DataSpec

    config = json.loads(_file(folder, CONFIG).read_text(encoding="utf-8"))
    options = config.get("model", config)
    if options.get("component", "llama") != "llama":
        raise ValueError(f"{folder} holds a {options['component']}, not a llama")
    with safe_open(_file(folder, MODEL), framework="pt") as file:
        vocabulary = file.get_slice("embedding.weight").get_shape()[0]
    # The length matters only for a position table, which transformers' model has not.
    spec = DataSpec(kind="text", num_classes=vocabulary, channels=1, height=1, width=1)
    backbone = build("model", {**options, "component": "llama", "patch_size": 1, "pretrained": None}, spec)
    return load_export(folder, backbone)


@torch.no_grad()
def as_timm(backbone: nn.Module) -> Any:
    """A `Vit` of ours as timm's `VisionTransformer`, which computes the same logits.

    Args:
        backbone: a `Vit` with `position=item` and `readout=cls`, folded or not.
    Returns:
        A copy, in evaluation mode, without drop path. With gathers its state dict has their orders as well.
    Raises:
        ValueError: if it is not such a model.
    """
    from timm.models.vision_transformer import VisionTransformer

    from permlab.model.vit import Vit

    if not isinstance(backbone, Vit) or (backbone.position, backbone.readout) != ("item", "cls"):
        options = f"position={getattr(backbone, 'position', '?')}, readout={getattr(backbone, 'readout', '?')}"
        raise ValueError(
            f"timm's model is a Vit with position=item, readout=cls, got {type(backbone).__name__}, {options}"
        )
    block: Any = backbone.blocks[0]
    patches: Any = backbone.patch_embed
    head: Any = backbone.head
    width = backbone.num_features
    model = VisionTransformer(
        img_size=patches.img_size,
        patch_size=patches.patch_size,
        in_chans=patches.proj.in_channels,
        num_classes=head.out_features,
        embed_dim=width,
        depth=len(backbone.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=(block.mlp.fc1.out_features + 0.5) / width,  # timm rounds the product down
    )
    model.to(head.weight.device, head.weight.dtype)
    _copy_into(model, backbone, lambda name: name)
    return model.eval()


def _copy_into(model: nn.Module, backbone: nn.Module, rename: Callable[[str], str]) -> None:
    """State and gathers of a backbone, into the same network under other names."""
    for name, module in _gathers(backbone).items():
        splits = module.splits if module.input_order.ndim == 2 else None
        install_gather(model, rename(name), module.input_order, splits=splits)
    _load_state(model, {rename(name): value for name, value in backbone.state_dict().items()}, "the backbone")


# Sparse kernels


class SemiStructuredLinear(nn.Module):
    """Linear layer whose pruned rows are stored as values and 2-bit places, for 2:4 kernels; inference only.

    Args:
        linear: on CUDA, its pruned rows contiguously 2:4; a `GatheredLinear` keeps its gather.
        rows: half-open ranges of pruned rows; the other rows stay dense.
    Raises:
        RuntimeError: from torch, where it has no kernel for the shape or dtype.
    """

    def __init__(self, linear: nn.Linear, rows: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.parts, self.orders = nn.ModuleList(), []
        ends = [0, *torch.tensor(getattr(linear, "splits", [linear.out_features])).cumsum(0).tolist()]
        edges = sorted({*ends, *(edge for stretch in rows for edge in stretch)})
        for start, stop in itertools.pairwise(edges):
            weight = linear.weight.detach()[start:stop].contiguous()
            if any(first <= start and stop <= last for first, last in rows):
                weight = torch.sparse.to_sparse_semi_structured(weight)
            part = nn.Linear(self.in_features, stop - start, bias=linear.bias is not None, device="meta")
            part.weight = nn.Parameter(weight, requires_grad=False)
            if linear.bias is not None:
                part.bias = nn.Parameter(linear.bias.detach()[start:stop], requires_grad=False)
            self.parts.append(part)
            if isinstance(linear, GatheredLinear):
                index = sum(end <= start for end in ends) - 1
                self.orders.append(linear.input_order.view(-1, self.in_features)[index])

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        gathered = self.gather(input)
        outputs = [part(x) for x, part in zip(gathered, self.parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def gather(self, input: Float[Tensor, "*b i"]) -> list[Float[Tensor, "*b i"]]:
        """Input of every part; the sparse kernels want it contiguous."""
        if not self.orders:
            return [input.contiguous()] * len(self.parts)
        return [input.index_select(-1, order) for order in self.orders]


@torch.no_grad()
def to_semi_structured(model: nn.Module, patterns: Mapping[str, Pattern]) -> dict[str, str]:
    """Give pruned linear layers torch's 2:4 kernels, in place; inference only.

    Args:
        model: on CUDA, in a layout in which the pruned weights are contiguously 2:4, as from `load_export`.
        patterns: of the pruned weights, `tensors` of `sparsity.json`.
    Returns:
        For each weight that torch has no kernel for, its reason by name; these stay dense.
    Raises:
        ValueError: without CUDA, or if a pattern is not 2:4 or is not kept.
    Source: torch.sparse.to_sparse_semi_structured.
    """
    _check_cuda(model)
    for name, pattern in patterns.items():
        if (pattern["n"], pattern["m"]) != (2, 4):
            raise ValueError(f"{name} is {pattern['n']}:{pattern['m']}; torch has kernels for 2:4 only")
    verify_pattern(model.state_dict(), patterns)
    reasons = {}
    for name, pattern in patterns.items():
        path = name.removesuffix(".weight")
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear) or type(linear) not in (nn.Linear, GatheredLinear):
            # A class of its own computes something of its own.
            reasons[name] = f"{path} is a {type(linear).__name__}"
            continue
        parent, _, leaf = path.rpartition(".")
        try:
            sparse = SemiStructuredLinear(linear, pattern.get("rows", [[0, linear.out_features]]))
        except RuntimeError as error:
            reasons[name] = str(error)
        else:
            setattr(model.get_submodule(parent), leaf, sparse)
    return reasons


@torch.no_grad()
def time_layers(model: nn.Module, inputs: Any, *, num_repeats: int = 50) -> dict[str, dict[str, float]]:
    """Time of each sparse layer next to a dense one of its shape, on the inputs that the model gives it.

    The dense layer gathers nothing: it is what the model had before it was pruned.

    Args:
        model: after `to_semi_structured`.
        inputs: of the model, as in `export`.
        num_repeats: calls of each layer that are timed together, after a fifth as many that are not.
    Returns:
        By layer: `dense_ms`, `sparse_ms` with the gather, and `gather_ms` alone.
    Raises:
        ValueError: without CUDA, or if no layer is sparse.
    """
    _check_cuda(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SemiStructuredLinear)}
    if not layers:
        raise ValueError("no layer of the model is sparse; call to_semi_structured first")
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: seen.update({name: arguments[0]})

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        _run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _time_layer(layers[name], x, num_repeats) for name, x in seen.items()}


def _time_layer(layer: SemiStructuredLinear, x: Tensor, num_repeats: int) -> dict[str, float]:
    weight = torch.randn(layer.out_features, layer.in_features, dtype=x.dtype, device=x.device)
    bias = None if layer.parts[0].bias is None else weight[:, 0].contiguous()
    return {
        "dense_ms": _time(lambda: F.linear(x, weight, bias), num_repeats),
        "sparse_ms": _time(lambda: layer(x), num_repeats),
        "gather_ms": _time(lambda: layer.gather(x), num_repeats) if layer.orders else 0.0,
    }


def _time(call: Callable[[], Any], num_repeats: int) -> float:
    """Milliseconds per call, from events on the device."""
    for _ in range(max(1, num_repeats // 5)):
        call()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(num_repeats):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / num_repeats


def _check_cuda(model: nn.Module) -> None:
    if not torch.cuda.is_available():
        raise ValueError("torch's 2:4 kernels run on CUDA, and this machine has none")
    if not all(parameter.is_cuda for parameter in model.parameters()):
        raise ValueError("torch's 2:4 kernels run on CUDA; move the model there first")
