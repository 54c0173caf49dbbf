"""Errors are sentences for the person at the keyboard: what was asked, what is possible, what to do."""

import difflib
from collections.abc import Iterable


class KdbenchError(Exception):
    """The user's mistake, or a rule of the game that was broken; its text is one sentence, shown without a traceback."""

    field: str = ""
    """The field of a file or a method that is at fault, where there is one."""


class Diverged(KdbenchError):
    """A training whose loss is no longer finite: a failed cell with its epoch, not a number."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"training diverged: the loss was not finite in epoch {epoch}")
        self.epoch = epoch


class Refused(KdbenchError):
    """An oracle that does not answer: the question is past the budget or above the grant."""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> KdbenchError:
    """The error for a name that does not exist, with the nearest one that does.

    >>> print(unknown("defense", "nastty", ["none", "nasty"]))
    There is no defense 'nastty'. Did you mean 'nasty'? Known: nasty, none.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    place = f" in {where}" if where else ""
    return KdbenchError(f"There is no {kind} '{name}'{place}.{guess} Known: {', '.join(names) or 'none'}.")
