"""Next-token prediction: the dense model that pruning starts from."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from runs import assemble, configure, train

from permlab.cli import main
from permlab.task.lm.learner import LmLearner

TEXT = ("task=lm", "data.sequence_length=32", "num_threads=1")


def task_of(*overrides: str) -> LmLearner:
    config = configure([*TEXT, *overrides])
    parts = assemble(config)
    task = parts.learner
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(task)
    task.trainer = trainer
    return task.train()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_cross_entropy_of_the_next_token(smoothing: float) -> None:
    task = task_of(f"task.label_smoothing={smoothing}")
    tokens = torch.randint(256, (3, 33))
    logits = task.model(tokens[:, :-1])
    expected = F.cross_entropy(logits.reshape(-1, 256), tokens[:, 1:].reshape(-1), label_smoothing=smoothing)
    found = task.training_step((tokens[:, :-1], tokens[:, 1:]), 0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(task.predict(tokens[:, :-1]), logits)


def test_the_loss_falls_on_a_repeated_text() -> None:
    task = task_of()
    text = torch.tensor(list(b"the same words over and over; " * 3))[:66].view(2, 33)
    batch = text[:, :-1], text[:, 1:]
    optimizer = torch.optim.Adam(task.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = task.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5
    assert losses[-1] < 0.3 * losses[0]


def test_a_run_is_judged_by_perplexity(tmp_path) -> None:
    result = train(tmp_path, *TEXT, "trainer.val_check_interval=3", "trainer.log_every_n_steps=1", steps=6)
    assert result.code == 0, result.err
    summary = result.summary
    assert summary["test/perplexity"] == pytest.approx(torch.tensor(summary["test/loss"]).exp().item(), rel=1e-5)
    best = min(line["val/perplexity"] for line in result.metrics if "val/perplexity" in line)
    assert summary["val/perplexity"] == pytest.approx(best)
    assert result.metrics[-1]["train/loss"] < result.metrics[0]["train/loss"]
    assert f"test perplexity, 1 seed: {summary['test/perplexity']:.4g} (order row, fixed)" in result.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=sinkhorn_ste"], "method=sinkhorn_ste: task=lm has no place for it; nearest valid choice: fixed"),
        (["method=reorder"], "nearest valid choice: fixed"),
        (["data=digits"], "task=lm: takes text data, but data=digits is image; valid choices: "),
        (["model=vit_nano"], "model=vit_nano: reads image data"),
        (["method.order=random(1)"], "task=lm: method.order permutes the tokens"),
    ],
)
def test_what_has_no_place_in_it_is_refused(words: list[str], message: str, tmp_path, capsys) -> None:
    assert main("train", [*TEXT, f"paths.runs={tmp_path / 'runs'}", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "runs").exists()
