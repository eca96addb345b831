"""Write a pruned model in the layout that sparse kernels want, checked before it is written; and read it back.

An export is a folder of the library that the model is from, where there is one and it can run the model: weights
under its names, its `config.json`, a tokenizer. `permlab.sparsity.layout` says which. Ours lie beside:
`permutation.safetensors` (the order of every site), `sparsity.json` (which tensors follow which pattern, how each
site was carried out, our names of tensors), `permlab.json` (the configuration), `report.json` (what was verified),
and the checksums of all in `SHA256SUMS`. Orders of gathers are with the weights.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from permlab.record.rundir import checksums, sync
from permlab.sparsity.fold import find_gathers, fold, install_gather
from permlab.sparsity.layout import OWN_WEIGHTS, WEIGHTS, Layout, find_layout
from permlab.sparsity.pattern import Pattern, read_patterns, verify_pattern
from permlab.sparsity.run_model import run_model, widen
from permlab.sparsity.weight_site import WeightSite

PERMUTATION, SPARSITY, OWN_CONFIG, REPORT = "permutation.safetensors", "sparsity.json", "permlab.json", "report.json"
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
    tokenizer: Any = None,
    normalisation: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
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
        config: of the model or the run, plain containers only; becomes `permlab.json`.
        tokenizer: of the text that the model reads, as `transformers.AutoTokenizer` gives it; saved beside.
        normalisation: `mean` and `std` by channel of the images that the model reads, on the scale 0..1.
        results: further numbers for `report.json`.
        tolerance: largest difference allowed, relative to the largest output.
    Returns:
        `dense_difference`, `pruned_difference`, `num_tensors`, `num_groups`, `nonzero_fraction` as
        verified, `num_folded` and `num_gathered` sites, and `opens`, who opens the folder.
    Raises:
        ValueError: if a check fails, the folder has something in it, or the models differ in structure.
    Cost: two forward passes of each model, one copy of a model at a time.
    """
    folder = Path(folder)
    _check_free(folder)
    texts = {OWN_CONFIG: _to_json(config, "config")}
    _check_structure(dense, pruned)
    _, modes, dense_difference = _fold_copy(dense, sites, orders, inputs)
    folded, _, pruned_difference = _fold_copy(pruned, sites, orders, inputs)
    for name, difference in (("dense", dense_difference), ("pruned", pruned_difference)):
        if not difference <= tolerance:  # NaN is refused too
            raise ValueError(f"folding changes the {name} model by {difference:.3g} of its output, over {tolerance:g}")
    layout = find_layout(folded, tokenizer, normalisation)
    patterns = _renamed(read_patterns(sites, n=n, m=m), layout)
    state, tied = _unique_state(folded, pruned)
    state = {layout.rename(name): value for name, value in state.items()}
    counts = verify_pattern(state, patterns)
    gathered = sum(mode == "gather" for mode in modes.values())
    report = {
        "dense_difference": dense_difference,
        "pruned_difference": pruned_difference,
        **counts,
        "num_folded": len(modes) - gathered,
        "num_gathered": gathered,
        "opens": layout.opens,
    }
    about = {"n": n, "m": m, "tensors": patterns} | _describe(folded, sites, modes, tied, layout.rename)
    texts |= {SPARSITY: _to_json(about, "sparsity"), REPORT: _to_json(report | dict(results or {}), "report")}
    permutation = {site.name: orders[site.name].detach().cpu().clone() for site in sites}
    _write(folder, layout, {layout.weights: state, PERMUTATION: permutation}, texts)
    return report


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


def _renamed(patterns: Mapping[str, Pattern], layout: Layout) -> dict[str, Pattern]:
    """The same patterns by the names in the file, ours beside where it is another."""
    renamed: dict[str, Pattern] = {}
    for name, pattern in patterns.items():
        theirs = layout.rename(name)
        renamed[theirs] = {**pattern, **({} if theirs == name else {"ours": name})}
    return renamed


def _describe(
    folded: nn.Module,
    sites: Sequence[WeightSite],
    modes: Mapping[str, str],
    tied: Mapping[str, str],
    rename: Callable[[str], str],
) -> dict[str, Any]:
    """Sites, gathers and tied parameters, tensors and modules under the names that they have in the file."""
    return {
        "sites": [
            {
                "name": site.name,
                "kind": site.kind,
                "mode": modes[site.name],
                "num_items": site.num_items,
                "num_heads": site.num_heads,
                "repeats": site.repeats,
                "readers": [{"module": rename(reader.module), "rows": reader.rows} for reader in site.readers],
            }
            for site in sites
        ],
        # Rows of each part of a layer that gathers its input; the orders are in the model's file.
        "gathers": {rename(name): module.splits for name, module in find_gathers(folded).items()},
        "tied": {rename(alias): rename(name) for alias, name in tied.items()},
        # Of tensors that are called otherwise in the model that was exported.
        "names": {rename(name): name for name in folded.state_dict() if rename(name) != name},
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


def _write(folder: Path, layout: Layout, tensors: Mapping[str, dict[str, Tensor]], texts: Mapping[str, str]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        layout.write(partial)
        for name, values in tensors.items():
            save_file(values, partial / name, metadata={"format": "pt"})
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        names = sorted(path.name for path in partial.iterdir())
        (partial / SUMS).write_text(checksums(partial, names), encoding="utf-8")
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
        model: plain, the one that was exported or the library's like of it; changed in place. Its dtypes stay.
    Returns:
        The model, with a `GatheredLinear` where the export has a gather.
    Raises:
        ValueError: if the folder is no export, or its tensors are not those of the model.
    """
    folder = Path(folder)
    sparsity = json.loads(file_of(folder, SPARSITY).read_text(encoding="utf-8"))
    state = load_file(file_of(folder, OWN_WEIGHTS if (folder / OWN_WEIGHTS).is_file() else WEIGHTS))
    for alias, name in sparsity["tied"].items():
        state[alias] = state[name]
    rename = _renaming(sparsity, model)
    for path, splits in sparsity["gathers"].items():
        order = state.get(f"{path}.input_order")
        if order is None:
            raise ValueError(f"{folder} has no order for the gather in front of {path}")
        install_gather(model, rename(path), order, splits=splits if order.ndim == 2 else None)
    load_state(model, {rename(name): value for name, value in state.items()}, str(folder))
    return model


def _renaming(sparsity: Mapping[str, Any], model: nn.Module) -> Callable[[str], str]:
    """The model's name of a tensor or module of an export, whichever of the two models it is that it knows."""
    ours = sparsity.get("names", {})  # earlier versions had one name for both
    expected = model.state_dict().keys()
    if len(expected & ours.keys()) >= len(expected & set(ours.values())):
        return str
    modules = {name.rpartition(".")[0]: own.rpartition(".")[0] for name, own in ours.items()}
    return lambda name: ours.get(name, modules.get(name, name))


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


def copy_state(model: nn.Module, original: nn.Module, rename: Callable[[str], str] = str) -> None:
    """State and gathers of a model, into the same network under other names.

    Args:
        model: changed in place.
        original: has gathers or not.
        rename: the model's name of a tensor or module of the original.
    """
    for name, module in find_gathers(original).items():
        splits = module.splits if module.input_order.ndim == 2 else None
        install_gather(model, rename(name), module.input_order, splits=splits)
    load_state(model, {rename(name): value for name, value in original.state_dict().items()}, "the backbone")
