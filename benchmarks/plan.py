"""What `plan=true` projects against what the same command then takes, for four configurations.

python benchmarks/plan.py [--runs FOLDER] [--wall] [NUMBER ...]

Plan and run are made one after the other, each in a process of its own. Compared are seconds of the processor, which
other users of a machine disturb less, or with `--wall` those of the clock on the wall; and the peak of memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

# The default line; a pruning with search, training and polishing; text; a state-space model.
COMMANDS = (
    "figures=true",
    "task=prune model=vit_nano data=digits method=hybrid",
    "task=lm model=llama_nano data=pydocs",
    "model=vim_nano method=sort_ste trainer.max_steps=1000",
)


def project(words: list[str], *, wall: bool) -> dict[str, float]:
    """Seconds and bytes that a plan projects, made in this process."""
    clock = time.perf_counter if wall else time.process_time
    began = clock()
    from permlab.config.compose import resolve_train
    from permlab.run.outlook import Outlook
    from permlab.run.projection import project
    from permlab.task import piece

    piece.clock, start = clock, clock() - began
    projections = project(Outlook(resolve_train(words)[0]).trainings, imports=start)
    for projection in projections:
        parts = ", ".join(f"{part.name} {part.seconds:.1f}" for part in projection.parts)
        print(f"  {projection.name}: {parts}", file=sys.stderr)
    seconds = {"start": start, **{p.name: p.seconds for p in projections}}
    return {"seconds": sum(seconds.values()), "bytes": max(p.memory for p in projections)}


def measure(words: list[str], *, wall: bool) -> dict[str, float]:
    """Seconds and bytes that the command takes."""
    began = time.perf_counter()
    run = subprocess.Popen([sys.executable, "train.py", *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(run.pid, 0)
    assert status == 0, f"{words} ended with status {status}"
    seconds = time.perf_counter() - began if wall else used.ru_utime + used.ru_stime
    return {"seconds": seconds, "bytes": used.ru_maxrss * 1024}


def compare(index: int, runs: str, *, wall: bool) -> str:
    """One line of the table."""
    words = [*COMMANDS[index].split(), f"paths.runs={runs}"]
    arguments = [sys.executable, __file__, "--project", *(["--wall"] if wall else []), *words]
    projected = json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout)
    measured = measure(words, wall=wall)
    cells = [f"`{COMMANDS[index]}`"]
    for key, unit in (("seconds", 1.0), ("bytes", 2.0**20)):
        cells += [
            f"{projected[key] / unit:.0f}",
            f"{measured[key] / unit:.0f}",
            f"{projected[key] / measured[key]:.2f}",
        ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="numbers of commands, from 0; all of them if none is given")
    parser.add_argument("--runs", default=None, help="folder for the runs")
    parser.add_argument("--wall", action="store_true", help="compare the clock on the wall")
    parser.add_argument("--project", action="store_true", help="print what a command's plan projects, as JSON")
    options = parser.parse_args()
    if options.project:
        print(json.dumps(project(options.words, wall=options.wall)))
        return
    print("| command | projected, s | measured, s | ratio | projected, MiB | measured, MiB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for index in map(int, options.words or range(len(COMMANDS))):
        with tempfile.TemporaryDirectory(dir=options.runs) as runs:
            print(compare(index, runs, wall=options.wall), flush=True)


if __name__ == "__main__":
    main()
