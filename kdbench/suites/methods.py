"""The methods that a suite file names: found in the registry, made with their fields, or refused with the line."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from kdbench import registry
from kdbench.errors import KdbenchError
from kdbench.game.data import Dataset
from kdbench.game.fields import build, plain
from kdbench.game.methods import Attack, Defense, Recipe
from kdbench.suites.places import Places
from kdbench.suites.reported import Reported
from kdbench.suites.shipped import defaults
from kdbench.suites.suite import Choice, Suite
from kdbench.suites.suite_file import Fields, SuiteFile

BASES: dict[str, type[Defense] | type[Attack]] = {"defense": Defense, "attack": Attack}
Kind = str  # "defense" or "attack"


class Methods:
    """Makes the methods and data sets of one suite file."""

    def __init__(self, file: SuiteFile, places: Places) -> None:
        self._file, self._places = file, places

    def choices(self, kind: Kind, key: str, names: Sequence[str]) -> tuple[Choice, ...]:
        """The methods of a list such as `defenses`, in order."""
        with self._places.located(key):
            check_distinct(names, key)
            if not names and key != "baselines":  # without baselines no gain is measured, but all else is
                raise KdbenchError(f"{key} must name one {kind} at least, not [].")
            return tuple(self._choice(kind, name, (key,)) for name in names)

    def dataset(self) -> Choice:
        """The data set of the suite."""
        fields = dict(self._file.dataset)
        with self._places.located("dataset"):
            name = str(fields.pop("name", defaults()["dataset"]))
            entry = registry.find("dataset", name)
            return Choice(name, name, build(entry.load(), fields, "dataset"), entry.origin)

    def with_surrogates(self, suite: Suite) -> Suite:
        """The suite with the data sets that attackers draw queries from, each once."""
        return replace(suite, surrogates=tuple(self._surrogates(suite)))

    def check_others(self, suite: Suite) -> None:
        """Make the methods of tables that the suite does not run (`--attack` leaves some out): they must be right, too."""
        for kind, run in (("defense", suite.defenses), ("attack", suite.attacks + suite.baselines)):
            for name in self._file.tables(kind).keys() - {choice.name for choice in run}:
                with self._places.located(kind, name):
                    self._choice(kind, name, (kind, name))

    def check_reported(self, numbers: Sequence[Reported]) -> None:
        """Reported numbers must name methods and networks that exist, whether they are run or not."""
        with self._places.located("reported"):
            for number in numbers:
                for kind, name in (("defense", number.defense), ("attack", number.attack)):
                    if name and name not in self._file.tables(kind):
                        registry.find(kind, name)
                for network in filter(None, (number.student, number.victim)):
                    registry.find("model", network)

    def _choice(self, kind: Kind, name: str, named: tuple[str, ...]) -> Choice:
        """The method behind a name; `named` is the place of the file where the name is chosen."""
        if not re.fullmatch(r"[\w.+-]+", name):
            raise KdbenchError(f"'{name}' cannot name a method: letters, digits, '.', '+', '-' and '_' can.")
        fields = dict(self._file.tables(kind).get(name, {}))
        method = str(fields.pop("method", name))
        with self._places.located(*((kind, name, "method") if method != name else named)):
            entry = registry.find(kind, method)
            cls = _of_kind(kind, entry)
        with self._places.located(kind, name, "method"):
            _check_reference(kind, name, method, cls)
        changes = fields.pop("recipe", None) if kind == "defense" else None
        recipe = None if changes is None else self._recipe(name, changes)
        with self._places.located(kind, name):
            instance = build(cls, _modern(fields, cls), f"{kind}.{name}")
            if isinstance(instance, Attack):
                self._check_needs(name, instance)
        return Choice(name, method, instance, entry.origin, recipe)

    def _surrogates(self, suite: Suite) -> Iterator[Choice]:
        wanted = {name: attack for attack in suite.attacks + suite.baselines for name in _surrogates(attack)}
        for name, attack in wanted.items():
            key = "attacks" if attack in suite.attacks else "baselines"
            with self._places.located(*(("attack", attack.name) if attack.name in self._file.attack else (key,))):
                yield _surrogate(name, attack, suite.dataset)

    def _check_needs(self, name: str, attack: Attack) -> None:
        """Networks and data sets that an attack will ask for exist."""
        for network in attack.networks():
            registry.find("model", network)
        for dataset in attack.surrogate_datasets() if name in self._file.attack else ():
            registry.find("dataset", dataset)

    def _recipe(self, name: str, changes: Any) -> Recipe:
        """The victim's recipe with the changes in `[defense.NAME.recipe]`."""
        with self._places.located("defense", name, "recipe"):
            if not isinstance(changes, dict):
                raise KdbenchError(f"'defense.{name}.recipe' is a table of fields, not {changes!r}.")
            return build(Recipe, {**plain(self._file.victim.recipe), **changes}, f"defense.{name}.recipe")


def with_undefended(suite: Suite) -> Suite:
    """The suite with the undefended victim among its defenses: protection and utility loss are measured against it."""
    if any(choice.instance.is_reference for choice in suite.defenses):
        return suite
    name = defaults()["defenses"][0]
    entry = registry.find("defense", name)
    return replace(suite, defenses=(Choice(name, name, entry.load()(), entry.origin), *suite.defenses))


def check_distinct(names: Sequence[str], among: str) -> None:
    """Raises `KdbenchError` when a name stands twice among `names`."""
    doubled = sorted(name for name in set(names) if names.count(name) > 1)
    if doubled:
        raise KdbenchError(f"'{doubled[0]}' is named twice among the {among}.")


def _of_kind(kind: Kind, entry: registry.Entry) -> type[Defense] | type[Attack]:
    cls = entry.load()
    if isinstance(cls, type) and issubclass(cls, BASES[kind]):
        return cls
    raise KdbenchError(
        f"The {kind} '{entry.name}' of {entry.origin} is not a subclass of kdbench.api.{BASES[kind].__name__}."
    )


def _check_reference(kind: Kind, name: str, method: str, cls: type) -> None:
    """The undefended victim has one name: boards compare all other defenses with it."""
    if kind != "defense" or name == method:
        return
    known = [(cls, method)]
    if name in registry.names("defense"):
        known.append((registry.load("defense", name), name))
    for reference, its_name in known:
        if issubclass(reference, Defense) and reference.is_reference:
            raise KdbenchError(f"'{its_name}' is the undefended victim: it is named so, and nothing else is.")


def _modern(fields: Fields, cls: type[Defense] | type[Attack]) -> Fields:
    """The fields under today's names."""
    for old, new in cls.renamed.items():
        if old in fields and new in fields:
            raise KdbenchError(f"'{old}' is the old name of '{new}': write one of them.")
    return {cls.renamed.get(name, name): value for name, value in fields.items()}


def _surrogates(choice: Choice) -> tuple[str, ...]:
    attack: Attack = choice.instance
    return attack.surrogate_datasets()


def _surrogate(name: str, attack: Choice, dataset: Choice) -> Choice:
    entry = registry.find("dataset", name)
    cls: type[Dataset] = registry.load("dataset", name)
    if name == dataset.method:
        raise KdbenchError(f"attack.{attack.name} draws on '{name}', the data set under attack.")
    if (cls.variant_of or name) == (type(dataset.instance).variant_of or dataset.method):
        raise KdbenchError(
            f"attack.{attack.name} draws on '{name}', which holds the images of '{dataset.method}', the data set under "
            "attack."
        )
    return Choice(name, name, build(cls, {}, "dataset"), entry.origin)
