"""What a method is given of the training data before training, and what becomes of an order that it finds there."""

import numpy as np
import pytest
import torch
from runs import SHORT, assemble, configure, train

from permlab.data.module import DataModule
from permlab.errors import ConfigError
from permlab.method.training_items import TrainingItems

SEARCH = ("method=ridge_search", "method.num_swaps=300")


def test_a_found_order_is_trained_refitted_and_kept(tmp_path) -> None:
    from permlab.cli import main

    result = train(tmp_path, *SEARCH, steps=3)
    assert result.code == 0, result.err
    with np.load(result.run_dir / "arrays" / "order.npz") as arrays:
        start, found = arrays["start_order"], arrays["order"]
    assert start.tolist() == list(range(64))
    assert sorted(found.tolist()) == list(range(64))
    assert found.tolist() != start.tolist()
    # Nothing of the order is learned on the way, so the fresh model under it is trained alike.
    assert result.summary["test/accuracy_refit"] == result.summary["test/accuracy"]
    best = torch.load(result.run_dir / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert best["method.found"].tolist() == found.tolist()
    assert main("eval", [f"run={result.run_dir}"]) == 0


def test_training_images_alone_are_drawn_as_they_are_embedded(monkeypatch) -> None:
    parts = assemble(configure([*SHORT, "model=vit_nano"]))
    asked, given = [], {}
    sample = DataModule.sample
    monkeypatch.setattr(DataModule, "sample", lambda self, *words: asked.append(words) or sample(self, *words))

    def look(training: TrainingItems) -> None:
        given["items"], given["labels"] = training.draw(40)

    monkeypatch.setattr(parts.method, "prepare", look)
    parts.model.train()
    parts.learner.prepare(parts.data, {})
    assert parts.model.training
    assert asked == [("train", 40)]
    images, labels = (torch.cat(part) for part in zip(*parts.data.sample("train", 40), strict=True))
    torch.testing.assert_close(given["items"], parts.model.eval().embed(images))
    assert torch.equal(given["labels"], labels)


def test_a_method_that_does_not_look_reads_no_data(monkeypatch) -> None:
    parts = assemble(configure([*SHORT, "method=sinkhorn_ste"]))
    monkeypatch.setattr(DataModule, "sample", lambda *_: pytest.fail("data was read"))
    parts.learner.prepare(parts.data, {})


def test_too_few_images_are_one_line() -> None:
    parts = assemble(configure([*SHORT, *SEARCH, "method.num_images=3", "method.num_folds=4"]))
    with pytest.raises(ConfigError, match=r"num_folds=4: expected 2 to 3"):
        parts.learner.prepare(parts.data, {})
