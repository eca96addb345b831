"""Two processes that train one run together, and compare themselves after every step."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import lightning as L
import torch
from runs import cut_companions

from permlab.cli import main

TESTS = Path(__file__).parent
SCRIPT = "import sys; from ranks import train; train(sys.argv[1:])"


class Compare(L.Callback):
    """Prints `agree` where both ranks have the same state; does to a rank what the environment says, at its step."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        due = [key for key, value in os.environ.items() if key.endswith("_AT") and value == str(trainer.global_step)]
        if trainer.global_rank == 1 and "DIE_AT" in due:
            Path(os.environ["DIED"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.global_rank == 1 and "DRIFT_AT" in due:
            pl_module.method.logits.data[-1] += 100
        if trainer.global_rank == 1 and "NAN_AT" in due:
            pl_module.model.head.weight.data.fill_(float("nan"))
        if trainer.global_rank == 0 and "STOP_AT" in due:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if "DRIFT_AT" in os.environ or "NAN_AT" in os.environ:
            return
        method = pl_module.method
        state = {name: value.tolist() for name, value in method.state_dict().items()}
        orders = {name: order.tolist() for name, order in method.orders().items()}
        mine = [orders, method.temperature, method.phase, state, str(trainer.default_root_dir)]
        weights = [parameter.sum().item() for parameter in pl_module.parameters()]
        everyone: list[Any] = [None, None]
        torch.distributed.all_gather_object(everyone, [mine, weights])
        assert everyone[0] == everyone[1], everyone
        if trainer.global_rank == 0:
            print("agree", trainer.global_step, flush=True)


def train(words: list[str]) -> None:
    """`python train.py` with the callback, in this process, which it ends."""
    import permlab.run.companion
    import permlab.run.story
    import permlab.run.trainer

    torch.set_num_threads(1)
    build = permlab.run.trainer._callbacks
    permlab.run.trainer._callbacks = lambda *parts: [*build(*parts), Compare()]
    if "COMPANION_STEPS" in os.environ:
        quick = {"max_steps": int(os.environ["COMPANION_STEPS"]), "limit_val_batches": 1, "limit_test_batches": 1}
        cut = cut_companions(permlab.run.companion.companion_plan, quick | {"log_every_n_steps": 1})
        permlab.run.companion.companion_plan = permlab.run.story.companion_plan = cut
    sys.exit(main("train", words))


def launch(words: list[str], folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Lightning starts the second rank, as it does for a user."""
    (folder / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables}
    command = [sys.executable, str(folder / "script.py"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=240)


def fork(words: list[str], folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Both ranks come from the preloaded server, as from a launcher of their own; no library is imported anew."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **variables}
    logs = [(folder / f"out{rank}", folder / f"err{rank}") for rank in range(2)]
    ranks = [forked.start(_train, [words], logs[rank], {**shared, "LOCAL_RANK": str(rank)}) for rank in range(2)]
    for process in ranks:
        process.join(forked.TIMEOUT_SECONDS)
    out, err = ("".join(log[index].read_text() for log in logs) for index in range(2))
    return subprocess.CompletedProcess(words, ranks[0].exitcode or 0, out, err)


def _train(words: list[str]) -> None:
    sys.argv = ["train.py", *words]
    train(words)
