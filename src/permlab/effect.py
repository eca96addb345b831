"""Settings that were given and have no effect in the composition they were given for.

A component says so of its own options in the class constant `no_effect`, a literal: option -> the
key it depends on -> the values of that key under which it does nothing (`SET` for any but null;
`kind` is the kind of the data). What depends on more than one group is here.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from permlab.data.spec import DataSpec
from permlab.option import class_constant
from permlab.schema import COMPONENT_GROUPS, class_name, component_options, component_path

SET = "<set>"
LOSS_KEYS = ("task_weight", "kl_weight", "distill_weight", "distill_kind", "distill_over", "mask_temperature", "mix")
HUB_KEYS = ("repository", "subset", "revision", "train_file", "val_file", "test_file", "streaming")
Idle = Iterator[tuple[str, str]]


def idle_settings(config: Mapping[str, Any], spec: DataSpec, given: Iterable[str]) -> list[str]:
    """A warning for every given key without effect.

    Args:
        config: valid configuration.
        spec: of its data.
        given: dotted keys that the user named; presets set many more, as they do not know each other.
    Returns:
        `key=value has no effect with other=value`, in the order of the rules.
    """
    rules = [*_of_components(config, spec), *_of_trainer(config), *_of_data(config), *_of_task(config, spec)]
    wanted, warnings = set(given), {}
    for key, reason in rules:
        # Null is no setting, but the absence of one.
        if key in wanted and key not in warnings and _value(config, key) is not None:
            warnings[key] = f"{key}={_value(config, key)} has no effect with {reason}"
    return list(warnings.values())


def _value(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value[key] if isinstance(value, Mapping) and key in value else None
    return value


def _of_components(config: Mapping[str, Any], spec: DataSpec) -> Idle:
    for group in COMPONENT_GROUPS:
        settings = config[group]
        component = settings["component"]
        rules = class_constant(component_path(group, component), class_name(component), "no_effect") or {}
        for option, (other, values) in rules.items():
            value = spec.kind if other == "kind" else settings.get(other)
            if value in values or (values == [SET] and value is not None):
                yield (
                    f"{group}.{option}",
                    f"data={config['data']['name']}" if other == "kind" else f"{group}.{other}={value}",
                )


def _of_trainer(config: Mapping[str, Any]) -> Idle:
    if config["trainer"]["on_nonfinite"] == "stop":
        yield "trainer.max_skips", "trainer.on_nonfinite=stop"
    mode = config["logger"]["mode"]
    for key in {"disabled": ("project", "entity", "tags", "log_artifacts"), "offline": ("log_artifacts",)}.get(
        mode, ()
    ):
        yield f"logger.{key}", f"logger.mode={mode}"


def _of_data(config: Mapping[str, Any]) -> Idle:
    data = config["data"]
    if data["component"] == "image_folder" and Path(data["root"], "test").is_dir():
        yield "data.val_fraction", f"the folder {Path(data['root'], 'test')}"
    if data["component"] == "hub_text":
        local = Path(data["root"]).is_dir()
        for key in HUB_KEYS if local else ("on_corrupt",):
            yield f"data.{key}", f"the folder {data['root']}" if local else "text from the hub"
        if local and all(Path(data["root"], f"{split}.txt").is_file() for split in ("train", "val", "test")):
            for key in ("on_corrupt", "num_documents", "separator"):
                yield f"data.{key}", "text in .txt files"


def _of_task(config: Mapping[str, Any], spec: DataSpec) -> Idle:
    task, method = config["task"], config["method"]
    options = component_options("method", method["component"])
    named = f"method={method['name']}"
    if task["component"] == "classify" and "baseline" not in options:
        yield "task.policy_weight", f"{named}, which does not sample"
    if task["component"] == "classify" and method["component"] == "fixed":
        yield "task.control", f"{named}, which is its own control"
    if task["component"] != "prune":
        return
    for key in ("optim.lr", "optim.weight_decay"):
        yield key, "task=prune, which freezes the model's weights"
    if task["dense"] is not None or config["model"].get("pretrained"):
        yield "model.lr", "a model that is trained already"
    if "lr" not in options:
        for key in LOSS_KEYS:
            yield f"task.{key}", f"{named}, which does not learn"
        for key in ("beta1", "beta2", "schedule", "warmup_fraction"):
            yield f"optim.{key}", f"{named}, which does not learn"
        for key in ("max_steps", "max_epochs", "gradient_clip_val", "on_nonfinite"):
            yield f"trainer.{key}", f"{named}, which does not learn"
    if "estimator" not in options:
        yield "task.mask_temperature", f"{named}, which has no relaxation"
    if method.get("estimator") != "relaxed":
        yield "task.mix", f"{named}, which mixes no items"
    if config["model"].get("pretrained"):
        yield "task.dense_steps", "model.pretrained"
