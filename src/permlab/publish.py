"""Export of a pruned run: weights that are contiguously N:M, with their orders, for other software."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from permlab.assembly import assemble, load_weights
from permlab.data.module import DataModule
from permlab.dense import dense_directory
from permlab.errors import ConfigError
from permlab.sparsity.export import export, load_export, read_patterns, time_layers, to_semi_structured
from permlab.sparsity.site_methods import SiteMethods

# Samples on which the models before and after folding are compared.
NUM_SAMPLES = 4


def export_run(run_dir: Path, config: Mapping[str, Any], data: DataModule, folder: Path, *, sparse: bool) -> None:
    """Write a pruned run's model as `folder` and print what was verified; see `permlab.sparsity.export`.

    Args:
        run_dir, config: of a finished pruning.
        data: its dataset; the models are compared on samples of the test split.
        folder: new or empty.
        sparse: then also convert the pruned layers to semi-structured tensors and time them (CUDA, 2:4).
    Raises:
        ConfigError: if the run pruned nothing, its dense model is gone, a check fails or the folder is not empty.
    """
    parts = assemble(config)
    if not isinstance(parts.method, SiteMethods):
        raise ConfigError(f"export={folder}: run {run_dir} pruned nothing; export a run of task=prune")
    dense, pruned = parts.model.eval(), copy.deepcopy(parts.model).eval()
    origin = dense_directory(config)
    if origin is not None:
        load_weights(origin / "checkpoints" / "best.ckpt", ("model", dense))
    load_weights(run_dir / "checkpoints" / "best.ckpt", ("model", pruned))
    with np.load(run_dir / "arrays" / "orders.npz", allow_pickle=False) as arrays:
        orders = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    n, m, sites = config["task"]["n"], config["task"]["m"], parts.method.sites
    inputs = data.sample("test", NUM_SAMPLES)[0][0]
    about = {"model": config["model"], "data": {"name": config["data"]["name"]}, "method": config["method"]["name"]}
    try:
        report = export(
            folder, dense=dense, pruned=pruned, sites=sites, orders=orders, n=n, m=m, inputs=inputs, config=about
        )
        _print(report, n, m)
        if sparse:
            _time(load_export(folder, assemble(config).model), read_patterns(sites, n=n, m=m), inputs)
    except ValueError as error:
        raise ConfigError(f"export={folder}: {error}") from error
    print(f"export: {folder}")


def _print(report: Mapping[str, Any], n: int, m: int) -> None:
    print(f"{report['num_tensors']} pruned tensors, {report['num_groups']} groups: at most {n} of {m} non-zero in each")
    print(f"non-zero weights in them         {100 * report['nonzero_fraction']:.2f} %")
    print(f"sites folded / gathered          {report['num_folded']} / {report['num_gathered']}")
    print(f"dense, before and after folding  {report['dense_difference']:.2g} relative")
    print(f"pruned, trained and exported     {report['pruned_difference']:.2g} relative")


def _time(model: nn.Module, patterns: Mapping[str, Any], inputs: torch.Tensor) -> None:
    if not torch.cuda.is_available():
        raise ValueError("sparse=true: semi-structured tensors need CUDA, which this machine has not")
    model = model.cuda().half().eval()
    for name, reason in to_semi_structured(model, patterns).items():
        print(f"{name}: stays dense, {reason}")
    inputs = inputs.cuda()
    times = time_layers(model, inputs.half() if inputs.is_floating_point() else inputs)
    for name, row in times.items():
        print(f"{name:<40}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
