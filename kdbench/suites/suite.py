"""A suite, typed: which defenses meet which attacks, on what data, in which scenario, and what papers report of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdbench.evaluation.adversarial import Robustness
from kdbench.game.fields import plain
from kdbench.game.methods import Recipe
from kdbench.game.threat import Scenario
from kdbench.suites.reported import Reported


@dataclass(frozen=True)
class Choice:
    """A method or data set as a suite names it.

    name: its name in the suite file. method: the registered name behind it. instance: the object with its fields.
    origin: the distribution that registers it. recipe: what a defense changes in the victim's recipe for its own
    trainings; attacks change nothing, so that all students are trained alike. files: the digest of the files of a data
    set that is not the same for everybody.
    """

    name: str
    method: str
    instance: Any
    origin: str
    recipe: Recipe | None = None
    files: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """All hyper-parameters, defaults included."""
        values: dict[str, Any] = plain(self.instance)
        return values


@dataclass(frozen=True)
class Suite:
    """Which defenses meet which attacks, on what data, in which scenario.

    tolerance: accuracy (a fraction) that a defense may cost and still be ranked. left_out: why reported numbers of the
    file are not among `reported`, in a sentence; "" where all are.
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
        """The same suite, its data sets with the digest of their files below `folder`."""
        dataset, *surrogates = (
            replace(choice, files=choice.instance.fingerprint(folder)) for choice in (self.dataset, *self.surrogates)
        )
        return replace(self, dataset=dataset, surrogates=tuple(surrogates))
