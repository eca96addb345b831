"""Settings without effect are a warning; what the rules say is true; every key is documented."""

import re

import pytest

from permlab.config.compose import resolve_train
from permlab.config.reference import PAGE, page
from permlab.config.schema import (
    COMPONENT_GROUPS,
    GROUPS,
    class_name,
    component_options,
    component_path,
    components,
    is_component,
    schema,
)
from permlab.option import Range, class_constant, describe

CASES = [
    (["method=sinkhorn", "method.width=3"], "method.width=3 has no effect with method.cost=table"),
    (["method=sinkhorn", "method.start=zero", "method.start_scale=2"], "method.start_scale=2 has no effect"),
    (["method=sinkhorn", "method.start=random", "method.jitter=0.2"], "method.jitter=0.2 has no effect"),
    (["method=sort_ste", "method.width=3"], "method.width=3 has no effect with method.scorer=vector"),
    (["method=sort_ste", "method.surrogate=product", "method.power=3"], "method.power=3 has no effect"),
    (["method=reorder", "method.baseline_momentum=0.5"], "has no effect with method.baseline=leave_one_out"),
    (["method=sinkhorn", "task.policy_weight=2"], "task.policy_weight=2 has no effect with method=sinkhorn"),
    (["task.distill_temperature=3"], "task.distill_temperature=3 has no effect with task.distill_weight=0.0"),
    (["task=prune", "task.sequence_length=8"], "task.sequence_length=8 has no effect with data=digits"),
    (["task=prune", "task.power=1"], "task.power=1 has no effect with task.pruner=wanda"),
    (["task=prune", "task.damping=1"], "task.damping=1 has no effect with task.pruner=wanda"),
    (["task=prune", "task.num_groups=2", "task.block_size=8"], "task.block_size=8 has no effect with task.num_groups="),
    (["task=prune", "task.distill_weight=0", "task.distill_kind=mse"], "task.distill_kind=mse has no effect"),
    (["task=prune", "method=fixed", "task.kl_weight=1"], "task.kl_weight=1 has no effect with method=fixed"),
    (["task=prune", "task.sites=foldable", "task.coupling=independent"], "no effect with task.sites=foldable"),
    (["task=prune", "task.sites=stream", "task.within_heads=true"], "no effect with task.sites=stream"),
    (["task=prune", "method=sinkhorn", "task.mask_backward=softmax"], "task.mask_backward=softmax has no effect"),
    (["task=prune", "optim.lr=0.1"], "optim.lr=0.1 has no effect with task=prune"),
    (["task=prune", "method=hybrid", "method.search=none", "method.num_search_swaps=9"], "num_search_swaps=9 has no"),
    (["task=lm", "data.vocab_size=300"], "data.vocab_size=300 has no effect with data.tokenizer=byte"),
    (["task=lm", "model.readout=mean"], "model.readout=mean has no effect with data=pydocs"),
    (["model=llama_nano", "model.tie_embeddings=true"], "model.tie_embeddings=True has no effect with data=digits"),
    (["model=llama_nano", "model.position=none", "model.rope_theta=9"], "model.rope_theta=9 has no effect"),
    (["optim.hold_fraction=0.5"], "optim.hold_fraction=0.5 has no effect with optim.schedule=onecycle"),
    (["task.control_schedule=without_hold"], "control_schedule=without_hold has no effect with optim.hold_fraction=0"),
    (["task.control=false", "task.control_schedule=without_hold"], "no effect with task.control=False"),
    (["model=vit_nano", "method=fixed", "task.warmup_position=slot"], "no effect with method=fixed"),
    (["trainer.max_skips=3"], "trainer.max_skips=3 has no effect with trainer.on_nonfinite=stop"),
    (["logger.mode=disabled", "logger.tags=[a]"], "has no effect with logger.mode=disabled"),
    (["logger.log_artifacts=false"], "logger.log_artifacts=False has no effect with logger.mode=offline"),
    (["experiment=prune/text", "method=swap_search"], "trainer.max_steps=60 has no effect with method=swap_search"),
    (
        ["task=prune", "task.task_weight=0", "task.kl_weight=1", "data.shuffle_labels=true"],
        "data.shuffle_labels=True has no effect with task.task_weight=0",
    ),
    (["task=prune", "method=swap_search", "data.shuffle_labels=true"], "data.shuffle_labels=True has no effect with"),
    (["data.on_corrupt=skip"], "data.on_corrupt=skip has no effect with data=digits"),
]


@pytest.mark.parametrize(("words", "expected"), CASES, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_setting_without_effect_is_named(words: list[str], expected: str) -> None:
    _, warnings = resolve_train(words)
    assert len([line for line in warnings if expected in line]) == 1, warnings


def test_what_nobody_set_is_no_warning() -> None:
    for words in ([], ["method=reorder"], ["task=prune"], ["task=lm"], ["model=llama_nano"]):
        assert resolve_train(words)[1] == []


@pytest.mark.parametrize("group", COMPONENT_GROUPS)
def test_rules_name_options_and_values_that_there_are(group: str) -> None:
    for component in components(group):
        rules = class_constant(component_path(group, component), class_name(component), "no_effect") or {}
        options = component_options(group, component)
        assert set(rules) <= set(options), component
        for other, values in rules.values():
            assert other == "kind" or other in options, component
            assert values


# Documentation


def test_the_page_of_options_is_in_step() -> None:
    assert PAGE.read_text() == page(), "run `make options`"


def test_every_option_has_a_meaning_and_every_number_a_range() -> None:
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 200
    assert [row[0] for row in rows if not row[-1].strip(" |")] == []
    numeric = [row for row in rows if re.search(r"\b(an integer|a number)\b", row[1])]
    assert [row[0] for row in numeric if not re.search(r"[<>]", row[1])] == []


def test_every_numeric_option_has_a_range() -> None:
    for group in GROUPS:
        presented = (
            [name for name in components(group) if is_component(group, name)] if group in COMPONENT_GROUPS else [None]
        )
        assert presented
        for component in presented:
            for key, option in schema(group, component).items():
                text = describe(option.type)
                assert not re.fullmatch(r"(an integer|a number)( or null)?", text), f"{group}.{key}: {text}"
    assert str(Range(gt=0)) == "> 0"
