"""Write a pruned model in the layout that sparse kernels want, checked before it is written; and read it back.

An export is a folder: `model.safetensors` (folded weights with their zeros, and the orders of gathers),
`permutation.safetensors` (the order of every site), `sparsity.json` (which tensors follow which pattern, and how
each site was carried out) and `config.json`, with their checksums in `SHA256SUMS`.
"""

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from permlab.record.rundir import checksums, sync
from permlab.sparsity.fold import find_gathers, fold, install_gather
from permlab.sparsity.pattern import Pattern, read_patterns, verify_pattern
from permlab.sparsity.run_model import run_model, widen
from permlab.sparsity.timm_folder import timm_config
from permlab.sparsity.weight_site import WeightSite

MODEL, PERMUTATION, SPARSITY, CONFIG = "model.safetensors", "permutation.safetensors", "sparsity.json", "config.json"
SUMS = "SHA256SUMS"  # as sha256sum --check reads them


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
    _to_json(config, "config")  # or it is refused before anything is computed
    _check_structure(dense, pruned)
    _, modes, dense_difference = _fold_copy(dense, sites, orders, inputs)
    folded, _, pruned_difference = _fold_copy(pruned, sites, orders, inputs)
    for name, difference in (("dense", dense_difference), ("pruned", pruned_difference)):
        if not difference <= tolerance:  # NaN is refused too
            raise ValueError(f"folding changes the {name} model by {difference:.3g} of its output, over {tolerance:g}")
    patterns = read_patterns(sites, n=n, m=m)
    state, tied = _unique_state(folded, pruned)
    counts = verify_pattern(state, patterns)
    texts = {CONFIG: _to_json({**config, **timm_config(folded, config.get("normalisation"))}, "config")}
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
        inputs = widen(inputs)
    before = run_model(folded, inputs)
    modes = fold(folded, sites, orders)
    return folded, modes, _difference(run_model(folded, inputs), before)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


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
        "gathers": {name: module.splits for name, module in find_gathers(folded).items()},
        "tied": tied,
    }


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
    sparsity = json.loads(file_of(folder, SPARSITY).read_text(encoding="utf-8"))
    state = load_file(file_of(folder, MODEL))
    for alias, name in sparsity["tied"].items():
        state[alias] = state[name]
    for path, splits in sparsity["gathers"].items():
        order = state.get(f"{path}.input_order")
        if order is None:
            raise ValueError(f"{folder} has no order for the gather in front of {path}")
        install_gather(model, path, order, splits=splits if order.ndim == 2 else None)
    load_state(model, state, str(folder))
    return model


def file_of(folder: Path, name: str) -> Path:
    """Path of one of an export's files.

    Raises:
        ValueError: if there is no such file.
    """
    if not (folder / name).is_file():
        raise ValueError(f"{folder} is no export: it has no {name}")
    return folder / name


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict whose names and shapes have to be those of the model.

    Args:
        model: changed in place.
        state: tensors by name.
        source: of the tensors, for the message.
    Raises:
        ValueError: naming the first tensor that one of them has not, or in another shape.
    """
    expected = model.state_dict()
    for name in [*state, *expected]:
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (state, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in {source} and {shapes[1]} in {type(model).__name__}")
    model.load_state_dict(state)
