"""Errors are sentences for the person at the keyboard: what was asked, what is possible, what to do."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class KdbenchError(Exception):
    """The user's mistake, or a broken rule of the suite; its text is one sentence, shown without a traceback."""

    field: str = ""
    """The field of a file or a method that is at fault, where there is one."""


class Diverged(KdbenchError):
    """A training whose loss is no longer finite: a failed cell with its epoch, not a number."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"training diverged: the loss was not finite in epoch {epoch}")
        self.epoch = epoch


class Refused(KdbenchError):
    """The oracle does not answer: the query is past the budget, or asks for more than the access level allows."""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> KdbenchError:
    """The error for a name that does not exist, with the nearest one that does.

    >>> print(unknown("defense", "nastty", ["none", "nasty"]))
    There is no defense 'nastty'. Did you mean 'nasty'? Known: nasty, none.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    place = f" in {where}" if where else ""
    return KdbenchError(f"There is no {kind} '{name}'{place}.{guess} Known: {', '.join(names) or 'nothing'}.")


def invalid(error: "ValidationError", where: str) -> KdbenchError:
    """The error for text of a file that does not fit its types: place, field, value, and what is allowed."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "[key]")
    allowed = first["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    match first["type"]:
        case "json_invalid":
            return KdbenchError(f"{where} is not JSON: {allowed.removeprefix('Invalid JSON: ')}.")
        case "missing":
            return KdbenchError(f"{where}: the field '{field}' is missing.")
        case "unexpected_keyword_argument":
            return KdbenchError(f"{where}: there is no field '{field}'.")
    if not field:
        return KdbenchError(f"{where}: the record {allowed}.")
    value = repr(first["loc"][-2] if first["loc"][-1] == "[key]" else first["input"])
    return KdbenchError(f"{where}: {field} {allowed}, not {value if len(value) < 100 else value[:97] + '...'}.")
