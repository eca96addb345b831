"""`docs/options.md`: every key with its type, range, default and meaning, read from the sources and `conf/`.

python -m permlab.config.reference            writes the page anew
"""

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

from permlab.config.schema import (
    COMPONENT_GROUPS,
    CONF,
    GROUPS,
    class_name,
    component_names,
    component_options,
    component_path,
    components,
    schema,
)
from permlab.errors import ConfigError
from permlab.option import REQUIRED, Option, Rule, describe

PAGE = CONF.parent / "docs" / "options.md"
INTRODUCTION = """# Options

Every key, from the sources and `conf/` (`python -m permlab.config.reference` writes this page anew). A value out of its
range is refused before anything is written. Defaults are those of the preset named in the heading; the other presets
of a class are in `conf/`. A key that you set and that has no effect in your composition is a warning.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, _table("Of a run", "", schema("", None), CONF / "train.yaml")]
    parts.append(_table("paths", "paths.", schema("paths", None), CONF / "train.yaml"))
    for group in GROUPS:
        parts.append(f"## {group}\n")
        if group not in COMPONENT_GROUPS:
            name = {"optim": "adamw", "trainer": "cpu", "logger": "wandb"}[group]  # the presets with comments
            checked = {key: option for key, option in schema(group, None).items() if _is_checked(group, key)}
            parts.append(_table(f"{group}={name}", f"{group}.", checked, CONF / group / f"{name}.yaml"))
            continue
        shared = schema(group, None)
        parts.append(_table("Shared by all", f"{group}.", shared, None))
        for component in components(group):
            preset = _preset(group, component)
            if preset is not None:
                options = component_options(group, component)
                parts.append(
                    _table(f"{group}={preset}", f"{group}.", options, CONF / group / f"{preset}.yaml", component)
                )
    parts.append("`trainer.` takes every other argument of `lightning.Trainer` as well, which checks them itself.\n")
    return "\n".join(parts)


# Keys of groups that `--help` has beside those of the script's own file: group, preset that has them, keys.
OFTEN_SET = (
    ("trainer", "cpu", ("max_steps", "max_epochs", "devices", "precision", "val_check_interval", "profiler")),
    ("optim", "adamw", ("lr", "weight_decay", "schedule")),
    ("data", "digits", ("batch_size", "num_workers")),
)


def overview(name: str) -> dict[str, str]:
    """`key=default` and its meaning: keys of the file of `train` or `eval`, and for `train` those most often set."""
    path = CONF / f"{name}.yaml"
    meanings = OTHERS | _comments(path)
    found = {key: value for key, value in _values(path, "").items() if key != "defaults"}
    leaves = {key: value for key, value in found.items() if not isinstance(value, dict)}
    for section in (key for key in found if key not in leaves):
        leaves |= {f"{section}.{key}": value for key, value in found[section].items()}
    for group, preset, keys in OFTEN_SET if name == "train" else ():
        comments = _comments(CONF / group / f"{preset}.yaml")
        values = _settings(group, preset)
        leaves |= {f"{group}.{key}": values[key] for key in keys}
        meanings |= SHARED | {f"{group}.{key}": text for key, text in comments.items()}
    return {
        f"{key}={_short(value)}": meanings.get(key, meanings.get(key.split(".")[-1], ""))
        for key, value in leaves.items()
    }


def _is_checked(group: str, key: str) -> bool:
    return group != "trainer" or schema(group, None)[key].type is not Any


def _preset(group: str, component: str) -> str | None:
    """The preset named as its class, or the first that has it."""
    names = component_names(group)
    return (
        component
        if component in names
        else next((n for n in names if _settings(group, n).get("component") == component), None)
    )


def _settings(group: str, name: str) -> dict[str, Any]:
    """Values of a preset with those that it inherits, uncomposed."""
    import yaml

    own = yaml.safe_load((CONF / group / f"{name}.yaml").read_text()) or {}
    own = {**own, **own.get(group, {})} if isinstance(own.get(group), dict) else own
    parents = [parent for parent in own.get("defaults", []) if isinstance(parent, str) and parent != "_self_"]
    inherited = _settings(group, parents[0]) if parents else {}
    return inherited | {key: value for key, value in own.items() if key != "defaults"}


def _table(title: str, prefix: str, options: dict[str, Option], path: Path | None, component: str | None = None) -> str:
    group = prefix.rstrip(".")
    values = _values(path, group) if path else {}
    meanings = _meanings(group, component) | (_comments(path) if path and component is None else {})
    lines = [f"### {title}\n", "| key | values | default | meaning |", "|---|---|---|---|"]
    for key, option in options.items():
        value = values.get(key, None if option.default is REQUIRED else option.default)
        given = key in values or option.default is not REQUIRED
        cells = [
            f"`{prefix}{key}`",
            ", ".join([describe(option.type), *map(str, option.marks(Rule))]),
            f"`{_short(value)}`" if given else "",
            meanings.get(key, ""),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _values(path: Path, group: str) -> dict[str, Any]:
    import yaml

    if path.parent == CONF:
        found = yaml.safe_load(path.read_text())
        return found.get(group, {}) if group else found
    return _settings(path.parent.name, path.stem)


def _comments(path: Path) -> dict[str, str]:
    """What the file says behind each key."""
    found = re.findall(r"^ *(\w+):[^#\n]*# *(.+)$", path.read_text(), re.MULTILINE)
    return {key: text.strip() for key, text in found}


# Meaning of the keys that every component of a group has.
SHARED = {
    "name": "the preset",
    "component": "file of the preset's class",
    "lr": "peak learning rate that the preset recommends, which `optim.lr` refers to",
    "order": "starting order, or the order of `fixed`: a scan order, `compressible` (the one in which the training "
    "images' patches compress best), indices, or an `.npz` with an array `order`",
    "batch_size": "samples per process and step",
    "num_workers": "processes that fetch ahead; 0 fetches in the training's own",
}

# And of those elsewhere that their file does not comment on.
OTHERS = {
    "name": "the preset",
    "seed": "of weights, splits, order of batches and noise",
    "debug": "preset of `conf/debug/` that the run is made with; such a run is never taken for another",
    "runs": "folder that holds all runs",
    "data": "folder that holds datasets, each in one of its own",
    "beta1": "decay of AdamW's mean of gradients",
    "beta2": "decay of AdamW's mean of squared gradients",
    "accelerator": "as in Lightning: cpu, gpu, auto",
    "strategy": "as in Lightning: auto, ddp, fsdp",
    "devices": "processes on a CPU, or devices",
    "num_nodes": "machines",
    "precision": "as in Lightning: 32-true, bf16-mixed, 16-mixed",
    "max_steps": "optimiser steps; -1: as many as `trainer.max_epochs` have",
    "max_epochs": "passes over the training data; -1: as many as `trainer.max_steps` need",
    "accumulate_grad_batches": "batches per optimiser step",
    "log_every_n_steps": "optimiser steps between two lines of metrics.jsonl",
    "project": "of Weights & Biases",
    "tags": "of the run there",
}


def _meanings(group: str, component: str | None) -> dict[str, str]:
    """First line that the docstring of the component's class says about each argument."""
    if component is None:
        return SHARED if group in COMPONENT_GROUPS else OTHERS
    tree = ast.parse(component_path(group, component).read_text())
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name(component))
    text = ast.get_docstring(node) or ""
    block = re.search(r"^Args:\n((?: .*\n|\n)+)", text + "\n", re.MULTILINE)
    found: dict[str, str] = {}
    for names, meaning in re.findall(
        r"^    ((?:\w+)(?:,\s+\w+)*): ((?:.|\n     )+)", block[1] if block else "", re.MULTILINE
    ):
        line = " ".join(meaning.split())
        found |= {name: line for name in re.split(r",\s+", names)}
    return found


def main() -> int:
    try:
        PAGE.write_text(page())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
