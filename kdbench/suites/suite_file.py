"""A suite file, typed: pydantic checks the whole of it, and each mistake becomes one sentence with its line."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from kdbench.errors import KdbenchError, unknown
from kdbench.evaluation.adversarial import Robustness
from kdbench.game.fields import Share, Whole, build
from kdbench.game.methods import Recipe
from kdbench.game.threat import Scenario
from kdbench.suites.places import Places
from kdbench.suites.reported import Reported
from kdbench.suites.scenarios import read_scenario
from kdbench.suites.sweeps import Sweep

Fields = dict[str, Any]  # a method's or a data set's own, whose types the registered class knows
Seeds = Annotated[int, Ge(1), Le(1000)]  # each is a matrix of its own


def _checked(read: Callable[[Fields], Any]) -> PlainValidator:
    """Has pydantic call `read` on a table; the error it raises is taken over word by word."""

    def validate(values: object) -> Any:
        if not isinstance(values, dict):
            raise PydanticCustomError("table", "no table")
        try:
            return read(values)
        except KdbenchError as error:
            raise PydanticCustomError("sentence", "a mistake", {"sentence": str(error), "field": error.field}) from None

    return PlainValidator(validate)


def _named_or_table(value: object) -> Fields:
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        sentence = f"'dataset' is a name or one table of fields, [dataset], not {value!r}."
        raise PydanticCustomError("sentence", "a mistake", {"sentence": sentence, "field": ""})
    return {"name": value}


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class VictimTable(_Table):
    """`[victim]`: its network and its recipe."""

    network: str | tuple[str, ...] = ()
    networks: str | tuple[str, ...] = ()
    recipe: Annotated[Recipe, _checked(lambda values: build(Recipe, values, "victim.recipe"))] = Recipe()

    def named(self) -> tuple[str, ...]:
        """The networks, under whichever of the two keys they are written."""
        given = self.networks or self.network
        return (given,) if isinstance(given, str) else given


class StudentTable(VictimTable):
    """`[student]`: networks, their common recipe, and what single networks change in it."""

    recipe: Annotated[Recipe, _checked(lambda values: build(Recipe, values, "student.recipe"))] = Recipe()
    recipes: dict[str, Fields] = {}


class SuiteFile(_Table):
    """All tables and fields of a suite file. tolerance: a fraction. precision: "auto" is bf16 where hardware has it."""

    title: str = ""
    seeds: Seeds | tuple[Whole, ...] = 3
    tolerance: Share = 0.02
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    defenses: tuple[str, ...]
    attacks: tuple[str, ...]
    baselines: tuple[str, ...]
    dataset: Annotated[Fields, PlainValidator(_named_or_table)] = {}
    scenario: Annotated[Scenario, _checked(read_scenario)] = Scenario()
    robustness: Annotated[Robustness, _checked(lambda values: build(Robustness, values, "robustness"))] = Robustness()
    victim: VictimTable = VictimTable()
    student: StudentTable = StudentTable()
    defense: dict[str, Fields] = {}
    attack: dict[str, Fields] = {}
    sweep: tuple[Annotated[Sweep, _checked(lambda values: build(Sweep, values, "sweep"))], ...] = ()
    reported: tuple[Annotated[Reported, _checked(lambda values: build(Reported, values, "reported"))], ...] = ()

    def tables(self, kind: str) -> dict[str, Fields]:
        """The tables of methods of a kind ("defense", "attack"), by name."""
        return {"defense": self.defense, "attack": self.attack}[kind]


def typed(tree: Fields, places: Places) -> SuiteFile:
    """The suite file of a parsed TOML document that names its methods.

    Raises `KdbenchError` for the first mistake in the order of lines: file, line, field, value and what is allowed.
    """
    try:
        # As JSON, in which a list may stand for a tuple; dates, which no field takes, become text.
        return SuiteFile.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        mistakes = list(_mistakes(error, tree))
    first = min(mistakes, key=lambda mistake: places.line(mistake.path) or 0)
    raise places.error(first.path, first.sentence)


@dataclass(frozen=True)
class _Mistake:
    path: tuple[str, ...]
    sentence: str


def _mistakes(error: ValidationError, tree: Fields) -> Iterable[_Mistake]:
    """One mistake a field: the branches of a union complain one by one."""
    by_field: dict[tuple[str, ...], list[tuple[list[str | int], ErrorDetails]]] = {}
    for details in error.errors():
        path = _inside(details["loc"], tree)
        by_field.setdefault(tuple(part for part in path if isinstance(part, str)), []).append((path, details))
    for field, found in by_field.items():
        depth = max(len(path) for path, _ in found)  # of a union's branches, the one that got furthest was meant
        deepest = [(path, details) for path, details in found if len(path) == depth]
        context = deepest[0][1].get("ctx", {})
        blamed = (*field, context["field"]) if context.get("field") else field
        yield _Mistake(blamed, context.get("sentence") or _sentence(deepest[0][0], [d for _, d in deepest], tree))


def _inside(location: tuple[str | int, ...], tree: Fields) -> list[str | int]:
    """The parts of an error's location that are keys and indices of the file; the others name branches of unions."""
    path: list[str | int] = []
    value: Any = tree
    for part in location:
        known = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if known:
            path.append(part)
            value = value[part]
    return path


def _sentence(path: list[str | int], errors: list[ErrorDetails], tree: Fields) -> str:
    names = [part for part in path if isinstance(part, str)]
    dotted, top = ".".join(names), names[0]
    value: Any = tree
    for name in names:
        value = value[name]
    kinds = {details["type"] for details in errors}
    if kinds == {"extra_forbidden"}:
        return _unknown(names)
    if top in ("sweep", "reported"):
        return f"'{top}' is written as [[{top}]], once for each."
    if kinds & {"table", "dict_type", "model_type", "model_attributes_type"}:
        return f"'{dotted}' is a table of fields, not {value!r}."
    index = "".join(f"[{part}]" for part in path if isinstance(part, int))
    allowed = " or ".join(dict.fromkeys(details["msg"].replace("Input should be", "must be") for details in errors))
    return f"{dotted}{index} {allowed.replace(' or must be ', ' or ')}, not {value!r}."


def _unknown(names: list[str]) -> str:
    tables: dict[str, type[BaseModel]] = {"victim": VictimTable, "student": StudentTable}
    table = SuiteFile if len(names) == 1 else tables[names[0]]
    where = "the suite file" if len(names) == 1 else names[0]
    return str(unknown("field", names[-1], table.model_fields, where))
