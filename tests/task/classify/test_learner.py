"""The classification loss: policy term, distillation, groups of the optimiser, freezing."""

import copy
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from runs import SHORT, assemble, configure, train
from scipy.stats import kendalltau

from permlab.config.build import build
from permlab.config.check import plan_of
from permlab.config.compose import resolve_train
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError
from permlab.permutation import permute
from permlab.record.stored import read_arrays, read_plan
from permlab.run.companion import companion_plan
from permlab.task.classify.learner import ClassifyLearner
from permlab.task.classify.teacher import TimmTeacher, load_teacher

SPEC = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)


def task_of(*overrides: str) -> ClassifyLearner:
    config = configure([*SHORT, *overrides])
    parts = assemble(config)
    return parts.learner


def attach(task: ClassifyLearner) -> ClassifyLearner:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(task)
    task.trainer = trainer
    return task.train()


def batch(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 10


@pytest.mark.parametrize("method", ["fixed", "sinkhorn_ste", "sort_softmax"])
def test_without_a_law_the_loss_is_cross_entropy(method: str) -> None:
    task = attach(task_of(f"method={method}"))
    images, labels = batch()
    items = task.model.embed(images)
    expected = F.cross_entropy(task.model.read(permute(items, task.method(items))), labels)
    torch.testing.assert_close(task.training_step((images, labels), 0), expected)


@pytest.mark.parametrize("granularity", ["batch", "image"])
def test_the_policy_gradient_is_the_published_estimator(granularity: str) -> None:
    """Against the score function written out sample by sample, with a leave-one-out baseline."""
    options = ("method=reorder", "method.num_samples=3", f"method.granularity={granularity}", "method.temperature=0.4")
    task = attach(task_of(*options))
    images, labels = batch()
    items = task.model.embed(images)
    sample = task.method(items, generator=task._noise(0))
    rewards = torch.stack(
        [
            -F.cross_entropy(task.model.read(items.gather(1, _index(order, items))), labels, reduction="none").detach()
            for order in sample.order
        ]
    )
    if granularity == "batch":
        rewards = rewards.mean(1, keepdim=True)
    total = 0.0
    for k in range(3):
        baseline = (rewards.sum(0) - rewards[k]) / 2
        total = total - ((rewards[k] - baseline) * sample.log_prob[k]).mean() / 3
    (expected,) = torch.autograd.grad(total, list(task.method.parameters()))
    task.training_step((images, labels), 0).backward()
    (parameter,) = task.method.parameters()
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def _index(order: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    return order.expand(len(items), -1).unsqueeze(-1).expand_as(items)


def test_policy_weight_scales_the_policy_alone() -> None:
    gradients = {}
    for weight in (1.0, 2.0):
        task = attach(task_of("method=reorder", f"task.policy_weight={weight}"))
        task.training_step(batch(), 0).backward()
        gradients[weight] = [p.grad.clone() for p in (*task.method.parameters(), *task.model.parameters())]
    torch.testing.assert_close(gradients[2.0][0], 2 * gradients[1.0][0])
    torch.testing.assert_close(gradients[2.0][1:], gradients[1.0][1:])


@pytest.mark.parametrize("model", ["vit_nano", "vim_nano", "arm_nano", "txl_nano", "longformer_nano"])
def test_positions_jump_from_slots_to_items_when_the_policy_starts(model: str) -> None:
    """As REOrder's released code does: the table is added without the order until there is one to learn."""
    options = (f"model={model}", "model.patch_size=2", "model.position=item", "method=reorder", "method.order=column")
    jumps, stays = (
        attach(task_of(*options, "method.warmup_fraction=0.5", f"task.warmup_position={where}")).eval()
        for where in ("slot", "same")
    )
    stays.load_state_dict(jumps.state_dict())
    images, order, net = batch()[0], jumps.method.start_order, jumps.model
    name, front, _ = net.item_positions
    table = getattr(net, name).detach().reshape(-1, net.num_features)[front : front + net.num_items]
    patches = net.embed(images) - table
    by_slot, by_item = (net.head(net.encode(x)) for x in (patches[:, order] + table, (patches + table)[:, order]))
    assert (by_slot - by_item).abs().max() > 1e-4
    for step, expected in ((0, by_slot), (4, by_slot), (5, by_item), (9, by_item)):
        jumps.num_steps = stays.num_steps = 10
        jumps.advance(step)
        stays.advance(step)
        torch.testing.assert_close(jumps.predict(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stays.predict(images), by_item, rtol=1e-4, atol=1e-5)


def test_a_jump_needs_a_table_that_moves() -> None:
    for model, position, message in (("vim_nano", "none", "not none"), ("llama_nano", "item", "Llama has no table")):
        options = (f"model={model}", f"model.position={position}", "task.warmup_position=slot")
        with pytest.raises(ConfigError, match=f"^task.warmup_position=slot: needs model.position=item; {message}"):
            task_of(*options)


RELEASED = (
    *("method=reorder", "model=vim_nano", "optim.schedule=cosine", "optim.hold_fraction=0.45"),
    *("optim.warmup_fraction=0.05", "method.warmup_fraction=0.15"),
)


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("task.control_schedule=without_hold", "optim.hold_fraction", 0.0),
        ("task.warmup_position=slot", "model.position", "slot"),
    ],
)
def test_a_defect_of_the_control_changes_one_key_of_it_and_nothing_of_the_refit(option, key, value) -> None:
    found = {}
    for words in (RELEASED, (*RELEASED, option)):
        plan = plan_of(configure([*SHORT, *words]))
        beside = plan.task.beside(plan, {"order": torch.arange(64)})
        found[words] = {name: companion_plan(plan, each) for name, each in beside.items()}
    fair, unfair = found.values()
    group, name = key.split(".")
    assert fair["refit"].digest == unfair["refit"].digest
    assert fair["control"].digest != unfair["control"].digest
    config = copy.deepcopy(fair["control"].config)
    assert config[group][name] != value
    config[group][name] = value
    assert plan_of(config).digest == unfair["control"].digest


def test_label_smoothing_changes_the_loss() -> None:
    plain, smooth = (attach(task_of(f"task.label_smoothing={value}")).training_step(batch(), 0) for value in (0, 0.3))
    assert not torch.isclose(plain, smooth)


def test_the_optimiser_has_one_group_for_each_kind_of_parameter() -> None:
    task = attach(task_of("method=sinkhorn_ste", "model=vit_nano", "optim.weight_decay=0.1", "method.lr=0.007"))
    task.trainer.fit_loop.max_epochs, task.trainer.fit_loop.epoch_loop.max_steps = -1, 10
    optimizer = task.configure_optimizers()["optimizer"]
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["permutation"]["weight_decay"] == groups["model_no_decay"]["weight_decay"] == 0
    assert groups["model"]["weight_decay"] == 0.1
    assert groups["permutation"]["initial_lr"] == 0.007
    assert all(parameter.ndim >= 2 for parameter in groups["model"]["params"])
    counted = sum(parameter.numel() for group in groups.values() for parameter in group["params"])
    assert counted == sum(parameter.numel() for parameter in task.parameters())


def test_a_frozen_method_does_not_move(tmp_path) -> None:
    """Adam's momentum would move it if its gradient were zero and not absent."""
    options = (
        "trainer.val_check_interval=4",
        "trainer.log_every_n_steps=1",
        "method.freeze_fraction=0.5",
        "method.lr=0.3",
    )
    result = train(tmp_path, *options, "task.control=false", steps=16)
    kendall = [line["permutation/kendall"] for line in result.metrics]
    entropy = [line["permutation/entropy"] for line in result.metrics]
    assert len(set(kendall[8:])) == len(set(entropy[8:])) == 1
    assert len(set(entropy[:8])) > 1


# Labels that say nothing


def test_an_order_learned_from_shuffled_labels_is_tried_on_true_ones(tmp_path) -> None:
    """The comparisons are those of the run with true labels, but for the order of `refit`."""
    null = train(tmp_path, "data.shuffle_labels=true", "optim.lr=0.1", steps=60)
    plan = resolve_train(null.where)[0]
    order = read_arrays(null.run_dir / "arrays" / "order.npz")
    assert null.code == 0, null.err
    beside = {name: companion_plan(plan, other) for name, other in plan.task.beside(plan, order).items()}
    assert list(beside) == ["control", "refit"]
    for name, other in beside.items():
        stored = read_plan(other.directory)
        true, used = (build("data", config["data"]) for config in (configure(SHORT), stored.config))
        assert torch.equal(used.dataset("train", 0).labels, true.dataset("train", 0).labels), name
    used = build("data", null.config["data"])
    assert not torch.equal(used.dataset("train", 0).labels, true.dataset("train", 0).labels)
    plain = resolve_train([word for word in null.where if "shuffle" not in word])[0]
    control = plain.task.beside(plain, {})["control"]
    assert companion_plan(plain, control).directory == beside["control"].directory, "it is shared with the true run"
    accuracies = [null.summary[f"test/accuracy{name}"] for name in ("", "_control", "_refit")]
    assert accuracies[0] < 0.2 < 0.25 < min(accuracies[1:]), accuracies


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=fixed"], "data.shuffle_labels=true: method=fixed learns no order"),
        (["task.teacher=timm/resnet10t", "task.distill_weight=1"], "data.shuffle_labels=true: task.teacher=timm"),
        (["task=probe"], "data.shuffle_labels=true: task=probe learns no order"),
    ],
)
def test_shuffled_labels_are_refused_where_they_are_no_null_experiment(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_train([*words, "data.shuffle_labels=true"])


# A hidden order


def test_read_in_the_true_order_shuffled_images_are_the_images(tmp_path) -> None:
    """The truth is told as found, forwards and backwards, and what a model makes of it is what it makes of digits."""
    words = ("method=fixed", "trainer.log_every_n_steps=10")
    plain = train(tmp_path, *words, "data=digits", steps=20)
    truth = build("data", configure(["data=shuffled_digits"])["data"]).truth().tolist()
    orders = {"true": truth, "reverse": truth[::-1], "row": "row"}
    found = {
        name: train(tmp_path, *words, "data=shuffled_digits", f"method.order={order}", steps=20).summary
        for name, order in orders.items()
    }
    assert found["true"]["test/loss"] == plain.summary["test/loss"] != found["row"]["test/loss"]
    assert not [key for key in plain.summary if key.startswith("truth/")]
    for name in ("true", "reverse"):
        assert found[name]["truth/kendall"] == pytest.approx(1)
        assert found[name]["truth/adjacency"] == pytest.approx(56 / 63)
    rank = [truth.index(item) for item in range(64)]
    assert found["row"]["truth/kendall"] == pytest.approx(abs(kendalltau(range(64), rank).statistic), abs=1e-6)
    assert found["row"]["truth/adjacency"] < 0.2


def test_a_learned_order_is_compared_with_the_hidden_one(tmp_path) -> None:
    result = train(tmp_path, "data=shuffled_digits", "method.lr=0.3", steps=20)
    order = read_arrays(result.run_dir / "arrays" / "order.npz")["order"].tolist()
    truth = build("data", result.config["data"]).truth().tolist()
    ranks = [[one.index(item) for item in range(64)] for one in (order, truth)]
    assert order != list(range(64))
    assert result.summary["truth/kendall"] == pytest.approx(abs(kendalltau(*ranks).statistic), abs=1e-6)
    assert "neighbours that truly are" in result.out


def test_a_hidden_order_is_one_of_the_patches_that_are_read() -> None:
    with pytest.raises(ConfigError, match=r"model.patch_size=2: data=shuffled_digits has patches of 1x1 .* expected 1"):
        resolve_train(["data=shuffled_digits", "model.patch_size=2"])


# Distillation


def test_distillation_from_a_run(tmp_path) -> None:
    teacher = train(tmp_path, "model=vit_nano", "model.patch_size=4", "task.control=false", "method=fixed")
    task = attach(
        task_of(f"task.teacher={teacher.run_dir}", "task.distill_weight=0.7", "task.feature_weight=0.2", "method=fixed")
    )
    images, labels = batch()
    features = task.model.encode(task.model.embed(images))
    logits = task.model.head(features)
    with torch.no_grad():
        theirs, their_features = task.teacher[0](images)
    p, q = (theirs / 2).softmax(-1), (logits / 2).softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    mse = ((task.projection(features) - their_features) ** 2).mean()
    expected = F.cross_entropy(logits, labels) + 0.7 * 4 * divergence + 0.2 * mse
    torch.testing.assert_close(task.training_step((images, labels), 0), expected)
    assert not any("teacher" in name for name in task.state_dict())
    other = attach(task_of(f"task.teacher={teacher.run_dir}", "task.distill_weight=0.7", "task.distill_temperature=5"))
    assert not torch.isclose(other.training_step((images, labels), 0), expected)


def test_a_run_distils_end_to_end(tmp_path) -> None:
    teacher = train(tmp_path, "model=vit_nano", "model.patch_size=4", "task.control=false", "method=fixed")
    student = train(
        tmp_path,
        f"task.teacher={teacher.run_dir}",
        "task.feature_weight=1",
        "task.control=false",
        "trainer.log_every_n_steps=1",
    )
    assert student.code == 0, student.err
    assert student.metrics[0]["train/feature"] > 0


def test_a_timm_teacher_resizes_and_gives_features() -> None:
    teacher = TimmTeacher("resnet10t", SPEC, pretrained=False).eval()
    logits, features = teacher(torch.rand(2, 1, 8, 8))
    assert logits.shape == (2, 1000)
    torch.testing.assert_close(teacher.model.get_classifier()(features), logits)


def test_a_teacher_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="nearest valid choice: resnet18"):
        load_teacher("timm/resnet188", SPEC)


def test_soft_targets_need_the_same_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = TimmTeacher("resnet10t", SPEC, pretrained=False).eval()
    monkeypatch.setattr("permlab.task.classify.learner.load_teacher", lambda name, spec: teacher)
    with pytest.raises(ConfigError, match="1000 classes, the data has 10"):
        task_of("task.teacher=timm/resnet10t", "task.distill_weight=1")


def test_calibration_error_and_top5_against_numpy(tmp_path) -> None:
    result = train(tmp_path, "task.control=false", "model=vit_nano", "model.patch_size=4", steps=10)
    config = copy.deepcopy(result.config)
    parts = assemble(config)
    state = torch.load(result.run_dir / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    parts.model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    parts.method.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("method.")})
    images, labels = build("data", config["data"]).dataset("test", 0).__getitems__(range(360))
    with torch.no_grad():
        logits = parts.model.eval().read(parts.model.embed(images)[:, parts.method.best()])
    confidence, predicted = logits.softmax(-1).max(-1)
    right = (predicted == labels).double()
    error = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            error += inside.double().mean() * (right[inside].mean() - confidence[inside].mean()).abs()
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean()
    assert result.summary["test/accuracy"] == pytest.approx(right.mean().item(), abs=1e-6)
    assert result.summary["test/accuracy_top5"] == pytest.approx(top5.item(), abs=1e-6)
    assert result.summary["test/calibration_error"] == pytest.approx(float(error), abs=1e-5)
    assert math.isclose(result.summary["test/loss"], F.cross_entropy(logits, labels).item(), rel_tol=1e-4)
