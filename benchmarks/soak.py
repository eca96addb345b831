"""Kill runs at random times, start them again, and compare what they end with: nothing may differ.

python benchmarks/soak.py                    50 kills over a training, a pruning and a multirun of two seeds
python benchmarks/soak.py --kills 4 --only train   a short one
Each run is first made without interruption, which also says how long it takes; then again and again
until it is finished, each time with the same command and a SIGKILL, SIGTERM or SIGINT at a random moment.
Starts come from a process that has imported the libraries, so that most of the time is spent on the runs.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from permlab.cli import main as command_line
from permlab.config.schema import CONF
from permlab.record.checkpoint import newest_state
from permlab.record.rundir import is_done, read_metrics, read_summary, reproducible
from permlab.study.jobs import _job

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
COMMON = (
    "logger.mode=disabled",
    "data.batch_size=32",
    "num_threads=1",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_n_steps=5",
)
SCENARIOS = {
    "train": ("task.control=false", "method=reorder", "data.num_workers=2", "trainer.max_steps=60"),
    "prune": ("task=prune", "model=vit_nano", "task.dense_steps=20", "task.num_samples=16", "trainer.max_steps=20"),
    "multirun": ("-m", "task.control=false", "seed=0,1", "trainer.accumulate_grad_batches=2", "trainer.max_steps=30"),
}
EVERY = 5
# Of a clock, or of the memory that a process happened to have.
MEASURED = ("seconds", "memory")
# Seconds after which a start counts as hanging.
LIMIT = 300.0


@dataclass
class Result:
    """What became of a scenario under fire."""

    kills: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def words(scenario: str, runs: Path) -> list[str]:
    return [*SCENARIOS[scenario], *COMMON, f"paths.runs={runs}"]


def start(arguments: list[str], log: Path) -> BaseProcess:
    """One start of the command, its output in a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["permlab.run.story"])
    process = context.Process(target=_start, args=(arguments, str(log), os.getpid()))
    process.start()
    return process


def _start(arguments: list[str], log: str, driver: int) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    _job(command_line, "train", str(CONF.parent / "train.py"), arguments, dict(os.environ), driver)


def kill(pid: int, name: str) -> None:
    """Send a signal to a process; Ctrl-C reaches those that it has started as well."""
    for child in descendants(pid) if name == "SIGINT" else []:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGINT)
    os.kill(pid, SIGNALS[name])


def descendants(pid: int) -> list[int]:
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(path.parent.name))
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def wait(process: BaseProcess, seconds: float) -> bool:
    process.join(seconds)
    return process.exitcode is not None


def run_whole(scenario: str, runs: Path) -> float:
    began = time.monotonic()
    process = start(words(scenario, runs), runs.with_suffix(".log"))
    if not wait(process, LIMIT) or process.exitcode:
        raise SystemExit(f"error: {scenario} does not run without interruption: exit {process.exitcode}")
    return time.monotonic() - began


def soak(scenario: str, folder: Path, kills: int, draw: random.Random) -> Result:
    """Run a scenario once whole and as often as it takes to place the kills, and compare every pair of runs."""
    result = Result()
    whole = folder / f"{scenario}-whole"
    wait(start(["--help"], folder / "help.log"), LIMIT)  # the libraries are imported before anything is timed
    seconds = run_whole(scenario, whole)
    print(f"{scenario}: {seconds:.0f} s without interruption", flush=True)
    trial = 0
    while sum(result.kills.values()) < kills:
        trial += 1
        run_under_fire(scenario, folder / f"{scenario}-{trial}", kills, seconds, draw, result)
        result.problems += compare(whole, folder / f"{scenario}-{trial}")
    return result


def run_under_fire(scenario: str, runs: Path, kills: int, seconds: float, draw: random.Random, result: Result) -> None:
    """Start, kill, start again, until a start ends by itself."""
    for attempt in range(1000):
        process = start(words(scenario, runs), runs.with_suffix(".log"))
        left = kills - sum(result.kills.values())
        if wait(process, draw.random() * seconds if left else LIMIT):
            if process.exitcode:
                result.problems.append(f"{runs.name}, start {attempt}: exit {process.exitcode} without a signal")
            return
        name = draw.choice(list(SIGNALS))
        before = progress(runs)
        assert process.pid is not None
        kill(process.pid, name)
        if not wait(process, LIMIT):
            result.problems.append(f"{runs.name}, start {attempt}: {name} did not end it")
            process.kill()
            return
        if process.exitcode == 0:
            return  # it had finished by then
        result.kills[name] += 1
        result.codes[process.exitcode or 0] += 1
        expected = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130, -2)}[name]
        if process.exitcode not in expected:
            result.problems.append(f"{runs.name}, start {attempt}: {name} ended it with {process.exitcode}")
        result.lost += [max(0, step - saved_step(run_dir)) for run_dir, step in {**before, **progress(runs)}.items()]
    result.problems.append(f"{runs.name}: never finished")


def progress(runs: Path) -> dict[Path, int]:
    """Newest step in the metrics of every run that is not finished."""
    found = {}
    for config in runs.rglob("config.yaml"):
        run_dir = config.parent
        if not is_done(run_dir):
            metrics = read_metrics(run_dir)
            found[run_dir] = int(metrics[-1]["step"]) if metrics else 0
    return found


def saved_step(run_dir: Path) -> int:
    state, _ = newest_state(run_dir / "checkpoints")
    return state.step if state else 0


# Comparison


def compare(whole: Path, other: Path) -> list[str]:
    """Every difference between the runs below two folders, but for measured times."""
    expected, found = ({p.parent.relative_to(runs) for p in runs.rglob("DONE")} for runs in (whole, other))
    problems = [f"{other.name}: {name} is not in both" for name in expected ^ found]
    for name in sorted(expected & found):
        problems += [f"{other.name}/{name}: {what} differs" for what in differences(whole / name, other / name)]
    return problems


def differences(ours: Path, theirs: Path) -> list[str]:
    found = []
    lines = [[reproducible(record) for record in read_metrics(run_dir)] for run_dir in (ours, theirs)]
    if lines[0] != lines[1]:
        found.append("metrics.jsonl")
    summaries = [read_summary(run_dir) for run_dir in (ours, theirs)]
    for key in summaries[0].keys() | summaries[1].keys():
        if not any(word in key for word in MEASURED) and summaries[0].get(key) != summaries[1].get(key):
            found.append(f"summary {key}")
    names = [{path.name for path in (run_dir / "checkpoints").glob("*.ckpt")} for run_dir in (ours, theirs)]
    for name in sorted(names[0] & names[1]):
        if not name.startswith("last-") and not same_tensors(
            ours / "checkpoints" / name, theirs / "checkpoints" / name
        ):
            found.append(name)
    for path in sorted((ours / "arrays").glob("*.npz")):
        if not same_arrays(path, theirs / "arrays" / path.name):
            found.append(path.name)
    return found


def same_tensors(ours: Path, theirs: Path) -> bool:
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in (ours, theirs))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def same_arrays(ours: Path, theirs: Path) -> bool:
    if not theirs.is_file():
        return False
    with np.load(ours, allow_pickle=False) as first, np.load(theirs, allow_pickle=False) as second:
        return first.files == second.files and all(np.array_equal(first[k], second[k]) for k in first.files)


def report(results: dict[str, Result]) -> str:
    lines = [f"{'':10}{'kills':>7}{'KILL':>6}{'TERM':>6}{'INT':>6}{'steps lost, max':>17}{'mean':>7}{'different':>11}"]
    for name, result in results.items():
        counts = [result.kills[signal_name] for signal_name in SIGNALS]
        worst, mean = max(result.lost, default=0), sum(result.lost) / max(1, len(result.lost))
        row = "".join(f"{count:>6}" for count in counts)
        lines.append(f"{name:10}{sum(counts):>7}{row}{worst:>17}{mean:>7.1f}{len(result.problems):>11}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill runs at random times and compare what they end with.")
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--only", choices=[*SCENARIOS], help="one scenario instead of three")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args(arguments)
    scenarios = [options.only] if options.only else [*SCENARIOS]
    draw, results = random.Random(options.seed), {}
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(scenarios):
            kills = options.kills // len(scenarios) + (index < options.kills % len(scenarios))
            results[name] = soak(name, Path(folder), kills, draw)
            print(report({name: results[name]}).splitlines()[1], flush=True)
    print(report(results))
    problems = [problem for result in results.values() for problem in result.problems]
    problems += [
        f"{name}: {max(result.lost)} steps lost, more than since the last checkpoint"
        for name, result in results.items()
        if max(result.lost, default=0) > EVERY
    ]
    print("\n".join(problems) or "every run ended as one that was never interrupted")
    if options.json:
        options.json.write_text(json.dumps({n: {"kills": r.kills, "lost": r.lost} for n, r in results.items()}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
