"""Memory and time of pruning a model of a billion parameters, one process for each row.

    python benchmarks/memory.py [--model llama_3_2_1b] [--samples 4] [--length 128] [--json PATH] [ROW ...]

The weights are random and in bfloat16, the tokens too, so what comes out means nothing; what is held in memory, and for
how long, is that of a real run: the whole story of `task=prune` but for reading a data set and writing files.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from measure import facts, processor
from permlab.config.compose import resolve_train
from permlab.data.spec import text_spec
from permlab.record.provenance import peak_memory_mib

VOCABULARY = 128256
ROWS = {
    "wanda": ("method=fixed", "task.pruner=wanda"),
    "wanda, sequential": ("method=fixed", "task.pruner=wanda", "task.calibrate=sequential"),
    "sparsegpt, sequential": ("method=fixed", "task.pruner=sparsegpt", "task.calibrate=sequential"),
    "wanda + deal_and_match": ("method=deal_and_match", "task.pruner=wanda"),
}


class RandomText:
    """Windows of random tokens in place of a data set."""

    def __init__(self, length: int) -> None:
        self.length = length

    def sample(self, split: str, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        tokens = torch.randint(
            VOCABULARY, (count, self.length + 1), generator=torch.Generator().manual_seed(len(split))
        )
        return [(part[:, :-1], part[:, 1:]) for part in tokens.split(2)]


def measure(name: str, model: str, num_samples: int, length: int) -> dict[str, float]:
    """Seconds of the parts of a pruning in this process, and its highest use of memory."""
    from permlab.config.build import build

    words = ["task=prune", f"model={model}", "data=pydocs", f"data.sequence_length={length}", *ROWS[name]]
    plan, _ = resolve_train([*words, f"task.num_samples={num_samples}", "task.weight_dtype=bfloat16"])
    spec = text_spec(VOCABULARY, length)
    plan.task.spec = spec
    torch.set_default_dtype(torch.bfloat16)
    backbone: Any = build("model", plan.config["model"], spec)
    torch.set_default_dtype(torch.float32)
    kind = plan.task.learner()
    learner: Any = kind(plan.task, backbone, kind.place(plan, backbone), plan.config["optim"], 0)
    at_first, began = peak_memory_mib(), time.perf_counter()
    data: Any = RandomText(length)
    learner.prepare(data, {})
    prepared = time.perf_counter()
    learner.finish(lambda: _test(learner, data))
    return {
        "parameters": float(sum(p.numel() for p in backbone.parameters())),
        "GiB of the model": at_first / 1024,
        "GiB at the peak": peak_memory_mib() / 1024,
        "seconds of calibration and search": prepared - began,
        "seconds of the rest": time.perf_counter() - prepared,
    }


@torch.no_grad()
def _test(learner: Any, data: RandomText) -> dict[str, float]:
    ((inputs, _), *_) = data.sample("test", 1)
    return {"test/loss": float(learner.predict(inputs).float().logsumexp(-1).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="what to measure; everything by default")
    parser.add_argument("--model", default="llama_3_2_1b", help="preset whose sizes are taken")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--here", action="store_true", help="measure one row in this very process")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results, with hardware and versions")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.rows[0], options.model, options.samples, options.length)))
        return
    results = {}
    for name in options.rows or ROWS:
        sizes = ["--model", options.model, "--samples", str(options.samples), "--length", str(options.length)]
        process = subprocess.run(
            [sys.executable, __file__, name, "--here", *sizes], capture_output=True, text=True, check=False
        )
        if process.returncode:
            raise RuntimeError(f"{name}: {process.stderr.strip()[-2000:]}")
        results[name] = json.loads(process.stdout.splitlines()[-1])
        print(f"{name:<24}" + "  ".join(f"{key} {value:.4g}" for key, value in results[name].items()), flush=True)
    if options.json:
        record = facts(device=f"{processor()}, {os.cpu_count()} cores", packages=()) | {"rows": results}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
