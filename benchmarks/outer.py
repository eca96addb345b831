"""What surrounds the operations: methods in a training step, the harness, start-up, ranks, one block of a 7B model.

    python benchmarks/outer.py [methods harness startup ranks block] [--json PATH]

Everything is measured here and now; ratios are medians over alternating runs. Parts that need a process of their own
start one.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from measure import alternate, facts, median_ratio, processor
from permlab.cli import main as command_line
from permlab.config.compose import resolve_train
from permlab.run.assembly import assemble
from permlab.task.optim import build_optimizer

ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]


# Methods


def methods(batch_size: int = 4) -> Result:
    """A training step of vit_b at 196 tokens under every kind of method, against a fixed order."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train/a", "train/b", "val/a", "val/b"):
            Path(folder, name).mkdir(parents=True)
            Image.new("RGB", (224, 224)).save(Path(folder, name, "0.png"))
        names = ("fixed", "sort_ste", "reorder", "sinkhorn")
        steps = {name: _training_step(name, batch_size, folder) for name in names}
    seconds = alternate(steps, budget_s=60)
    limits = {"sort_ste": 1.03, "reorder": 1.03, "sinkhorn": 1.08}
    result: Result = {"fixed": {"ms": 1e3 * statistics.median(seconds["fixed"])}}
    for name, limit in limits.items():
        ratio = median_ratio(seconds[name], seconds["fixed"])
        result[name] = {"ms": 1e3 * statistics.median(seconds[name]), "ratio": ratio, "at most": limit}
    return result


def _training_step(method: str, batch_size: int, images_in: str) -> Callable[[], object]:
    extra = ["method.num_samples=1", "method.baseline=ema"] if method == "reorder" else []
    plan, _ = resolve_train(["model=vit_b", "data=image_folder", f"data.root={images_in}", f"method={method}", *extra])
    parts = assemble(plan)
    task = parts.learner
    task._is_log_step = lambda: False
    optimizer, _ = build_optimizer(task.model, task.method, plan.config["optim"], num_steps=100)
    spec = plan.spec
    images = torch.randn(batch_size, spec.channels, spec.height, spec.width)
    labels = torch.randint(spec.num_classes, (batch_size,))
    parts.method.train()

    def step() -> None:
        optimizer.zero_grad()
        task.training_step((images, labels), 0).backward()
        optimizer.step()

    return step


# Harness


def harness(num_steps: int = 200) -> Result:
    """Seconds per step of `train.py model=vim_nano data=digits` over those of a bare loop with the same parts.

    Lightning, metrics, the run's files, permutation logging and W&B (offline) are on; start and end of a run
    drop out, as the seconds are those of two lengths, subtracted.
    """
    words = ["model=vim_nano", "data=digits", "method=fixed", "num_threads=1"]
    short, rounds = num_steps // 4, 3
    torch.set_num_threads(1)
    bare, ours = [], []
    for _ in range(rounds):
        bare.append(_bare_loop(words, num_steps) - _bare_loop(words, short))
        ours.append(_fit_seconds(words, num_steps) - _fit_seconds(words, short))
    per_step = [1e3 * statistics.median(seconds) / (num_steps - short) for seconds in (bare, ours)]
    return {
        "bare loop, ms": per_step[0],
        "train.py, ms": per_step[1],
        "ratio": median_ratio(ours, bare),
        "at most": 1.05,
    }


def _bare_loop(words: list[str], num_steps: int) -> float:
    """Seconds of a plain training loop over the same data with the same optimiser."""
    plan, _ = resolve_train(words)
    parts = assemble(plan)
    data = parts.data
    data.setup("fit")
    loader = data.train_dataloader()
    optimizer, scheduler = build_optimizer(parts.model, parts.method, plan.config["optim"], num_steps=num_steps)
    parameters = list(parts.model.parameters())
    began, done = time.perf_counter(), 0
    while done < num_steps:
        for images, labels in loader:
            loss = cross_entropy(parts.model.read(parts.model.embed(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            done += 1
            if done == num_steps:
                break
    return time.perf_counter() - began


def _fit_seconds(words: list[str], num_steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words = [
            *words,
            f"trainer.max_steps={num_steps}",
            f"trainer.val_check_interval={num_steps}",
            f"paths.runs={folder}",
        ]
        if command_line("train", words):
            raise RuntimeError(f"train.py {' '.join(words)} failed")
        summary = json.loads((resolve_train(words)[0].directory / "summary.json").read_text())
    return summary["train/seconds"]


# Start-up


def startup() -> Result:
    """Seconds of commands that train nothing, and of imports."""
    result: Result = {}
    with tempfile.TemporaryDirectory() as folder:
        run = [f"paths.runs={folder}", "trainer.max_steps=1", "task.control=false", "logger.mode=disabled"]
        _command("train.py", *run)
        commands = {"--help": ["--help"], "a configuration error": ["model=vit_bb"], "a finished run found again": run}
        for name, words in commands.items():
            seconds = [_command("train.py", *words, check=False)[0] for _ in range(5)]
            result[name] = {"seconds": statistics.median(seconds), "at most": 1.5}
    code = (
        "import time; a = time.perf_counter(); import torch, lightning, torchmetrics; b = time.perf_counter();"
        "import permlab.run.story; print(b - a, time.perf_counter() - b)"
    )
    pairs = [[float(x) for x in _python("-c", code).split()] for _ in range(3)]
    result["import torch, lightning"] = {"seconds": statistics.median(first for first, _ in pairs)}
    result["import what is ours after these"] = {
        "seconds": statistics.median(last for _, last in pairs),
        "at most": 1.0,
    }
    return result


def _command(script: str, *words: str, check: bool = True) -> tuple[float, str]:
    began = time.perf_counter()
    process = subprocess.run([sys.executable, ROOT / script, *words], capture_output=True, text=True, cwd=ROOT)
    if check and process.returncode:
        raise RuntimeError(f"{script} {' '.join(words)}: {process.stderr.strip()}")
    return time.perf_counter() - began, process.stdout


def _python(*words: str) -> str:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout


# Ranks


def ranks(num_steps: int = 60) -> Result:
    """Samples per second of two processes with one thread each over those of one process with one thread."""
    words = [
        "model=vim_nano",
        "data=digits",
        "method=fixed",
        "task.control=false",
        "num_threads=1",
        "logger.mode=disabled",
    ]
    settings = {1: ["trainer.devices=1"], 2: ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]}
    speed = {}
    for count, more in settings.items():
        seconds = []
        for _ in range(3):
            long, short = (_rank_seconds([*words, *more], steps) for steps in (num_steps, num_steps // 4))
            seconds.append(long - short)
        speed[count] = count * 128 * (num_steps - num_steps // 4) / statistics.median(seconds)
    return {"samples/s, 1": speed[1], "samples/s, 2": speed[2], "ratio": speed[2] / speed[1], "at least": 1.6}


def _rank_seconds(words: list[str], num_steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        last = [f"trainer.max_steps={num_steps}", f"trainer.val_check_interval={num_steps}", f"paths.runs={folder}"]
        words = [*words, *last, "data.batch_size=128"]
        _command("train.py", *words)
        return json.loads((resolve_train(words)[0].directory / "summary.json").read_text())["train/seconds"]


# One block of a 7B model


def block(num_steps: int = 4) -> Result:
    """Memory and time of pruning one block of LLaMA-2-7B's shape with learned orders, and of 32 of them.

    The block has random weights, in float32, between a small embedding and head; 8 windows of 128 tokens calibrate.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        shape = LlamaConfig(
            vocab_size=256, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32,
            num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(shape).save_pretrained(f"{folder}/dense")
        words = [
            "task=prune", "model=llama_2_7b", "model.depth=1", f"model.pretrained={folder}/dense", "data=pydocs",
            "data.batch_size=2", "method=sinkhorn_ste", "task.num_samples=8",
            f"trainer.max_steps={num_steps}", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1",
            f"paths.runs={folder}", "logger.mode=disabled",
        ]  # fmt: skip
        seconds, _ = _command("train.py", *words)
        run_dir = resolve_train(words)[0].directory
        summary = json.loads((run_dir / "summary.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    step = summary["train/seconds"] / num_steps
    return {
        "one block, s": seconds,
        "peak GiB": {"": peak, "at most": 8.0},
        "a training step, s": step,
        "32 blocks, 100 steps each, hours here": 32 * 100 * step / 3600,
        "projected for a GPU, not measured": _project(peak),
    }


def _project(block_gib: float) -> Result:
    """LLaMA-2-7B on one GPU, block after block, 100 steps each, if its memory gives 2 TB/s and it computes 200 TFLOP/s.

    A step passes about 40 times over the block's float32 weights (scores, masks, products, gradients) and makes
    six products of weights and tokens; the model waits in bfloat16, and a block takes what was measured here.
    """
    block_weights, all_weights, num_tokens = 4 * 4096**2 + 3 * 4096 * 11008, 6.74e9, 256
    step = 40 * 4 * block_weights / 2e12 + 6 * block_weights * (num_tokens + 64) / 200e12
    return {"minutes": 32 * 100 * step / 60, "GiB": 2 * all_weights / 2**30 + block_gib}


PARTS: dict[str, Callable[[], Result]] = {
    "methods": methods, "harness": harness, "startup": startup, "ranks": ranks, "block": block
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; everything by default")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results, with hardware and versions")
    options = parser.parse_args(arguments)
    os.environ.setdefault("WANDB_SILENT", "true")
    results = {}
    for name in options.parts or PARTS:
        print(f"# {name}: {(PARTS[name].__doc__ or '').splitlines()[0]}", flush=True)
        results[name] = PARTS[name]()
        for key, value in results[name].items():
            shown = value if isinstance(value, dict) else {"": value}
            cells = (f"{label} {number:.4g}".strip() for label, number in shown.items())
            print(f"  {key:<34} {', '.join(cells)}", flush=True)
    if options.json:
        record = facts(device=f"{processor()}, {os.cpu_count()} cores", packages=("numba",)) | {"parts": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
