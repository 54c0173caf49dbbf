"""Fields: plain values become typed ones, or an error names the field, the value and what is allowed.

Pydantic checks; this module adds the field types that methods share and the wording of the error.
"""

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Annotated, Any, TypeVar, get_type_hints

from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from kdbench.errors import KdbenchError, unknown

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Gt(0), Le(1)]
Share = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]

T = TypeVar("T")


class Checked:
    """A dataclass that checks its fields against their types when it is made.

    Raises `KdbenchError` naming the field, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            adapter = _adapters(cls)[field.name]
            value = getattr(self, field.name)
            try:
                typed = adapter.validate_python(value, strict=True)
            except ValidationError as error:
                raise _sentence(f"{type(self).__name__}.{field.name}", value, error, hints(cls)[field.name]) from None
            object.__setattr__(self, field.name, typed)  # 1 given for a float becomes 1.0: equal fields, equal keys


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make `cls` (a dataclass) from plain values as TOML and JSON have them.

    `where` names the place in the user's words ("defense.nasty"). Raises `KdbenchError` for an unknown or ill-typed field.
    """
    typed = {name: _typed(cls, name, value, where) for name, value in values.items()}
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in typed and _required(f)]  # type: ignore[arg-type]
    if missing:
        raise KdbenchError(f"{where}: the field '{missing[0]}' is missing.")
    return cls(**typed)


def _typed(cls: type, name: str, value: object, where: str) -> Any:
    adapters = _adapters(cls)
    if name not in adapters:
        raise _at_field(name, unknown("field", name, adapters, where))
    try:
        return adapters[name].validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise _at_field(name, _sentence(f"{where}.{name}", value, error, hints(cls)[name])) from None


def _at_field(field: str, error: KdbenchError) -> KdbenchError:
    error.field = field
    return error


def plain(value: Any) -> Any:
    """`value` as JSON has it: dataclasses become objects, tuples lists, enums their names in lower case."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name, in order."""
    types = get_type_hints(cls, include_extras=True)
    return {f.name: types[f.name] for f in dataclasses.fields(cls)}


@cache
def _adapters(cls: type) -> dict[str, TypeAdapter[Any]]:
    return {name: _adapter(hint) for name, hint in hints(cls).items()}


def _adapter(hint: Any) -> TypeAdapter[Any]:
    if dataclasses.is_dataclass(hint):  # it is Checked, and words its own errors
        return TypeAdapter(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return TypeAdapter(Annotated[hint, BeforeValidator(_by_name)])
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))


def _by_name(value: object) -> object:
    """Refuses numbers: a suite file that says `access = 3` tells its reader nothing."""
    if not isinstance(value, str | Enum):
        raise PydanticCustomError("enum", "not a name")
    return value


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _sentence(where: str, value: object, error: ValidationError, hint: Any) -> KdbenchError:
    errors = error.errors()
    depth = max(len(e["loc"]) for e in errors)  # of a union's branches, the one that matched furthest was meant
    deepest = [e for e in errors if len(e["loc"]) == depth]
    inside = "".join(f"[{part}]" for part in deepest[0]["loc"] if isinstance(part, int))
    allowed = " or ".join(dict.fromkeys(_allowed(e["type"], e["msg"], hint) for e in deepest))
    return KdbenchError(f"{where}{inside} {allowed.replace(' or must be ', ' or ')}, not {value!r}.")


def _allowed(kind: str, message: str, hint: Any) -> str:
    if kind == "enum" and isinstance(hint, type) and issubclass(hint, Enum):  # people write enums by name
        return f"must be one of {', '.join(member.name.lower() for member in hint)}"
    return message.replace("Input should be", "must be").replace("Value error, ", "")
