"""A benchmark, typed: who plays whom, on what, under which rules, and what papers say of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kdbench import registry
from kdbench.errors import KdbenchError
from kdbench.evaluation.adversarial import Robustness
from kdbench.game.fields import Checked, Share, plain
from kdbench.game.methods import Recipe
from kdbench.game.threat import Scenario
from kdbench.records import ReportedNumber
from kdbench.suites.sweeps import SWEPT

Tree = dict[str, Any]
NO_DEFENSE = "none"


@dataclass(frozen=True)
class Choice:
    """A method as a benchmark names it: its label, the registered method behind it, and an instance with its fields.

    recipe: what a defense changes in the victim's recipe for its own trainings. Attacks change nothing: same thief for all.
    files: the fingerprint of the files of a data set that is not the same for everybody.
    """

    name: str
    method: str
    instance: Any
    origin: str
    recipe: Recipe | None = None
    files: str = ""

    @property
    def fields(self) -> Tree:
        """All hyper-parameters, defaults included."""
        values: Tree = plain(self.instance)
        return values


@dataclass(frozen=True)
class Reported(Checked):
    """`[[reported]]`: an accuracy that a paper reports, of the student of a cell; without an attack, of the victim.

    Without a defense it is a student's that was trained without the victim. evidence: how it is known, as in "code" (the
    official repository), "paper", "issue" (a thread of its authors), "log" (somebody's run of the official code),
    "secondary" (quoted elsewhere) or "memory" (read nowhere: shown as unverified, and never a gate).
    student, victim: their networks; where one is not named, it is whichever the benchmark file has.
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
            raise KdbenchError("published: name a defense, for its victim, or an attack, for its student, or both.")

    def of(self, defense: str, attack: str, student: str, victim: str) -> ReportedNumber | None:
        """What it says of the cell of these labels, if it is about that."""
        said = (self.attack, self.student, self.victim)
        if self.defense != defense or any(
            a not in ("", b) for a, b in zip(said, (attack, student, victim), strict=True)
        ):
            return None
        return ReportedNumber("student_acc" if self.attack else "victim_acc", self.accuracy, self.source, self.evidence)

    def lost(self, path: Sequence[str]) -> bool:
        """Whether it says nothing of the game any more after a change at this place of the benchmark file.

        Seeds, judges and who else plays are no matter to it; nor are networks, where it names its own.
        """
        side, *rest = path
        if side == "victim":
            return bool(self.defense) and _another(self.victim, rest)
        if side == "student":
            return bool(self.attack) and _another(self.student, rest)
        if side in ("defense", "attack"):
            return not rest or _played_as(self.defense if side == "defense" else self.attack, rest[0])
        if side == "sweep":
            return SWEPT in self.defense + self.attack
        return side == "dataset" or (side == "scenario" and bool(self.attack))


def _another(network: str, path: Sequence[str]) -> bool:
    """Whether what a figure's network ("": not named) has learnt is another with a change at this place of its side."""
    match path:
        case ["network" | "networks"]:
            return not network
        case ["recipes", other, *_]:
            return network in ("", other)
    return True


def _played_as(method: str, name: str) -> bool:
    """Whether the method of a figure is played by the table of that label, or is a point of its sweep."""
    return method == name or method.startswith(f"{name}{SWEPT}")


@dataclass(frozen=True)
class Suite:
    """Who plays whom, on what, under which rules.

    left_out: why published figures of the file are not among `reported`, in a sentence; empty where all are.
    """

    name: str
    title: str
    dataset: Choice
    seeds: tuple[int, ...]
    tolerance: float
    precision: str
    scenario: Scenario
    robustness: Robustness
    victim: str
    victim_recipe: Recipe
    students: tuple[str, ...]
    student_recipes: Mapping[str, Recipe]
    defenses: tuple[Choice, ...]
    attacks: tuple[Choice, ...]
    baselines: tuple[Choice, ...]
    surrogates: tuple[Choice, ...] = ()
    reported: tuple[Reported, ...] = ()
    left_out: str = ""

    def stamped(self, folder: Path) -> "Suite":
        """The same suite, its data sets stamped with the fingerprint of their files below `folder`."""
        dataset, *surrogates = (
            replace(choice, files=choice.instance.fingerprint(folder)) for choice in (self.dataset, *self.surrogates)
        )
        return replace(self, dataset=dataset, surrogates=tuple(surrogates))


def with_undefended(suite: Suite) -> Suite:
    """The suite with `none` among its defenses: protection and utility loss are measured against it."""
    if any(choice.method == NO_DEFENSE for choice in suite.defenses):
        return suite
    entry = registry.find("defense", NO_DEFENSE)
    undefended = Choice(NO_DEFENSE, NO_DEFENSE, entry.load()(), entry.origin)
    return replace(suite, defenses=(undefended, *suite.defenses))
