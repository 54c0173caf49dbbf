"""A benchmark file, typed: which cells, on what data, under which threat model. Mistakes are named with their line."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Le

from kdbench import registry
from kdbench.errors import KdbenchError, unknown
from kdbench.evaluation.adversarial import Robustness
from kdbench.game.data import Dataset
from kdbench.game.fields import Checked, Share, Whole, build, hints
from kdbench.game.methods import Attack, Defense, Recipe
from kdbench.game.threat import Scenario
from kdbench.suites.suite import NO_DEFENSE, Choice, Reported, Suite, Tree
from kdbench.suites.sweeps import PLAYED, Sweep, spread, unplayed
from kdbench.suites.toml_lines import keys_of, line_of, parts

T = TypeVar("T")
Seeds = Annotated[int, Ge(1), Le(1000)]  # each is a matrix of its own


@dataclass(frozen=True)
class _Rules(Checked):
    """The plain fields at the top of a benchmark file.

    tolerance: accuracy that a defense may cost and still be ranked. precision: "auto" is bf16 where the hardware has it.
    """

    title: str = ""
    seeds: Seeds | tuple[Whole, ...] = 3
    tolerance: Share = 0.02
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    defenses: tuple[str, ...] = (NO_DEFENSE,)
    attacks: tuple[str, ...] = ("kd",)
    baselines: tuple[str, ...] = ("cross-entropy", "label-smoothing", "hard-label")


@dataclass(frozen=True)
class _Sides(Checked):
    """`[victim]` and `[student]`: the networks; the recipe stands in a table of its own."""

    networks: tuple[str, ...]


TABLES = ("dataset", "scenario", "victim", "student", "robustness", "defense", "attack", "sweep", "reported")


def shipped() -> list[str]:
    """Names of the benchmark files that ship with kdbench."""
    return sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml"))


def load(name: str, changes: Mapping[str, Any] | None = None) -> Suite:
    """The shipped suite `name`, or the one in the file `name`, with `changes` (dotted path -> value) applied.

    Raises `KdbenchError` with file and line for anything unknown or ill-typed.
    """
    file, text = _text(name)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise KdbenchError(f"{file} is not TOML: {error}.") from None
    for path, value in (changes or {}).items():
        _put(tree, path, value)
    return _Reader(file, text, tree, {parts(path) for path in changes or {}}).suite()


def _text(name: str) -> tuple[str, str]:
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise KdbenchError(f"There is no benchmark file {name}.")
        try:
            return name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise KdbenchError(f"{name} is not TOML: its text is not UTF-8.") from None
    if name not in shipped():
        raise KdbenchError(f"{unknown('suite', name, shipped())} A path to a .toml file works too.")
    return f"{name}.toml", (_folder() / f"{name}.toml").read_text(encoding="utf-8")


def _folder() -> Traversable:
    try:
        return files("kdbench.benchmarks") / "suites"
    except ModuleNotFoundError:  # the checkout's kdbench without its wings, as in the registry
        raise KdbenchError(
            "The benchmarks of kdbench cannot be imported. Inside a checkout, run pip install -e ."
        ) from None


def _put(tree: Tree, path: str, value: object) -> None:
    """Set the value at a dotted path, making tables on the way."""
    *tables, key = parts(path)
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise KdbenchError(f"'{path}' cannot be set: '{table}' is a value, not a table.")
    tree[key] = value


class _Blamed(KdbenchError):
    """An error that has its place already."""


class _Reader:
    """Reads one file's tree, and knows the lines to blame."""

    def __init__(self, file: str, text: str, tree: Tree, changed: set[tuple[str, ...]]) -> None:
        self._file, self._text, self._tree, self._changed = file, text, tree, changed
        self._swept: dict[str, str] = {}
        self._sweeps: list[Sweep] = []
        self._idle: list[Sweep] = []

    def suite(self) -> Suite:
        self._spread(self._rules())
        rules = self._rules()
        with self._blame("seeds"):
            seeds = _seeds(rules.seeds)
        reported, left_out = self._reported_numbers()
        suite = Suite(
            name=Path(self._file).stem,
            title=rules.title,
            dataset=self._dataset(),
            seeds=seeds,
            tolerance=rules.tolerance,
            precision=rules.precision,
            scenario=self._table(Scenario, "scenario"),
            robustness=self._table(Robustness, "robustness"),
            victim=self._victim(),
            victim_recipe=self._table(Recipe, "victim", "recipe"),
            students=self._side("student"),
            student_recipes=self._student_recipes(),
            defenses=self._choices("defense", "defenses", rules.defenses, Defense),
            attacks=self._choices("attack", "attacks", rules.attacks, Attack),
            baselines=self._choices("attack", "baselines", rules.baselines, Attack),
            reported=reported,
            left_out=left_out,
        )
        self._check_others(suite)
        self._check_sweeps()
        return replace(suite, surrogates=tuple(self._surrogates(suite)))

    def _spread(self, rules: _Rules) -> None:
        """Put the points of sweeps into the tree, also of methods that are played by default."""
        sweeps = self._list(Sweep, "sweep")
        for sweep in sweeps:
            kind, label = sweep.method
            self._get(kind, label)
            for key in PLAYED[kind]:
                self._tree.setdefault(key, list(getattr(rules, key)))
            for path in sweep.paths:
                if tuple(path) in self._changed:
                    raise KdbenchError(f"{'.'.join(path)} is swept: change the sweep, or stop it by --set 'sweep=[]'.")
        self._idle = unplayed(self._tree, sweeps)
        with self._blame("sweep"):
            self._swept = spread(self._tree, sweeps)
        self._sweeps = sweeps

    def _surrogates(self, suite: Suite) -> Iterator[Choice]:
        """The data sets that thieves draw queries from, each once."""
        wanted = {
            name: choice for choice in suite.attacks + suite.baselines for name in choice.instance.surrogate_datasets()
        }
        for name, attack in wanted.items():
            named = "attacks" if attack in suite.attacks else "baselines"
            with self._blame(*(("attack", attack.name) if attack.name in self._get("attack") else (named,))):
                if name == suite.dataset.method:
                    raise KdbenchError(f"attack.{attack.name} draws on '{name}', the data set that the game is about.")
                cls = registry.load("dataset", name)
                if _variant_of(cls, name) == _variant_of(type(suite.dataset.instance), suite.dataset.method):
                    raise KdbenchError(
                        f"attack.{attack.name} draws on '{name}', which holds the images of '{suite.dataset.method}', "
                        "the data set that the game is about."
                    )
                yield Choice(name, name, build(cls, {}, "dataset"), registry.find("dataset", name).origin)

    def _reported_numbers(self) -> tuple[tuple[Reported, ...], str]:
        """What papers say of the game as it was changed, and a sentence about what they say of another one."""
        written = self._list(Reported, "reported")
        lost = {path: [said for said in written if said.lost(path)] for path in sorted(self._changed)}
        kept = tuple(said for said in written if not any(said in those for those in lost.values()))
        for said in kept:
            self._check_reported(said)
        if len(kept) == len(written):
            return kept, ""
        causes = ", ".join(".".join(path) for path, those in lost.items() if those)
        count = f"{len(written) - len(kept)} of {len(written)}"
        return kept, f"{count} published figures are not shown: they are not about a game with another {causes}."

    def _check_reported(self, said: Reported) -> None:
        """The names in it must be those of something, whether it is played or not."""
        with self._blame("reported"):
            for kind, label in (("defense", said.defense), ("attack", said.attack)):
                if label and label not in self._get(kind):
                    registry.find(kind, label)
            for network in filter(None, (said.student, said.victim)):
                registry.find("model", network)

    def _list(self, cls: type[T], key: str) -> list[T]:
        """The tables of an array of tables, such as `[[sweep]]`."""
        tables = self._tree.get(key, [])
        with self._blame(key):
            if not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
                raise KdbenchError(f"'{key}' is written as [[{key}]], once for each.")
            return [build(cls, table, key) for table in tables]

    def _rules(self) -> _Rules:
        known = (*hints(_Rules), *TABLES)
        for key in [key for key in self._tree if key not in known]:
            with self._blame(key):
                raise unknown("field", key, known, "the benchmark file")
        values = {key: value for key, value in self._tree.items() if key not in TABLES}
        with self._blame():
            return build(_Rules, values, "benchmark")

    def _dataset(self) -> Choice:
        given = self._tree.get("dataset", "digits")
        values = dict(given) if isinstance(given, dict) else {"name": given}
        with self._blame("dataset"):
            if not isinstance(given, dict | str):
                raise KdbenchError(f"'dataset' is a name or one table of fields, [dataset], not {given!r}.")
            name = str(values.pop("name", "digits"))
            entry = registry.find("dataset", name)
            return Choice(name, name, build(entry.load(), values, "dataset"), entry.origin)

    def _victim(self) -> str:
        networks = self._side("victim")
        with self._blame("victim", self._spelling("victim")):
            if len(networks) != 1:
                raise KdbenchError(f"victim.network names one network, not {len(networks)}.")
        return networks[0]

    def _side(self, side: str) -> tuple[str, ...]:
        table = self._get(side)
        known = ("network", "networks", "recipe", *(["recipes"] if side == "student" else []))
        stray = sorted(set(table) - set(known))
        with self._blame(side, *stray[:1]):
            if stray:
                raise unknown("field", stray[0], known, side)
        with self._blame(side, self._spelling(side)):
            given = table.get(self._spelling(side))
            if not given:
                raise KdbenchError(f"{side}.network must name a network, one of {', '.join(registry.names('model'))}.")
            networks = build(_Sides, {"networks": [given] if isinstance(given, str) else given}, side).networks
            if side == "student":
                _once(networks, "students")
            for name in networks:
                registry.load("model", name)
        return networks

    def _student_recipes(self) -> dict[str, Recipe]:
        """The recipe of each student: `[student.recipe]` with the changes in `[student.recipes.<network>]`.

        Some networks do not learn at the rate of others; whoever steals with one trains it alike.
        """
        for name in self._get("student", "recipes"):
            with self._blame("student", "recipes", name):
                registry.find("model", name)
        common, students = self._get("student", "recipe"), self._side("student")
        self._table(Recipe, "student", "recipe")
        recipes = {}
        for name in dict.fromkeys((*students, *self._get("student", "recipes"))):
            with self._blame("student", "recipes", name):
                changes = self._get("student", "recipes", name)
                recipes[name] = build(Recipe, {**common, **changes}, f"student.recipes.{name}")
        return {name: recipes[name] for name in students}

    def _spelling(self, side: str) -> str:
        """Whether the networks of a side stand under `network` or `networks`; what was changed counts."""
        written = [key for key in ("networks", "network") if key in self._get(side)]
        changed = [key for key in written if (side, key) in self._changed]
        if len(written) == 2 and not changed:
            with self._blame(side, "networks"):
                raise KdbenchError(f"{side} has both network and networks; write one of them.")
        return (changed or written or ["network"])[0]

    def _table(self, cls: type, *path: str) -> Any:
        with self._blame(*path):
            return build(cls, self._get(*path), ".".join(path))

    def _choices(self, kind: str, key: str, labels: Sequence[str], base: type) -> tuple[Choice, ...]:
        with self._blame(key):
            _once(labels, key)
            if not labels and key != "baselines":  # without these there is no net gain, and all else
                raise KdbenchError(f"{key} must name one {kind} at least, not [].")
            return tuple(self._choice(kind, label, base, (key,)) for label in labels)

    def _choice(self, kind: str, label: str, base: type, named: tuple[str, ...]) -> Choice:
        """The method that a label stands for; `named` is the place where the label was chosen."""
        if not re.fullmatch(r"[\w.+-]+", label):
            raise KdbenchError(f"'{label}' cannot be a label: letters, digits, '.', '+', '-' and '_' can.")
        values = dict(self._get(kind, label))
        method = str(values.pop("method", label))
        if (label == NO_DEFENSE) != (method == NO_DEFENSE) and kind == "defense":
            with self._blame(kind, label, "method"):
                raise KdbenchError(
                    f"'{NO_DEFENSE}' is the yardstick: its label and its method go together, not with others."
                )
        recipe = self._own_recipe(label) if kind == "defense" and values.pop("recipe", None) is not None else None
        with self._blame(*((kind, label, "method") if method != label else named)):
            entry = registry.find(kind, method)
            cls = entry.load()
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise KdbenchError(
                f"The {kind} '{method}' of {entry.origin} is not a subclass of kdbench.api.{base.__name__}."
            )
        with self._blame(kind, label):
            choice = Choice(label, method, build(cls, values, f"{kind}.{label}"), entry.origin, recipe)
            for name in choice.instance.networks() if kind == "attack" else ():
                registry.find("model", name)
            for name in choice.instance.surrogate_datasets() if kind == "attack" and label in self._get(kind) else ():
                registry.find("dataset", name)
        return choice

    def _own_recipe(self, label: str) -> Recipe:
        """The victim's recipe with the changes in `[defense.<label>.recipe]`."""
        changes = self._get("defense", label, "recipe")
        with self._blame("defense", label, "recipe"):
            return build(Recipe, {**self._get("victim", "recipe"), **changes}, f"defense.{label}.recipe")

    def _check_others(self, suite: Suite) -> None:
        """Tables of methods that are not played (`--attack` leaves some out) must be right all the same."""
        for kind, base, played in (
            ("defense", Defense, suite.defenses),
            ("attack", Attack, suite.attacks + suite.baselines),
        ):
            others = [label for label in self._get(kind) if label not in {choice.name for choice in played}]
            for label in others:
                with self._blame(kind, label):
                    self._choice(kind, label, base, (kind, label))

    def _check_sweeps(self) -> None:
        """A sweep of what is not played does nothing: fine when the command line chose among the file's methods."""
        for sweep in self._idle:
            kind, label = sweep.method
            chosen = any((key,) in self._changed for key in PLAYED[kind]) and ("sweep",) not in self._changed
            if label not in self._swept and not chosen:  # a point of another sweep is played if that one is
                with self._blame(*sweep.paths[0]):
                    keys = " or ".join(PLAYED[kind])
                    raise KdbenchError(f"the {kind} '{label}' is swept but not played: name it among the {keys}.")

    def _get(self, *path: str) -> Tree:
        tree: Any = self._tree
        for depth, name in enumerate(path, 1):
            tree = tree.get(name, {})
            if not isinstance(tree, dict):
                with self._blame(*path[:depth]):
                    raise KdbenchError(f"'{'.'.join(path[:depth])}' is a table of fields, not {tree!r}.")
        found: Tree = tree
        return found

    @contextmanager
    def _blame(self, *path: str) -> Iterator[None]:
        """Put file and line before an error inside."""
        try:
            yield
        except _Blamed:
            raise
        except KdbenchError as error:
            raise _Blamed(f"{self._place((*path, error.field) if error.field else path)}{error}") from None

    def _place(self, place: tuple[str, ...]) -> str:
        """File and line of a place, as the beginning of a sentence; empty when it comes from the command line."""
        place = tuple(self._swept.get(name, name) for name in place)
        written = place in (key for _, key in keys_of(self._text))
        made_by = [number for number, sweep in enumerate(self._sweeps) if list(place) in sweep.paths]
        if made_by and not written:
            if ("sweep",) in self._changed:
                return ""
            headers = [line for line, key in keys_of(self._text) if key == ("sweep",)]
            return f"{self._file}, line {headers[made_by[0]]}: " if len(headers) > made_by[0] else ""
        made = any(place[: len(change)] == change or change[: len(place)] == place for change in self._changed)
        if place in self._changed or (made and not written):
            return ""
        line = line_of(self._text, place)
        return f"{self._file}, line {line}: " if line else f"{self._file}: "


def _once(names: Sequence[str], among: str) -> None:
    doubled = sorted(name for name in set(names) if names.count(name) > 1)
    if doubled:
        raise KdbenchError(f"'{doubled[0]}' is named twice among the {among}.")


def _variant_of(dataset: type[Dataset], name: str) -> str:
    """The data set whose images `dataset`, registered as `name`, holds; mostly its own."""
    return dataset.variant_of or name


def _seeds(given: int | tuple[int, ...]) -> tuple[int, ...]:
    seeds = tuple(range(given)) if isinstance(given, int) else given
    if not seeds or len(set(seeds)) < len(seeds):
        raise KdbenchError(f"seeds must be a number of seeds or a list of different ones, not {list(seeds)}.")
    return seeds
