"""Types of configuration options, and how a component's options are read from its source.

The keyword-only arguments of a component's constructor *are* its options: their names are
the keys of its YAML file and their annotations are the types and ranges that validation
enforces. They are read from the syntax tree, so a configuration is checked before torch is
imported (importing torch alone takes longer than a wrong key deserves).
"""

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """Interval of a number: `Range(gt=0)`, `Range(ge=0, le=1)`."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __str__(self) -> str:
        bounds = ((">", self.gt), (">=", self.ge), ("<", self.lt), ("<=", self.le))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


PositiveInt = Annotated[int, Range(gt=0)]
NonNegativeInt = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]
Dropout = Annotated[float, Range(ge=0, lt=1)]


class _TemperatureType:
    """Marker of `Temperature`; see `permlab.ops.schedule.parse` for the accepted forms."""


class _OrderType:
    """Marker of `Order`; see `permlab.order.resolve_order` for the accepted forms."""


# A positive number, or a schedule {kind, start, peak, end}.
Temperature = Annotated[float | Mapping[str, Any], _TemperatureType]
# A scan-order name, a list of item indices, or the path of an .npz file with an `order` array.
Order = Annotated[str | Sequence[int], _OrderType]

_NAMESPACE: dict[str, Any] = {name: value for name, value in globals().items() if not name.startswith("_")} | {
    "__builtins__": {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
}

REQUIRED = object()


@dataclass(frozen=True)
class Option:
    """One option of a component: its type, and its default where the constructor has one."""

    type: Any
    default: Any = REQUIRED


@cache
def options_of(path: Path, class_name: str) -> dict[str, Option]:
    """Options of the class `class_name` in the source file `path`, without importing it.

    Raises:
        ValueError: if the file has no such class, or the class has no constructor of its own.
    """
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    return _options_of_signature(item.args)
            raise ValueError(f"{class_name} in {path} has no __init__ of its own")
    raise ValueError(f"{path} has no class {class_name}")


def _options_of_signature(arguments: ast.arguments) -> dict[str, Option]:
    options = {}
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        assert argument.annotation is not None, f"option {argument.arg} has no annotation"
        code = compile(ast.Expression(argument.annotation), "<annotation>", "eval")
        value = REQUIRED if default is None else ast.literal_eval(default)
        options[argument.arg] = Option(eval(code, dict(_NAMESPACE)), value)  # noqa: S307 (our own source)
    return options


@cache
def class_constant(path: Path, class_name: str, name: str) -> Any:
    """Literal value of a class attribute, without importing the file; None where it has none."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return ast.literal_eval(item.value)  # type: ignore[attr-defined]
    return None


def choices(type_: Any) -> list[Any]:
    """Every literal choice a type allows, for suggestions; empty where it is open."""
    if get_origin(type_) is Literal:
        return list(get_args(type_))
    if get_origin(type_) in (Union, UnionType):
        return [choice for part in get_args(type_) for choice in choices(part)]
    return []


def describe(type_: Any) -> str:
    """What a value of this type looks like, in words for an error message."""
    if get_origin(type_) is Annotated:
        base, *marks = get_args(type_)
        if _TemperatureType in marks:
            return "a number >= 0 or a schedule such as {start: 1.0, end: 0.1}"
        if _OrderType in marks:
            return "a scan-order name, a list of indices or an .npz file"
        return " ".join([describe(base), *(str(mark) for mark in marks)])
    if get_origin(type_) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(type_))
    if get_origin(type_) in (Union, UnionType):
        return " or ".join(describe(part) for part in get_args(type_))
    if get_origin(type_) is list:
        return "a list"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    return names.get(type_, "a mapping" if type_ is dict else str(type_))


def matches(value: Any, type_: Any) -> bool:
    """Whether a plain configuration value is of the type, within its range."""
    if get_origin(type_) is Annotated:
        base, *marks = get_args(type_)
        if _TemperatureType in marks:
            return (_is_number(value) and value >= 0) or isinstance(value, Mapping)
        if _OrderType in marks:
            return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, int) for item in value))
        return matches(value, base) and all(value in mark for mark in marks)
    if get_origin(type_) is Literal:
        return value in get_args(type_)
    if get_origin(type_) in (Union, UnionType):
        return any(matches(value, part) for part in get_args(type_))
    if get_origin(type_) is list:
        return isinstance(value, list) and all(matches(item, get_args(type_)[0]) for item in value)
    if type_ is Any:
        return True
    if type_ is float:
        return _is_number(value)
    if type_ is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if type_ is NoneType or type_ is None:
        return value is None
    return isinstance(value, type_)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
