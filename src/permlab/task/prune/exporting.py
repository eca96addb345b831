"""Export of a pruned run: weights that are contiguously N:M, with their orders, for other software."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from permlab.config.build import build
from permlab.config.plan import Plan
from permlab.data.module import DataModule
from permlab.errors import ConfigError
from permlab.method.site_methods import SiteMethods
from permlab.record.checkpoint import load_weights
from permlab.record.stored import read_arrays
from permlab.sparsity.export import export, load_export, read_patterns, time_layers, to_semi_structured

# Samples on which the models before and after folding are compared.
NUM_SAMPLES = 4


def export_run(
    plan: Plan,
    method: SiteMethods,
    data: DataModule,
    folder: Path,
    *,
    dense_run: Path | None,
    sparse: bool,
) -> None:
    """Write a pruned run's model as `folder` and print what was verified; see `permlab.sparsity.export`.

    Args:
        plan: of the finished run.
        method: at the sites that were pruned.
        data: the run's dataset; the models are compared on samples of the test split.
        folder: new or empty.
        dense_run: the run that was pruned; None where the model came pretrained.
        sparse: then also convert the pruned layers to semi-structured tensors and time them (CUDA, 2:4).
    Raises:
        ConfigError: if the dense model is gone, a check fails or the folder is not empty.
    """
    torch.manual_seed(plan.config["seed"])  # a head that pretrained weights do not have is drawn from it
    dense = build("model", plan.config["model"], plan.spec).eval()
    pruned = copy.deepcopy(dense)
    if dense_run is not None:
        load_weights(dense_run / "checkpoints" / "best.ckpt", ("model", dense))
    load_weights(plan.directory / "checkpoints" / "best.ckpt", ("model", pruned))
    arrays = read_arrays(plan.directory / "arrays" / "orders.npz")
    orders = {name: torch.from_numpy(array) for name, array in arrays.items()}
    n, m, sites, config = plan.task.n, plan.task.m, method.sites, plan.config
    inputs = data.sample("test", NUM_SAMPLES)[0][0]
    about = {"model": config["model"], "data": {"name": config["data"]["name"]}, "method": config["method"]["name"]}
    summary = json.loads((plan.directory / "summary.json").read_text(encoding="utf-8"))
    results = {key: summary[key] for key in (plan.task.metric.key,) if key in summary}
    try:
        report = export(
            folder, dense=dense, pruned=pruned, sites=sites, orders=orders, n=n, m=m, inputs=inputs,
            config=about, tokenizer=data.load_tokenizer(),
            normalisation=data.normalisation(), results=results,
        )  # fmt: skip
        _print(report, n, m)
        if sparse:
            fresh = build("model", config["model"], plan.spec)
            _time(load_export(folder, fresh), read_patterns(sites, n=n, m=m), inputs)
    except ValueError as error:
        raise ConfigError(f"export={folder}: {error}") from error
    print(f"export: {folder}")


def _print(report: Mapping[str, Any], n: int, m: int) -> None:
    print(f"{report['num_tensors']} pruned tensors, {report['num_groups']} groups: at most {n} of {m} non-zero in each")
    print(f"non-zero weights in them         {100 * report['nonzero_fraction']:.2f} %")
    print(f"sites folded / gathered          {report['num_folded']} / {report['num_gathered']}")
    print(f"dense, before and after folding  {report['dense_difference']:.2g} relative")
    print(f"pruned, trained and exported     {report['pruned_difference']:.2g} relative")
    print(f"opens as                         {report['opens']}")
    if report["num_gathered"]:
        print("task.sites=foldable has sites without a gather, which any software runs")


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
