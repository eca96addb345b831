"""Types of configuration options, and how a component's options are read from its source.

The keyword-only arguments of a component's constructor *are* its options: their names are
the keys of its YAML file and their annotations are the types and ranges that validation
enforces. They are read from the syntax tree, so a configuration is checked before torch is
imported (importing torch alone takes longer than a wrong key deserves).
"""

import ast
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin


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
# A learning rate; above a thousand the optimiser's own arithmetic overflows before anything is learned.
Rate = Annotated[float, Range(gt=0, le=1000)]
Fraction = Annotated[float, Range(ge=0, le=1)]
Dropout = Annotated[float, Range(ge=0, lt=1)]


class Mark:
    """Says something of an option beside its type and range."""


class Rule(Mark):
    """A rule between an option and others of its component, checked once every single value is right."""

    def problem(self, value: Any, settings: Mapping[str, Any], group: str) -> str | None:
        """What is wrong with a value, without the key and the value themselves; None if nothing is.

        Args:
            value: of the option, of its type and within its range.
            settings: all options of the component.
            group: their configuration group, for the names of keys.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no problem")


@dataclass(frozen=True)
class Divides(Rule):
    """The option divides another one.

    Args:
        other: key of the option that is divided.
        unit: what that one counts, in place of its key in the message.
    Example:
        >>> Divides("width").problem(3, {"width": 8}, "model")
        'does not divide model.width=8'
    """

    other: str
    unit: str = ""

    def problem(self, value: Any, settings: Mapping[str, Any], group: str) -> str | None:
        whole = settings[self.other]
        if whole % value == 0:
            return None
        return f"does not divide {whole} {self.unit}" if self.unit else f"does not divide {group}.{self.other}={whole}"

    def __str__(self) -> str:
        return f"divides `{self.other}`"


@dataclass(frozen=True)
class SharesOne(Rule):
    """The option and another one are parts of the same whole, so they do not exceed 1 together.

    Example:
        >>> SharesOne("warmup_fraction").problem(0.75, {"warmup_fraction": 0.5}, "method")
        'with method.warmup_fraction=0.5 exceeds 1'
    """

    other: str

    def problem(self, value: Any, settings: Mapping[str, Any], group: str) -> str | None:
        part = settings.get(self.other, 0)
        return f"with {group}.{self.other}={part} exceeds 1" if value + part > 1 else None

    def __str__(self) -> str:
        return f"at most 1 with `{self.other}`"


@dataclass(frozen=True)
class Where(Rule):
    """The option needs some value, or at least some number, where another option has a certain value.

    Example:
        >>> Where("baseline", "leave_one_out", at_least=2).problem(1, {"baseline": "leave_one_out"}, "method")
        'method.baseline=leave_one_out needs at least 2'
    """

    other: str
    value: Any
    at_least: float | None = None
    equals: Any = None

    def problem(self, value: Any, settings: Mapping[str, Any], group: str) -> str | None:
        if settings.get(self.other) != self.value:
            return None
        fits = value == self.equals if self.at_least is None else value >= self.at_least
        return None if fits else f"{group}.{self.other}={self.value} needs {self._needed()}"

    def _needed(self) -> str:
        return str(self.equals) if self.at_least is None else f"at least {self.at_least:g}"

    def __str__(self) -> str:
        return f"{self._needed()} with `{self.other}={self.value}`"


@dataclass(frozen=True)
class AddedLater(Mark):
    """The option is newer than its component, which computes with this value what it did without the option.

    The digest of a run leaves the option out where it has this value, and the files of a run without it are
    read as if they had it, so that runs of earlier versions keep their names and are found again.

    Args:
        value: as it stands in a configuration.
    """

    value: Any


class ItemSide(Mark):
    """The option is a factor of the side of an item, in pixels: the items of an image form a grid by them."""


class TakenAsWritten(Mark):
    """The value is a path or a name, which may hold signs that Hydra's grammar would want quoted."""


class KeptInData(Mark):
    """The value may be a folder in `models` below `paths.data`, by whose name a run is called wherever that lies."""


class TemperatureForm(Mark):
    """The value is a number or a schedule, in a form that `permlab.ops.schedule.parse` reads."""


class OrderForm(Mark):
    """The value names an order, in a form that `permlab.task.place.at_items` reads."""


# A number >= 0, or a schedule {kind, start, peak, end}.
Temperature = Annotated[float | Mapping[str, Any], TemperatureForm()]
# A scan-order name, `compressible`, a list of item indices, or the path of an .npz file with an `order` array.
Order = Annotated[str | Sequence[int], OrderForm(), TakenAsWritten()]
# A path, or the name of something on a hub.
Verbatim = Annotated[str, TakenAsWritten()]
# A checkpoint, or the tokenizer that comes with it: a folder, or a name on the hub.
Checkpoint = Annotated[str, TakenAsWritten(), KeptInData()]
# Pixels or patches along the side of an item.
Side = Annotated[int, Range(gt=0), ItemSide()]

SINGLE_MAX = 3e38

_NAMESPACE: dict[str, Any] = {name: value for name, value in globals().items() if not name.startswith("_")} | {
    "__builtins__": {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
}

REQUIRED = object()
MarkType = TypeVar("MarkType", bound=Mark)


@dataclass(frozen=True)
class Option:
    """One option of a component: its type, and its default where the constructor has one."""

    type: Any
    default: Any = REQUIRED

    def marks(self, kind: type[MarkType]) -> list[MarkType]:
        """Marks of one kind that the type carries, those of its alternatives included."""
        return [mark for mark in _marks(self.type) if isinstance(mark, kind)]


def _marks(type_: Any) -> list[Any]:
    if get_origin(type_) is Annotated:
        base, *marks = get_args(type_)
        return [*marks, *_marks(base)]
    return [mark for part in get_args(type_) for mark in _marks(part)]


@cache
def options_of(path: Path, class_name: str) -> dict[str, Option]:
    """Options of the class `class_name` in the source file `path`, without importing it.

    Raises:
        ValueError: naming the file, if it is no Python, has no such class, or the class has no constructor of its
            own or one with an option whose annotation is missing or is none of this module's types.
    """
    try:
        body = ast.parse(path.read_text()).body
    except SyntaxError as error:
        raise ValueError(f"{path}: line {error.lineno}: {error.msg}") from error
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    return _options_of_signature(item.args, f"{path}: {class_name}")
            raise ValueError(f"{path}: {class_name} has no __init__ of its own")
    raise ValueError(f"{path}: has no class {class_name}")


def _options_of_signature(arguments: ast.arguments, owner: str) -> dict[str, Option]:
    options = {}
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        name = f"{owner}: option {argument.arg}"
        if argument.annotation is None:
            raise ValueError(f"{name} has no annotation; expected a type of permlab.option such as PositiveFloat")
        code = compile(ast.Expression(argument.annotation), "<annotation>", "eval")
        value = REQUIRED if default is None else ast.literal_eval(default)
        try:
            options[argument.arg] = Option(eval(code, dict(_NAMESPACE)), value)  # noqa: S307 (our own source)
        except NameError as error:
            raise ValueError(f"{name}: {error}; expected a type of permlab.option such as PositiveFloat") from error
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
    if get_origin(type_) is Annotated:
        return choices(get_args(type_)[0])
    if get_origin(type_) is Literal:
        return list(get_args(type_))
    if get_origin(type_) in (Union, UnionType):
        return [choice for part in get_args(type_) for choice in choices(part)]
    return []


def describe(type_: Any) -> str:
    """What a value of this type looks like, in words for an error message."""
    if get_origin(type_) is Annotated:
        base, *marks = get_args(type_)
        if any(isinstance(mark, TemperatureForm) for mark in marks):
            return "a number >= 0 or a schedule such as {start: 1.0, end: 0.1}"
        if any(isinstance(mark, OrderForm) for mark in marks):
            return "a scan-order name, a list of indices or an .npz file"
        return " ".join([describe(base), *(str(mark) for mark in marks if isinstance(mark, Range))])
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
        if any(isinstance(mark, TemperatureForm) for mark in marks):
            return (_is_number(value) and value >= 0) or isinstance(value, Mapping)
        if any(isinstance(mark, OrderForm) for mark in marks):
            return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, int) for item in value))
        return matches(value, base) and all(value in mark for mark in marks if isinstance(mark, Range))
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


def same_value(one: Any, other: Any) -> bool:
    """Whether two values are equal; numbers in single precision, in which some checkpoints keep them.

    Example:
        >>> same_value(9.999999747378752e-06, 1e-5), same_value(1e-6, 1e-5), same_value("a", "a")
        (True, False, True)
    """
    if _is_number(one) and _is_number(other) and max(abs(one), abs(other)) < SINGLE_MAX:
        return struct.pack("f", one) == struct.pack("f", other)
    return one == other


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
