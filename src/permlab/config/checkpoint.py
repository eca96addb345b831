"""What a checkpoint says of itself, read before torch is imported: the sizes of its model, and its own tokenizer.

A model says in its class constant `from_checkpoint`, a literal, where an option is found in the configuration of a
checkpoint: keys, dotted where they lie in a group, of which the first that is there counts; behind them, if anything
other than text, what holds where none is. Options that are null are filled in from there, and those that are given
are compared with it.
"""

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from permlab.config.schema import CONF, component_options, constant
from permlab.data.source import is_published
from permlab.data.tokenizer import HUB_NAME, has_tokenizer
from permlab.errors import ConfigError, nearest
from permlab.option import ItemSide, describe, matches, same_value

# Tokens that a model has an embedding for, in every configuration of transformers.
VOCABULARY = ("vocab_size", "text_config.vocab_size")


def derived(component: str) -> Mapping[str, tuple[Any, ...]]:
    """Options of a model that may be null for what a checkpoint says, and where it says so."""
    return constant("model", component, "from_checkpoint") or {}


def fill_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which a model has the sizes of its checkpoint, and text its tokenizer, where nothing else is said.

    Raises:
        ConfigError: if a size is null and there is no checkpoint, or none that says it.
    """
    whole = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    model, data = whole["model"], whole["data"]
    wanted = [option for option in derived(model["component"]) if model.get(option, 0) is None]
    if not isinstance(model.get("pretrained"), str):
        wanted = [option for option in wanted if not _is_side(model, option)]  # which the data has too
    if wanted:
        settings = read_settings(model)
        for option in wanted:
            model[option] = _value(model, option, settings)
    name = model.get("pretrained")
    if "tokenizer" in data and data["tokenizer"] is None and isinstance(name, str) and has_tokenizer(name):
        data["tokenizer"] = name
    return whole


def disagreements(config: Mapping[str, Any], num_tokens: int | None) -> Iterator[str]:
    """Options that are not what the checkpoint in a folder says, and a vocabulary that is not its own.

    A name on the hub is not looked up for that: whoever loads the weights compares them then.

    Args:
        config: complete.
        num_tokens: in the data's vocabulary; None for data without.
    """
    model = config["model"]
    places, name = derived(model["component"]), model.get("pretrained")
    if not places or not isinstance(name, str) or not Path(name).is_dir():
        return
    settings = read_settings(model)
    for option, keys in places.items():
        theirs = _look_up(settings, keys)
        if _is_side(model, option):
            continue  # patches are interpolated
        if theirs is not None and not same_value(theirs, model[option]):
            yield f"model.{option}={model[option]}: the checkpoint {name} has {theirs}"
    own = _look_up(settings, VOCABULARY)
    if num_tokens is not None and own is not None and own != num_tokens:
        data = config["data"]
        hint = "" if not has_tokenizer(name) else f"; nearest valid choice: data.tokenizer={name}"
        yield (
            f"data.tokenizer={data.get('tokenizer')}: gives {num_tokens} tokens, and the checkpoint {name} "
            f"reads {own}{hint}"
        )


def read_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the checkpoint that a model starts from.

    Raises:
        ConfigError: naming the checkpoint, if there is none or it cannot be read.
    """
    name = model.get("pretrained")
    if not isinstance(name, str):
        options = [option for option in derived(model["component"]) if model.get(option, 0) is None]
        sizes = ", ".join(f"model.{option}" for option in options)
        raise ConfigError(
            f"model.pretrained={name}: model={model['name']} takes {sizes} from a checkpoint; set it to a folder "
            "or a name on the hub, or choose a model with sizes of its own"
        )
    library, folder = constant("model", model["component"], "checkpoints"), Path(name)
    how_to_get = _how_to_get(model["name"], name)
    if not folder.is_dir() and (how_to_get or folder.is_absolute() or not HUB_NAME.fullmatch(name)):
        raise ConfigError(f"model.pretrained={name}: no such folder{how_to_get}")
    if library == "timm" and not folder.is_dir():
        return _timm_args(name, name)
    try:
        path = folder / "config.json" if folder.is_dir() else _download(name)
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"holds a {type(settings).__name__}")
    except Exception as error:  # the hub's errors are many, and a file may hold anything
        where = "no readable config.json" if folder.is_dir() else "no such folder, and none from the hub"
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"model.pretrained={name}: {where} ({type(error).__name__}: {reason})") from error
    if library != "timm":
        return settings
    if not isinstance(settings.get("architecture"), str):
        raise ConfigError(
            f"model.pretrained={name}: its config.json names no architecture, so it is no folder of timm's"
        )
    return _timm_args(name, settings["architecture"]) | (settings.get("model_args") or {})


def _timm_args(name: str, architecture: str) -> dict[str, Any]:
    """Arguments by which timm builds a plain vision transformer, read from its source: importing it takes seconds.

    Raises:
        ConfigError: if it knows none of that name.
    """
    package = importlib.util.find_spec("timm")
    assert package is not None
    assert package.submodule_search_locations
    source = Path(package.submodule_search_locations[0], "models", "vision_transformer.py").read_text()
    known = _functions(source)
    plain = architecture.rpartition("/")[2].partition(".")[0]
    if plain not in known:
        near = nearest(plain, list(known), count=3)
        raise ConfigError(f"model.pretrained={name}: no such folder, and timm has no such vision transformer{near}")
    return known[plain]


@cache
def _functions(source: str) -> dict[str, dict[str, Any]]:
    """By the name of a model, those of its `model_args` that are literals."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("vit_"):
            calls = [part.value for part in node.body if isinstance(part, ast.Assign)]
            keywords = [keyword for call in calls if isinstance(call, ast.Call) for keyword in call.keywords]
            literals = [k for k in keywords if k.arg and isinstance(k.value, ast.Constant)]
            found[node.name] = {str(k.arg): ast.literal_eval(k.value) for k in literals}
    return found


def _is_side(model: Mapping[str, Any], option: str) -> bool:
    """Whether an option is the side of an item, which the data knows too and weights are interpolated to."""
    return bool(component_options("model", model["component"])[option].marks(ItemSide))


def _download(name: str) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.hf_hub_download(name, "config.json"))


def _how_to_get(preset: str, name: str) -> str:
    """What fetches the folder of a preset; empty where the name is another."""
    path = CONF / "model" / f"{preset}.yaml"
    own = name.endswith(f"models/{preset}") and path.is_file() and is_published(path)
    return f"; python -m permlab.model get {preset}" if own else ""


def _value(model: Mapping[str, Any], option: str, settings: Mapping[str, Any]) -> Any:
    """What a checkpoint says of an option.

    Raises:
        ConfigError: if it does not, or what it says is no value of the option.
    """
    name, keys = model["pretrained"], derived(model["component"])[option]
    value = _look_up(settings, keys)
    if value is None:
        raise ConfigError(f"model.pretrained={name}: its config.json has no {keys[0]}, which is model.{option}")
    type_ = component_options("model", model["component"])[option].type
    if not matches(value, type_):
        known = f"expected {describe(type_)}; docs/models.md says how another is described"
        raise ConfigError(f"model.pretrained={name}: its {option} is {value}, {known}")
    return value


def _look_up(settings: Mapping[str, Any], keys: tuple[Any, ...]) -> Any:
    for key in keys:
        if not isinstance(key, str):
            return key
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None
