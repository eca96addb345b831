"""Settings that were given and have no effect in the composition they were given for.

A component says so of its own options in the class constant `no_effect`, a literal: option -> the
key it depends on -> the values of that key under which it does nothing (`SET` for any but null;
`kind` is the kind of the data). What depends on files, a data set says in `idle()`; what depends on
other groups, the task says in `idle(plan)`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from permlab.config.plan import Plan
from permlab.config.schema import COMPONENT_GROUPS, constant

SET = "<set>"
# A dotted key, and what makes it idle.
Idle = tuple[str, str]


def idle_settings(plan: Plan, composed: Mapping[str, Any], given: Iterable[str]) -> list[str]:
    """A warning for every given key without effect.

    Args:
        plan: of the run.
        composed: the configuration as it was given, before what follows was filled in.
        given: dotted keys that the user named; presets set many more, as they do not know each other.
    Returns:
        `key=value has no effect with other=value`, in the order of the rules.
    """
    rules = [*_of_components(plan), *_of_trainer(plan.config), *_of_data(plan), *plan.task.idle(plan)]
    wanted, warnings = set(given), {}
    for key, reason in rules:
        # Null is no setting, but the absence of one.
        if key in wanted and key not in warnings and _value(composed, key) is not None:
            warnings[key] = f"{key}={_value(composed, key)} has no effect with {reason}"
    return list(warnings.values())


def _value(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value[key] if isinstance(value, Mapping) and key in value else None
    return value


def _of_components(plan: Plan) -> Iterator[Idle]:
    for group in COMPONENT_GROUPS:
        settings = plan.config[group]
        rules = constant(group, settings["component"], "no_effect") or {}
        for option, (other, values) in rules.items():
            value = plan.spec.kind if other == "kind" else settings.get(other)
            if value in values or (values == [SET] and value is not None):
                named = f"data={plan.config['data']['name']}" if other == "kind" else f"{group}.{other}={value}"
                yield f"{group}.{option}", named


def _of_trainer(config: Mapping[str, Any]) -> Iterator[Idle]:
    if config["optim"]["schedule"] in ("onecycle", "constant"):
        yield "optim.hold_fraction", f"optim.schedule={config['optim']['schedule']}"
    if config["trainer"]["on_nonfinite"] == "stop":
        yield "trainer.max_skips", "trainer.on_nonfinite=stop"
    if config["trainer"]["overfit_batches"]:
        for key in ("limit_train_batches", "limit_val_batches"):
            yield f"trainer.{key}", f"trainer.overfit_batches={config['trainer']['overfit_batches']}"
    mode = config["logger"]["mode"]
    for key in {"disabled": ("project", "entity", "tags", "log_artifacts"), "offline": ("log_artifacts",)}.get(
        mode, ()
    ):
        yield f"logger.{key}", f"logger.mode={mode}"


def _of_data(plan: Plan) -> Iterator[Idle]:
    for option, reason in getattr(plan.data, "idle", lambda: ())():
        yield f"data.{option}", reason
