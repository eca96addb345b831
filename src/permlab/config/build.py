"""Construction: where settings become objects."""

import importlib
from collections.abc import Mapping
from typing import Any

from permlab.config.schema import class_name, component_module, component_options
from permlab.errors import ConfigError


def component_class(group: str, component: str) -> type:
    """Class of a component; only those in the package's own group folders can be reached.

    Raises:
        ConfigError: if there is none of that name.
    """
    return getattr(importlib.import_module(component_module(group, component)), class_name(component))


def build(group: str, settings: Mapping[str, Any], *context: Any) -> Any:
    """The component that `settings` describe: `component_class(*context, **options)`.

    Args:
        group: of the component (`model`, `method`, `task`, `data`).
        settings: `component`, and its options; other keys are left out.
        context: positional arguments of the constructor.
    Raises:
        ConfigError: if the constructor refuses the values.
    """
    component = settings["component"]
    options = {key: settings[key] for key in component_options(group, component) if key in settings}
    try:
        return component_class(group, component)(*context, **options)
    except ValueError as error:
        raise ConfigError(f"{group}={settings.get('name', component)}: {error}") from error
