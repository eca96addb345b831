"""Kernels in several threads: the same results as in one, and no waiting for a thread that does not come."""

import multiprocessing
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from permlab.ops import threads
from permlab.ops.sinkhorn import sinkhorn

# Threads of other processes would be taken for a crowd.
pytestmark = pytest.mark.alone
needs_openmp = pytest.mark.skipif(threads._openmp() is None, reason="torch has no OpenMP here")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Recording:
    """OpenMP's threads, noting the teams they were called in."""

    def __init__(self) -> None:
        self.teams: set[tuple[int, int]] = set()
        self.openmp = threads._openmp()

    def run(self, part: Callable[[int, int], None], num_threads: int) -> None:
        def noted(thread: int, team: int) -> None:
            self.teams.add((thread, team))
            part(thread, team)

        assert self.openmp is not None
        self.openmp.run(noted, num_threads)


def relax(scores: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    learned = scores.clone().requires_grad_()
    matrix = sinkhorn(learned, temperature=temperature, num_iters=20)
    matrix.backward(scores.cos())
    assert learned.grad is not None
    return matrix.detach(), learned.grad


@needs_openmp
@pytest.mark.parametrize("temperature", [1.0, 0.1, 1e-3])  # the last by logarithms
@pytest.mark.parametrize("n", [229, 512])
def test_a_team_on_one_matrix_computes_what_one_thread_does(
    n: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    openmp = Recording()
    monkeypatch.setattr(threads, "_openmp", lambda: openmp)
    monkeypatch.setattr(threads, "_CROWD", threads._Crowd())
    together = relax(scores, temperature)
    assert openmp.teams == {(0, 2), (1, 2)}
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    for ours, expected in zip(together, relax(scores, temperature), strict=True):
        assert torch.equal(ours, expected), "whoever computes it, the bits are the same"
    torch.set_num_threads(1)
    for ours, expected in zip(together, relax(scores, temperature), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_after_waiting_for_each_other_threads_work_alone_for_a_while() -> None:
    crowd = threads._Crowd(max_pauses=3, least=2, most=4)
    tried = []
    for pauses in (0, 9, 9, 9, 0, 9):
        tried.append([crowd.is_clear() for _ in range(6)].index(True))
        crowd.note(pauses, 0.001)
    assert tried == [0, 0, 2, 4, 4, 0]
    crowd = threads._Crowd()
    crowd.note(90, 0.1)
    assert crowd.is_clear(), "few pauses for so long a call"


@pytest.mark.parametrize("bad", [float("nan"), -float("nan")])
def test_nan_in_one_threads_rows_reaches_the_other(bad: float) -> None:
    scores = torch.zeros(512, 512)
    scores[500, 3] = bad
    assert sinkhorn(scores, temperature=1.0, num_iters=20).isnan().all()


def test_a_column_without_a_finite_score_is_found_whichever_thread_has_its_rows() -> None:
    scores = torch.zeros(512, 512)
    scores[:, 7] = -torch.inf
    with pytest.raises(ValueError, match="column"):
        sinkhorn(scores, temperature=1.0, num_iters=20)


def test_a_thread_that_does_not_come_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        """A team of which one thread was kept away, as by the exception of a signal."""

        def run(self, part: Callable[[int, int], None], num_threads: int) -> None:
            part(1, num_threads)

    scores = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    expected = relax(scores, 0.1)
    monkeypatch.setattr(threads, "_openmp", lambda: Alone())
    monkeypatch.setattr(threads, "_CROWD", threads._Crowd())
    for ours, theirs in zip(relax(scores, 0.1), expected, strict=True):
        assert torch.equal(ours, theirs)


@needs_openmp
def test_an_exception_in_any_thread_is_raised() -> None:
    def fail(thread: int, team: int) -> None:
        if thread == 1:
            raise KeyError("of thread 1")

    openmp = threads._openmp()
    assert openmp is not None
    with pytest.raises(KeyError, match="of thread 1"):
        openmp.run(fail, 2)


@pytest.mark.parametrize("openmp", [True, False])
def test_every_task_is_run_once(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_CAN_USE_OPENMP", openmp)
    done: list[int] = []
    threads.run_tasks(lambda first, last: done.extend(range(first, last)), 1000, 2**30)
    assert sorted(done) == list(range(1000))


def _report(scores: Tensor, pipe) -> None:
    # No operation of torch that takes several threads: it would wait for those of the parent.
    pipe.send((threads._CAN_USE_OPENMP, sinkhorn(scores, temperature=0.1, num_iters=20).numpy()))


def test_a_forked_process_leaves_openmp_alone() -> None:
    scores = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    expected = sinkhorn(scores, temperature=0.1, num_iters=20)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(scores, sender))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        trusted, matrix = receiver.recv()
    finally:
        child.kill()
        child.join()
    assert not trusted
    torch.testing.assert_close(torch.from_numpy(matrix), expected)
