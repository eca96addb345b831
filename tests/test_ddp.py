"""Two processes (gloo): ranks agree on order, temperature, baseline and run directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from permlab.cli import main

# Run by both ranks: the real command line, with a callback that compares the ranks after every batch.
SCRIPT = """
import sys
import lightning as L
import torch
import permlab.run
from permlab.cli import main

torch.set_num_threads(1)


class Compare(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        method = pl_module.method
        state = {name: value.tolist() for name, value in method.state_dict().items()}
        mine = [method.best().tolist(), method.temperature, method.phase, state, str(trainer.default_root_dir)]
        weights = [parameter.sum().item() for parameter in pl_module.parameters()]
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, [mine, weights])
        assert everyone[0] == everyone[1], everyone
        if trainer.global_rank == 0:
            print("agree", trainer.global_step, flush=True)


build = permlab.run._callbacks
permlab.run._callbacks = lambda *parts: [*build(*parts), Compare()]
if __name__ == "__main__":
    sys.exit(main("train", sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "script.py").write_text(SCRIPT)
    words = [
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.max_steps=6",
        "logger.mode=disabled",
        "data.batch_size=32",
    ]
    words += ["method=reorder", "method.baseline=ema", "method.num_samples=2", "method.warmup_fraction=0.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "script.py"), *words, f"paths.runs={folder / 'runs'}"]
    return folder, subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=240)


def test_ranks_agree_after_every_step(result: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, process = result
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("agree") == 3 * 6  # learned, control, refit


def test_ranks_share_one_directory_and_eval_needs_only_one_of_them(
    result: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, process = result
    done = list((folder / "runs").rglob("DONE"))
    assert len(done) == len(list((folder / "runs").rglob("config.yaml"))) == 3, process.stderr[-3000:]
    learned = next(path.parent for path in done if "reorder" in str(path))
    summary = json.loads((learned / "summary.json").read_text())
    assert {"test/accuracy", "test/accuracy_control", "test/accuracy_refit"} <= set(summary)
    assert process.stdout.count("run: ") == 1, "only rank 0 prints"
    assert main("eval", [f"run={learned}"]) == 0  # in this one process, to the same numbers
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("test/"))
    assert len(printed) == 4
    assert all(float(value) == pytest.approx(summary[name], abs=1e-6) for name, value in printed.items())
    steps = [json.loads(line)["step"] for line in (learned / "metrics.jsonl").read_text().splitlines()]
    assert steps == [6]
