"""Numbers that papers report: which cells they are about, and when a change makes them say nothing any more."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from kdbench.errors import KdbenchError
from kdbench.game.fields import Checked, Share
from kdbench.records import ReportedNumber
from kdbench.suites.sweeps import SWEPT


@dataclass(frozen=True)
class Reported(Checked):
    """`[[reported]]`: an accuracy that a paper reports, of the student of a cell; without an attack, of the victim.

    Without a defense it is that of a student trained without the victim. student, victim: their networks; one that is
    not named is whichever the suite file has. evidence: how the number is known:

    - "code": from the official repository, "paper": from the paper, "issue": from a thread of its authors,
    - "log": from somebody's run of the official code, "secondary": quoted elsewhere,
    - "memory": read nowhere. It is shown as unverified, and never a condition of anything.
    """

    accuracy: Share
    source: str
    evidence: Literal["code", "paper", "issue", "log", "secondary", "memory"]
    defense: str = ""
    attack: str = ""
    student: str = ""
    victim: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.defense and not self.attack:
            raise KdbenchError("reported: name a defense, for its victim, or an attack, for its student, or both.")

    def of(self, defense: str, attack: str, student: str, victim: str) -> ReportedNumber | None:
        """What it says of the cell of these methods and networks, if it is about that cell."""
        named = zip((self.attack, self.student, self.victim), (attack, student, victim), strict=True)
        if self.defense != defense or any(said not in ("", cell) for said, cell in named):
            return None
        return ReportedNumber("student_acc" if self.attack else "victim_acc", self.accuracy, self.source, self.evidence)

    def lost(self, path: Sequence[str]) -> bool:
        """Whether a change at this place of the suite file makes it a number about something else.

        Seeds, evaluation and the other methods of the suite do not matter; nor do networks, where it names its own.
        """
        side, *rest = path
        if side == "victim":
            return bool(self.defense) and _is_other_network(self.victim, rest)
        if side == "student":
            return bool(self.attack) and _is_other_network(self.student, rest)
        if side in ("defense", "attack"):
            return not rest or _is_made_from(self.defense if side == "defense" else self.attack, rest[0])
        if side == "sweep":
            return SWEPT in self.defense + self.attack
        return side == "dataset" or (side == "scenario" and bool(self.attack))


def still_about(written: Sequence[Reported], changed: Iterable[tuple[str, ...]]) -> tuple[tuple[Reported, ...], str]:
    """The numbers that are still about the suite after the changes, and a sentence about the others ("": none)."""
    lost = {path: [number for number in written if number.lost(path)] for path in sorted(changed)}
    kept = tuple(number for number in written if not any(number in those for those in lost.values()))
    if len(kept) == len(written):
        return kept, ""
    causes = ", ".join(".".join(path) for path, those in lost.items() if those)
    count = f"{len(written) - len(kept)} of {len(written)}"
    return kept, f"{count} reported numbers are not shown: they are not about a suite with another {causes}."


def _is_other_network(network: str, path: Sequence[str]) -> bool:
    """Whether a change at this place of a side trains the number's network ("": not named) in another way."""
    match path:
        case ["network" | "networks"]:
            return not network
        case ["recipes", other, *_]:
            return network in ("", other)
    return True


def _is_made_from(method: str, name: str) -> bool:
    """Whether the method of a number is that of the table `name`, or a point of its sweep."""
    return method == name or method.startswith(f"{name}{SWEPT}")
