"""What every model promises, checked for every small preset found in conf/model.

A new model is one file and one YAML: nothing here names a model. A preset is checked if its name ends in
`_nano`, or it is as small as those; the kinds of data, the choices and whether the order matters are asked
of the model itself.
"""

import functools
import importlib
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from presets import without_preset

from permlab.config.build import build
from permlab.config.checkpoint import derived
from permlab.config.schema import class_name, component_options
from permlab.data.spec import DataSpec
from permlab.errors import ConfigError
from permlab.model.base import Backbone
from permlab.option import choices, matches
from permlab.sparsity.block import find_blocks

CONF = Path(__file__).resolve().parents[2] / "conf"
PRESETS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
# Parameters of a model that is checked though its name does not end in _nano.
LIMIT = 200_000
BATCH = 3


# Samples


def spec_of(kind: str, patch_size: int) -> DataSpec:
    """Small data of a kind: images twice as wide as high, so that a model which confuses the two shows."""
    if kind == "image":
        return DataSpec(kind, 5, channels=2, height=4 * patch_size, width=8 * patch_size, patch_size=patch_size)
    if kind == "text":
        return DataSpec(kind, 40, channels=1, height=1, width=12)
    pytest.fail(f"no samples of kind {kind} here: add a small one to spec_of and samples in {__file__}")


def samples(
    preset: str, kind: str, *, count: int = BATCH, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Pixels in the precision asked for, or token ids."""
    spec, generator = spec_of(kind, settings_of(preset)["patch_size"]), torch.Generator().manual_seed(seed)
    if kind == "text":
        return torch.randint(spec.num_classes, (count, spec.width), generator=generator)
    return torch.randn(count, spec.channels, spec.height, spec.width, generator=generator).to(dtype)


# Building


@functools.cache
def _composed(preset: str) -> str:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose(overrides=[f"+model={preset}", "+paths.data=data"])
        return json.dumps(OmegaConf.to_container(whole.model, resolve=True))


def settings_of(preset: str) -> dict[str, Any]:
    """The preset as plain values, its parents merged in; patches of two pixels, and no weights from elsewhere."""
    settings = {"name": preset, "component": preset} | json.loads(_composed(preset))
    if "pretrained" in settings:
        settings["pretrained"] = False if isinstance(settings["pretrained"], bool) else None
    return settings | {"patch_size": settings.get("patch_size") or 2}


def options(preset: str) -> dict[str, Any]:
    known = component_options("model", settings_of(preset)["component"])
    return {key: option.type for key, option in known.items()}


def make(preset: str, kind: str = "image", *, seed: int = 0, **changes: Any) -> Backbone:
    """The preset as it is when training begins, in evaluation mode, some options changed."""
    settings = settings_of(preset)
    spec = spec_of(kind, settings["patch_size"])
    torch.manual_seed(seed)
    patch_size = 1 if kind == "text" else settings["patch_size"]
    return build("model", settings | {"patch_size": patch_size} | changes, spec).eval()


def disturbed(model: Backbone, scale: float = 0.3) -> Backbone:
    """Every parameter moved, as training would, and far enough for every part to show; in double precision."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.double()


def model_class(preset: str) -> type[Backbone]:
    component = settings_of(preset)["component"]
    return getattr(importlib.import_module(f"permlab.model.{component}"), class_name(component))


def has_sizes(preset: str) -> bool:
    """Whether a preset says how large it is, and leaves it not to a checkpoint."""
    settings = settings_of(preset)
    return all(settings.get(option, 0) is not None for option in derived(settings["component"]))


def _is_small(preset: str) -> bool:
    if not has_sizes(preset):
        return False
    if preset.endswith("_nano"):
        return True
    with torch.device("meta"):
        model = make(preset, model_class(preset).reads[0])
    return sum(parameter.numel() for parameter in model.parameters()) < LIMIT


SMALL = [preset for preset in PRESETS if _is_small(preset)]
CASES = [(preset, kind) for preset in SMALL for kind in model_class(preset).reads]
each_case = pytest.mark.parametrize(("preset", "kind"), CASES, ids=["-".join(case) for case in CASES])


def named_choices(preset: str) -> list[dict[str, Any]]:
    """Every combination of the preset's options that are a choice between names."""
    named = {key: choices(type_) for key, type_ in options(preset).items() if choices(type_)}
    return [dict(zip(named, values, strict=True)) for values in itertools.product(*named.values())]


CHOICES = [(preset, kind, chosen) for preset, kind in CASES for chosen in named_choices(preset)]
each_choice = pytest.mark.parametrize(
    ("preset", "kind", "chosen"),
    CHOICES,
    ids=["-".join([preset, kind, *chosen.values()]) for preset, kind, chosen in CHOICES],
)


# Shapes


@each_case
def test_items_features_and_logits_have_their_shapes(preset, kind):
    model, spec = make(preset, kind), spec_of(kind, settings_of(preset)["patch_size"])
    inputs = samples(preset, kind, dtype=torch.float32)
    items = model.embed(inputs)
    assert items.shape == (BATCH, model.num_items, model.num_features), "embed gives [b, num_items, num_features]"
    assert model.num_items == model.height * model.width, "num_items is that of the grid, height x width"
    slots = (spec.width,) if kind == "text" else ()
    features = model.encode(items)
    assert features.shape[:-1] == (BATCH, *slots), "encode ends in one vector per image, or per slot of a text"
    logits = model.read(items)
    assert logits.shape == (BATCH, *slots, spec.num_classes), "read gives a logit per class, or per token of each slot"
    assert torch.equal(model.head(features), logits), "read is head(encode(items))"
    assert torch.equal(model(inputs), logits), "forward is read(embed(inputs))"


def test_every_model_has_a_preset():
    assert without_preset("model", lambda cls: isinstance(cls, type) and issubclass(cls, Backbone)) == []


def test_every_model_has_a_small_preset():
    """Without one it would go unchecked without a word."""
    every, checked = ({settings_of(preset)["component"] for preset in presets} for presets in (PRESETS, SMALL))
    assert every == checked, f"no small preset of {', '.join(every - checked)}: add conf/model/<model>_nano.yaml"


# Gradients


@each_choice
def test_a_loss_reaches_every_parameter(preset, kind, chosen):
    idle = set(disturbed(make(preset, kind, **chosen)).idle_parameters)
    for name, gradient in gradients(disturbed(make(preset, kind, **chosen)), samples(preset, kind)).items():
        assert gradient is not None, f"{name} takes no part in the logits: build it only where it does"
        reached = bool((gradient.abs() > 1e-9).any())
        assert reached != (name in idle), f"a gradient reaches {name}: {reached}; idle_parameters are {idle or 'none'}"


@each_choice
def test_gradients_are_finite_when_training_begins(preset, kind, chosen):
    for name, gradient in gradients(make(preset, kind, **chosen).double(), samples(preset, kind)).items():
        assert gradient is None or gradient.isfinite().all(), f"the gradient of {name} is not finite"


def gradients(model: Backbone, inputs: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Of a loss that tells every logit from the others."""
    logits = model(inputs)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    (logits * weight).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@each_case
def test_a_loss_reaches_every_item_through_read(preset, kind):
    model = disturbed(make(preset, kind))
    items = model.embed(samples(preset, kind)).detach().requires_grad_()
    model.read(items).square().sum().backward()
    assert (items.grad.abs().amax(-1) > 0).all(), "an item has no say in the logits of its sample"


# Precision and batches


@each_case
def test_logits_agree_in_every_precision(preset, kind):
    found = {}
    with torch.no_grad():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            logits = make(preset, kind).to(dtype)(samples(preset, kind, dtype=dtype))
            assert logits.dtype == dtype, f"a model in {dtype} gives logits in {logits.dtype}"
            assert logits.isfinite().all(), f"logits in {dtype} are not finite"
            found[dtype] = logits.double()
    size = found[torch.float64].abs().max()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        error = (found[dtype] - found[torch.float64]).abs().max() / size
        assert error < tolerance, f"logits in {dtype} are off by {error:.2g} of the largest"


@each_choice
def test_a_sample_is_read_alike_whatever_its_batch(preset, kind, chosen):
    model = disturbed(make(preset, kind, **chosen))
    inputs, others = (samples(preset, kind, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        together = model(inputs)
        for index in range(BATCH):
            one = slice(index, index + 1)
            assert _distance(model(inputs[one]), together[one]) < 1e-9, "a sample alone is read otherwise"
            mixed = torch.cat([others[:index], inputs[one], others[index:]])
            assert _distance(model(mixed)[one], together[one]) < 1e-9, "logits depend on the other samples"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# Order


def orders(num_items: int) -> dict[str, torch.Tensor]:
    """Three orders under which every item of the first half, and the last one, moves."""
    raster = torch.arange(num_items)
    shuffled = torch.randperm(num_items - 1, generator=torch.Generator().manual_seed(3))
    return {
        "reversed": raster.flip(0),
        "rolled": raster.roll(1),
        "shuffled": torch.cat([torch.tensor([num_items - 1]), shuffled]),
    }


@each_choice
def test_the_order_matters_where_the_model_says_so(preset, kind, chosen):
    model = disturbed(make(preset, kind, **chosen))
    items = model.embed(samples(preset, kind))
    with torch.no_grad():
        for name, order in orders(model.num_items).items():
            change = _distance(model.read(items), model.read(items[:, order]))
            told = "reversal_matters" if name == "reversed" else "order_matters"
            # Longformer's softmax is in single precision whatever the model is in.
            same = 1e-6 if model.order_matters else 1e-9
            if getattr(model, told):
                assert change > 1e-6, f"{told} is true, and items {name} have the same logits: {change:.1e}"
            else:
                assert change < same, f"{told} is false, and items {name} move the logits by {change:.1e}"


# State


@each_choice
def test_state_survives_a_safe_file(preset, kind, chosen):
    model, other = make(preset, kind, **chosen), make(preset, kind, seed=1, **chosen)
    inputs = samples(preset, kind, dtype=torch.float32)
    with torch.no_grad():
        assert not torch.equal(model(inputs), other(inputs)), "another seed gives other weights"
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(model(inputs), other(inputs)), "the state does not hold all that logits depend on"


@each_case
def test_the_same_seed_gives_the_same_weights(preset, kind):
    first, again, other = (make(preset, kind, seed=seed).state_dict() for seed in (0, 0, 1))
    assert first.keys() == again.keys() == other.keys(), "the seed has a say in what parameters there are"
    assert all(torch.equal(first[name], again[name]) for name in first), (
        "weights are drawn from elsewhere than the seed"
    )
    assert any(not torch.equal(first[name], other[name]) for name in first), "the seed has no say in the weights"


# Settings


@functools.cache
def _trace_of(preset: str, kind: str, frozen_changes: str) -> list[Any]:
    return trace(preset, kind, json.loads(frozen_changes))


def trace(preset: str, kind: str, changes: dict[str, Any]) -> list[Any]:
    """What shows of a model, to the bit: its parameters, and its logits in training and in evaluation."""
    model = disturbed(make(preset, kind, **changes))
    inputs = samples(preset, kind, count=8)
    seen: list[Any] = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    with torch.no_grad():
        for training in (False, True):
            torch.manual_seed(0)
            items = model.train(training).embed(inputs)
            # Where a position is added, to the item or to the slot, shows only in another order.
            seen += [model.read(part).flatten().tolist() for part in (items, items.flip(1))]
    fresh = make(preset, kind, **changes)  # an option may show in the first weights alone
    return [*seen, [parameter.flatten().tolist() for parameter in fresh.parameters()]]


def variations(value: Any, type_: Any) -> list[Any]:
    """Other values of an option, each of which has to make a difference; none of one that is open text."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        near = [other for other in (value * 2, value / 2, value + 0.25) if other != value and matches(other, type_)]
        return near[:1]
    return [choice for choice in choices(type_) if choice != value]


def is_idle(preset: str, kind: str, key: str, changes: dict[str, Any]) -> bool:
    """Whether the model declares that an option has no effect under these settings."""
    other, values = getattr(type(make(preset, kind)), "no_effect", {}).get(key, (None, ()))
    return (kind if other == "kind" else (settings_of(preset) | changes).get(other)) in values


# Another name for the same blocks, which a checkpoint of that family has to have.
SAME = {("architecture", "mistral")}
TRIED = [
    (preset, kind, key, value)
    for preset, kind in CASES
    for key, type_ in options(preset).items()
    for value in variations(settings_of(preset)[key], type_)
]


@pytest.mark.parametrize(
    ("preset", "kind", "key", "value"),
    TRIED,
    ids=[f"{preset}-{kind}-{key}={value}" for preset, kind, key, value in TRIED],
)
def test_every_option_shows_unless_it_is_declared_idle(preset, kind, key, value):
    before = settings_of(preset)[key]
    try:
        changed = _trace_of(preset, kind, "{}") != trace(preset, kind, {key: value})
    except ConfigError:
        return  # a combination that is refused has shown
    declared = is_idle(preset, kind, key, {}) or (key, value) in SAME
    assert changed != declared, f"{key}: {before} -> {value} shows: {changed}; no_effect says it does not: {declared}"


def odd_values(value: Any, type_: Any) -> list[Any]:
    """Values that the type allows and that may not fit the other options."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return []
    if isinstance(value, int):
        found = [1, 2, 3, 7, value - 1, value + 1, value + value // 2]
    else:
        found = [0.0, value / 1000, value - 1, value * 1000, value + 10, 0.99]
    return [other for other in dict.fromkeys(found) if other != value and matches(other, type_)]


@pytest.mark.parametrize("preset", SMALL)
def test_a_value_that_does_not_fit_is_refused_by_its_name(preset):
    settings, known = settings_of(preset), options(preset)
    refusals = []
    for kind, key in itertools.product(model_class(preset).reads, known):
        for value in odd_values(settings[key], known[key]):
            try:
                model = make(preset, kind, **{key: value})
            except ConfigError as error:
                refusals.append((key, value, str(error)))
                continue
            logits = model(samples(preset, kind, dtype=torch.float32))
            assert logits.isfinite().all(), f"{key}={value} is accepted and gives logits that are not finite"
    for key, value, message in refusals:
        numbers = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", message)}
        assert value in numbers, f"{key}={value} is refused without naming the value: {message}"
    documented = "Raises:" in (model_class(preset).__doc__ or "")
    assert documented == bool(refusals), f"the docstring says Raises: {documented}; refused were {refusals}"


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_has_a_help_line_and_a_learning_rate(preset):
    first = (CONF / "model" / f"{preset}.yaml").read_text().splitlines()[0]
    assert re.fullmatch(r"# \S.{10,}", first), "the first line of the YAML says in a comment what the preset is"
    assert "lr" in settings_of(preset), "a preset recommends a peak learning rate, lr"


@pytest.mark.parametrize("preset", SMALL)
def test_the_family_that_a_model_names_is_that_of_its_blocks(preset):
    """What is said before torch is imported is what is found in the model."""
    model = make(preset, model_class(preset).reads[0])
    if model.blocks_of is None:
        with pytest.raises(ValueError, match="no block of"):
            find_blocks(model)
        return
    family = importlib.import_module(f"permlab.sparsity.family.{model.blocks_of}").FAMILY
    assert family.needs in {block.family.needs for block in find_blocks(model)}
