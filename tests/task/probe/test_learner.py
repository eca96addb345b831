"""The probe: only the head learns, by features that are computed once; and pruning begins with it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import Result, assemble, configure, train
from sklearn.linear_model import LogisticRegression

from permlab.config.build import build
from permlab.config.compose import resolve_train
from permlab.errors import ConfigError
from permlab.model.vim_checkpoint import save_published
from permlab.permutation import gather_items
from permlab.run.companion import companion_plan
from permlab.task.probe.learner import ProbeLearner

VIM = ("model=vim_nano", "model.depth=1", "model.patch_size=2", "num_threads=1")
STEPS = 300


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A file of weights of the model above whose head knows so many classes."""
    folder = tmp_path_factory.mktemp("weights")

    def of(num_classes: int) -> Path:
        path = folder / f"{num_classes}.safetensors"
        if not path.is_file():
            plan = resolve_train(["task=classify", "method=fixed", *VIM])[0]
            torch.manual_seed(1)
            save_published(build("model", plan.config["model"], replace(plan.spec, num_classes=num_classes)), path)
        return path

    return of


def parts_of(*words: str) -> Any:
    parts = assemble(configure(["task=probe", *VIM, *words]))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(parts.learner)
    parts.learner.trainer = trainer
    parts.learner.train()
    return parts


def expected_logits(learner: ProbeLearner, images: torch.Tensor) -> torch.Tensor:
    items = gather_items(learner.model.embed(images), learner.method.start_order)
    return learner.model.eval().head(learner.model.encode(items))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_cross_entropy_of_a_head_that_alone_has_a_gradient(smoothing: float) -> None:
    learner = parts_of(f"task.label_smoothing={smoothing}", "model.drop_path=0.5", "method.order=column").learner
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    loss = learner.training_step((images, labels), 0)
    expected = F.cross_entropy(expected_logits(learner, images), labels, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert {name for name, p in learner.named_parameters() if p.grad is not None} == {
        "model.head.weight",
        "model.head.bias",
    }


def test_steps_on_features_are_those_on_images() -> None:
    parts = parts_of("data.batch_size=100")
    learner, images = parts.learner, list(parts.data.in_order("train"))
    before = [learner.training_step(batch, 0).item() for batch in images]
    learner.prepare(parts.data, {})
    features = list(parts.data.in_order("train"))
    assert [f.shape[1:] for f, _ in features] == [(32,)] * len(images)
    assert [learner.training_step(batch, 0).item() for batch in features] == before


def test_samples_are_drawn_by_seed_and_validation_is_whole() -> None:
    labels = {}
    for seed in (0, 0, 1):
        parts = parts_of("task.num_samples=30", f"seed={seed}")
        parts.learner.prepare(parts.data, {})
        kept = parts.data._kept
        labels.setdefault(seed, []).append(torch.cat([kept["train"].inputs.flatten(), kept["train"].labels]))
        assert (len(kept["train"]), len(kept["val"])) == (30, 360)
    assert torch.equal(*labels[0])
    assert not torch.equal(labels[0][0], labels[1][0])


def test_augmented_images_are_read_in_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of("task.num_samples=30")
    monkeypatch.setattr(parts.data.component, "augment", "flip", raising=False)
    parts.learner.prepare(parts.data, {})
    assert parts.learner.computed == {"val"}
    (inputs, labels), *_ = parts.data.train_dataloader()
    assert inputs.shape[1:] == (1, 8, 8)
    assert len(parts.data.train_dataloader().dataset) == 30
    torch.testing.assert_close(
        parts.learner.training_step((inputs, labels), 0),
        F.cross_entropy(expected_logits(parts.learner, inputs), labels),
    )


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory, weights: Callable[[int], Path]) -> Result:
    words = ("task=probe", *VIM, f"model.pretrained={weights(7)}", "optim.lr=0.1", "data.batch_size=360")
    result = train(tmp_path_factory.mktemp("runs"), *words, "trainer.val_check_interval=100", steps=STEPS)
    assert result.code == 0, result.err
    return result


def test_the_backbone_stays_and_the_head_is_nearly_as_good_as_a_regression(
    probed: Result, weights: Callable[[int], Path]
) -> None:
    state = torch.load(probed.run_dir / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    parts = parts_of(f"model.pretrained={weights(7)}")
    untouched = {name: value for name, value in parts.learner.state_dict().items() if name.startswith("model.")}
    moved = {name for name in untouched if not torch.equal(state[name], untouched[name])}
    assert moved == {"model.head.weight", "model.head.bias"}
    sets = {}
    for split in ("train", "test"):
        found = [(parts.learner._features(images), labels) for images, labels in parts.data.in_order(split)]
        sets[split] = [torch.cat(column).numpy() for column in zip(*found, strict=True)]
    oracle = LogisticRegression(C=10.0, max_iter=2000).fit(*sets["train"]).score(*sets["test"])
    chance = np.bincount(sets["test"][1]).max() / len(sets["test"][1])
    assert oracle > 3 * chance
    assert probed.summary["test/accuracy"] > oracle - 0.1


# As what pruning begins with


def before(*words: str) -> dict[str, Any]:
    plan = resolve_train(["task=prune", "data=digits", *VIM, *words])[0]
    return {name: (companion, companion_plan(plan, companion)) for name, companion in plan.task.before(plan).items()}


def test_pretrained_weights_without_a_head_for_the_classes_get_one_first(weights: Callable[[int], Path]) -> None:
    ((_, plan),) = before(f"model.pretrained={weights(7)}", "task.dense_steps=9", "seed=3").values()
    settings = plan.config
    assert settings["task"]["name"] == "probe"
    assert (settings["method"]["component"], settings["seed"], settings["trainer"]["max_steps"]) == ("fixed", 3, 9)
    assert settings["model"]["pretrained"] == str(weights(7))
    assert settings["optim"]["lr"] == resolve_train(["task=probe", *VIM])[0].config["optim"]["lr"]


def test_whole_weights_are_pruned_as_they_are_and_random_ones_are_trained(weights: Callable[[int], Path]) -> None:
    assert before(f"model.pretrained={weights(10)}") == {}
    ((_, plan),) = before().values()
    assert plan.config["task"]["name"] == "classify"
    steps = {count: resolve_train(["task=prune", *VIM, f"model.pretrained={weights(count)}"]) for count in (7, 10)}
    assert steps[7][0].config["task"]["dense_steps"] == 600
    assert steps[10][0].config["task"]["dense_steps"] is None  # as runs of whole weights have always been called


def test_what_is_pruned_is_the_probed_model(tmp_path: Path, weights: Callable[[int], Path]) -> None:
    words = ("task=prune", "data=digits", *VIM, f"model.pretrained={weights(7)}", "method=fixed", "task.dense_steps=20")
    result = train(tmp_path, *words, "task.num_samples=32")
    assert result.code == 0, result.err
    (dense,) = (tmp_path / "probe").glob("*/*/summary.json")
    summary = Result(0, "", "", dense.parent).summary
    assert result.summary["test/accuracy_dense"] == pytest.approx(summary["test/accuracy"])
    assert "dense model: trained once" in result.out


def test_a_method_has_no_place_in_it() -> None:
    with pytest.raises(ConfigError, match="task=probe has no place for it; nearest valid choice: fixed"):
        resolve_train(["task=probe", "method=sinkhorn_ste"])
