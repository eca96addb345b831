"""Faults: damaged checkpoints, full and read-only disks, lost directories, two processes, signals anywhere."""

import contextlib
import ctypes
import errno
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import lightning as L
import pytest
import torch
from runs import Result, train

import permlab.record.lock
import permlab.run.story
import permlab.run.trainer
import permlab.task.classify.learner
from permlab.cli import main
from permlab.errors import LockedError, WriteError
from permlab.record.checkpoint import find_damage, newest_state
from permlab.record.lock import RunLock
from permlab.record.rundir import MetricsFile, write_checkpoint

OPTIONS = ("task.control=false", "trainer.log_every_n_steps=1", "trainer.val_check_interval=5")
STEPS = 12
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000  # linux/sched.h
SKIP = 77


class At(L.Callback):
    """Does something before a batch is trained on."""

    def __init__(self, batch: int, action) -> None:
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            self.action(trainer)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch):
    build = permlab.run.trainer._callbacks

    def arm(batch: int, action) -> None:
        monkeypatch.setattr(permlab.run.trainer, "_callbacks", lambda *parts: [*build(*parts), At(batch, action)])

    return arm


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(tmp_path_factory.mktemp("whole"), *OPTIONS, steps=STEPS)


@pytest.fixture
def stopped(whole: Result, tmp_path: Path) -> Path:
    """Runs folder of a run that was killed: no DONE, no summary, its states at steps 10 and 12."""
    shutil.copytree(whole.run_dir.parents[2], tmp_path / "runs")
    run_dir = next((tmp_path / "runs").rglob("DONE")).parent
    for name in ("DONE", "summary.json"):
        (run_dir / name).unlink()
    for name in ("last", "last-1"):
        state = torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert state["global_step"] == {"last": 12, "last-1": 10}[name]
    return tmp_path / "runs"


def same(run: Result, other: Result) -> None:
    assert run.log == other.log
    for name in ("last", "best"):
        ours, theirs = (
            torch.load(r.run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
            for r in (run, other)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# Damaged checkpoints


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"")], ids=["flip", "cut", "empty"])
def test_a_damaged_newest_state_is_reported_and_the_one_before_is_used(damage, stopped: Path, whole: Result) -> None:
    (path,) = stopped.rglob("last.ckpt")
    damage(path)
    resumed = train(stopped, *OPTIONS, steps=STEPS)
    assert resumed.code == 0, resumed.err
    assert resumed.err.startswith(f"warning: {path}: ")
    assert resumed.err.rstrip().endswith("going on from last-1.ckpt, step 10")
    assert resumed.err.count("\n") == 1
    same(resumed, whole)


def test_without_a_usable_state_the_run_says_so_and_changes_nothing(stopped: Path) -> None:
    for path in stopped.rglob("last*.ckpt"):
        flip(path)
    before = {path: path.read_bytes() for path in stopped.rglob("*.ckpt")}
    result = train(stopped, *OPTIONS, steps=STEPS)
    assert result.code == 2
    assert result.err.startswith("error: no usable checkpoint: ")
    assert "last.ckpt" in result.err
    assert "last-1.ckpt" in result.err
    assert result.err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in stopped.rglob("*.ckpt")}


def test_a_damaged_best_is_found_before_training_goes_on(stopped: Path) -> None:
    (path,) = stopped.rglob("best.ckpt")
    flip(path)
    result = train(stopped, *OPTIONS, steps=STEPS)
    assert result.code == 2
    assert result.err.startswith(f"error: checkpoint {path}: checksum of ")


def test_every_flipped_bit_that_matters_is_found(tmp_path: Path) -> None:
    path, tensor = tmp_path / "x.ckpt", torch.arange(500)
    write_checkpoint(path, {"state_dict": {"a": tensor}, "global_step": 3})
    whole = path.read_bytes()
    assert find_damage(path) == ""
    found = 0
    for position in range(0, len(whole), 7):
        content = bytearray(whole)
        content[position] ^= 16
        path.write_bytes(content)
        if find_damage(path):
            found += 1
            continue
        with contextlib.suppress(RuntimeError):  # refused by torch, which is as good
            assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["a"], tensor)
    assert found > 0.8 * len(range(0, len(whole), 7))


def test_states_step_back_and_no_more_are_kept_than_asked_for(tmp_path: Path) -> None:
    for step in range(5):
        write_checkpoint(tmp_path / "last.ckpt", {"global_step": step}, keep=3)
    kept = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.iterdir()}
    assert kept == {"last.ckpt": 4, "last-1.ckpt": 3, "last-2.ckpt": 2}
    state, damaged = newest_state(tmp_path)
    assert state is not None
    assert (state.step, damaged) == (4, {})
    (tmp_path / "last.ckpt").unlink()  # a crash between two renames
    state, damaged = newest_state(tmp_path)
    assert state is not None
    assert (state.step, damaged) == (3, {})


def test_done_holds_checksums_of_the_results(whole: Result) -> None:
    command = ["sha256sum", "--check", "DONE"]
    checked = subprocess.run(command, cwd=whole.run_dir, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert {"summary.json: OK", "checkpoints/best.ckpt: OK"} <= set(checked.stdout.splitlines())


# Disks


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Lets the system itself refuse to write more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_refuses_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, {"a": torch.zeros(10), "global_step": 1}, keep=2)
    with largest_file(20_000), pytest.raises(WriteError, match=r"cannot write .*last.ckpt: File too large"):
        write_checkpoint(path, {"a": torch.zeros(100_000), "global_step": 2}, keep=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["global_step"] == 1


def test_a_run_whose_disk_fills_up_keeps_its_last_state_and_goes_on_later(
    whole: Result, tmp_path: Path, at, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        at(7, lambda trainer: patch.setattr(os, "fsync", full))
        result = train(tmp_path, *OPTIONS, steps=STEPS)
        patch.setattr(os, "fsync", fsync)
    assert result.code == 1
    (path,) = tmp_path.rglob("last.ckpt")
    assert result.err.startswith("error: cannot write ")
    assert "No space left on device; free space there" in result.err
    assert result.err.count("\n") == 1
    assert not list(tmp_path.rglob("DONE"))
    assert torch.load(path, weights_only=True)["global_step"] == 5
    at(-1, None)
    resumed = train(tmp_path, *OPTIONS, steps=STEPS)
    assert resumed.code == 0, resumed.err
    same(resumed, whole)


def _train_on_small_disks(folder: str, words: list[str]) -> None:
    """Three times on a tmpfs, which is seen by this process alone: too small, read-only, and large enough."""
    torch.set_num_threads(1)
    system = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if system.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        sys.exit(SKIP)
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(line)
    for options in ("size=150k", "remount,ro", "remount,rw,size=20m"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
        print("exit", main("train", [f"paths.runs={folder}/runs", *words]), file=sys.stderr)


def test_a_real_full_disk_and_a_read_only_one(tmp_path: Path) -> None:
    """A small tmpfs of our own, in a mount namespace that ends with the test."""
    words = ["logger.mode=disabled", "task.control=false", "trainer.max_steps=20", "checkpoint.every_n_steps=2"]
    words += ["checkpoint.keep=9", "figures=false"]
    disk, logs = tmp_path / "disk", tmp_path / "logs"
    disk.mkdir()
    logs.mkdir()
    ended = forked.run(_train_on_small_disks, [str(disk), words], logs, {})
    if ended.returncode == SKIP:
        pytest.skip("this system lets nobody mount a file system of their own")
    lines = [line for line in ended.stderr.splitlines() if line.startswith(("error", "exit"))]
    assert lines[0].startswith("error: cannot write "), ended.stderr[-2000:]
    assert "No space left on device; free space there" in lines[0]
    assert lines[1] == "exit 1"
    assert "Read-only file system; make it writable" in lines[2]
    assert lines[3:] == ["exit 2", "exit 0"], ended.stderr[-2000:]


def test_a_run_directory_that_disappears_ends_the_run_and_does_not_come_back_empty(tmp_path: Path, at) -> None:
    at(7, lambda trainer: shutil.rmtree(trainer.default_root_dir))
    result = train(tmp_path, *OPTIONS, steps=STEPS)
    assert result.code == 1
    assert result.err.startswith("error: cannot write ")
    assert "the run directory has gone" in result.err
    assert not result.run_dir.exists()


def test_a_clock_that_jumps_changes_nothing(whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, -(10**9), -4321))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    result = train(tmp_path, *OPTIONS, "checkpoint.every_minutes=100", steps=STEPS)
    assert result.code == 0, result.err
    same(result, whole)


def test_states_are_saved_by_time(tmp_path: Path) -> None:
    options = ("task.control=false", "checkpoint.every_minutes=1e-9", "checkpoint.keep=20")
    result = train(tmp_path, *options, steps=6)
    assert result.code == 0, result.err
    assert len(list(result.run_dir.rglob("last*.ckpt"))) == 6


# Two processes


def _hold(run_dir: str, connection) -> None:
    with RunLock(Path(run_dir)):
        connection.send("held")
        connection.recv()
        if os.fork() == 0:  # what a loader's worker is
            time.sleep(3)
            os._exit(0)
        connection.send("forked")
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(permlab.record.lock, "PATIENCE_SECONDS", 0.1)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(str(tmp_path), theirs))
    process.start()
    assert ours.recv() == "held"
    yield process, ours
    process.kill()
    process.join()


def test_a_second_process_is_refused_with_pid_and_host_of_the_first(holder, tmp_path: Path) -> None:
    process, _ = holder
    with pytest.raises(LockedError, match=rf"process {process.pid} on {socket.gethostname()} is at work in") as caught:
        RunLock(tmp_path).__enter__()
    assert caught.value.exit_code == 2


def test_the_lock_of_a_killed_process_is_taken_over_though_its_child_lives(holder, tmp_path: Path) -> None:
    process, connection = holder
    connection.send("fork")
    assert connection.recv() == "forked"
    process.kill()
    process.join()
    assert (tmp_path / "LOCK").is_file()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "LOCK").exists()


def test_a_shared_run_is_waited_for(holder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process, _ = holder
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    previous = signal.signal(signal.SIGALRM, lambda *_: process.kill())
    try:
        with RunLock(tmp_path, wait=True):
            assert f"waiting for process {process.pid}" in capsys.readouterr().out
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_another_hosts_lock_counts_while_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permlab.record.lock, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(permlab.record.lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(permlab.record.lock, "DEAD_SECONDS", 0.5)
    path, beats = tmp_path / "LOCK", iter(range(1000))
    path.write_text(json.dumps({"pid": 7, "host": "elsewhere", "beat": -1}))
    read = os.pread
    living = lambda *_: json.dumps({"pid": 7, "host": "elsewhere", "beat": next(beats)}).encode()  # noqa: E731
    monkeypatch.setattr(os, "pread", living)
    with pytest.raises(LockedError, match=r"process 7 on elsewhere .* if that process is dead, delete .*LOCK"):
        RunLock(tmp_path).__enter__()
    monkeypatch.setattr(os, "pread", read)
    with RunLock(tmp_path):
        pass


def test_the_second_of_two_runs_exits_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(self: RunLock) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"pid": 11, "host": "node7", "started": "today"}))
        return False

    monkeypatch.setattr(permlab.record.lock, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(RunLock, "_acquire", locked)
    result = train(tmp_path, *OPTIONS)
    assert result.code == 2
    assert result.err.startswith("error: process 11 on node7 is at work in ")
    assert [path.name for path in result.run_dir.iterdir()] == ["LOCK"]


# Signals, accumulation, epochs


def resume_until_done(runs: Path, *options: str, steps: int) -> tuple[list[int], Result]:
    codes = []
    while True:
        result = train(runs, *options, steps=steps)
        codes.append(result.code)
        if result.code not in (130, 143):
            return codes, result


EXACT = {
    "validation": (("trainer.val_check_interval=5", "method=reorder", "data.batch_size=128"), 12, (4, 9, 11)),
    "accumulation": (("trainer.accumulate_grad_batches=3", "trainer.val_check_interval=5"), 6, (3, 4, 9, 14)),
    "epochs": (("trainer.max_epochs=2", "data.batch_size=256", "checkpoint.every_n_steps=1"), -1, (1, 3, 5)),
}


@pytest.mark.parametrize("case", EXACT)
def test_a_run_stopped_anywhere_ends_as_one_that_was_not(case: str, tmp_path: Path, monkeypatch, at) -> None:
    options, steps, batches = EXACT[case]
    options = ("task.control=false", "trainer.log_every_n_steps=1", *options)
    expected = train(tmp_path / "whole", *options, steps=steps)
    assert expected.code == 0, expected.err
    assert [line["step"] for line in expected.metrics] == sorted({line["step"] for line in expected.metrics})
    for batch in batches:
        at(batch, lambda trainer: signal.raise_signal(signal.SIGTERM))
        codes, resumed = resume_until_done(tmp_path / str(batch), *options, steps=steps)
        assert codes == [143, 0], resumed.err
        same(resumed, expected)


@pytest.mark.parametrize("stage", ["begin", "test", "figures"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_or_after_training_ends_the_run(
    stage: str, number: int, code: int, tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        signal.raise_signal(number)

    where = {
        "begin": (permlab.task.classify.learner.ClassifyLearner, "prepare"),
        "test": (permlab.run.trainer, "run_test"),
        "figures": (permlab.run.story, "draw_all"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[stage], stop)
        result = train(tmp_path, *OPTIONS, "figures=true", steps=STEPS)
    assert result.code == code
    assert result.err == f"error: interrupted by signal {number}; the same command goes on from here\n"
    assert not (result.run_dir / "DONE").exists()
    assert not (result.run_dir / "FAILED").exists()
    resumed = train(tmp_path, *OPTIONS, steps=STEPS)
    assert resumed.code == 0, resumed.err
    same(resumed, whole)


def test_a_signal_that_a_library_takes_for_an_error_is_an_interruption(
    tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a drawing does whose callback is called from C."""

    def draw(run_dir: Path) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ValueError("invalid matrix") from error

    with monkeypatch.context() as patch:
        patch.setattr(permlab.run.story, "draw_all", draw)
        result = train(tmp_path, *OPTIONS, "figures=true", steps=STEPS)
    assert result.code == 143, result.err
    assert not (result.run_dir / "FAILED").exists()
    resumed = train(tmp_path, *OPTIONS, steps=STEPS)
    assert resumed.code == 0, resumed.err
    same(resumed, whole)


@pytest.mark.alone
def test_workers_outlive_a_signal_that_everyone_gets(tmp_path: Path, at, whole: Result) -> None:
    """As SLURM sends it: the workers have it before the run has saved."""

    def everyone(trainer: L.Trainer) -> None:
        for child in multiprocessing.active_children():
            subprocess.run(["kill", "-TERM", str(child.pid)], check=True)  # not from their parent, who may end them
        time.sleep(0.2)
        signal.raise_signal(signal.SIGTERM)

    at(1, everyone)
    result = train(tmp_path, *OPTIONS, "data.num_workers=2", steps=STEPS)
    assert result.code == 143, result.err
    at(-1, None)
    resumed = train(tmp_path, *OPTIONS, "data.num_workers=2", steps=STEPS)
    assert resumed.code == 0, resumed.err
    same(resumed, whole)


def test_the_checkpoint_section_is_no_part_of_a_runs_name_and_is_checked(tmp_path: Path, capsys) -> None:
    names = {train(tmp_path, "task.control=false", word).run_dir for word in ("checkpoint.keep=3", "seed=0")}
    assert len(names) == 1
    for word in ("checkpoint.every_n_steps=0", "checkpoint.every_minutes=-1", "checkpoint.keep=0", "checkpoint.kep=1"):
        assert main("train", [word]) == 2
        assert capsys.readouterr().err.startswith(f"error: {word}")


def test_metrics_go_on_with_the_line_that_a_kill_left(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.update(1, {"a": 1.0})
    MetricsFile(tmp_path / "metrics.jsonl").update(1, {"b": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 1.0, "b": "nan"}\n'
