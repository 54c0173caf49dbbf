"""A benchmark file, typed: which cells, on what data, under which threat model. Mistakes are named with their line."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar

from kdbench import registry
from kdbench.board.results import Published
from kdbench.errors import KdbenchError, unknown
from kdbench.game.fields import Checked, Count, Share, Whole, build, hints, plain
from kdbench.game.methods import Attack, Defense, Recipe
from kdbench.game.robustness import Evasion
from kdbench.game.threat import ThreatModel
from kdbench.runner.sweep import Sweep, spread

Tree = dict[str, Any]
NO_DEFENSE = "none"
T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """A method as a benchmark names it: its label, the registered method behind it, and an instance with its fields.

    recipe: what a defense changes in the victim's recipe for its own trainings. Attacks change nothing: same thief for all.
    files: the fingerprint of the files of a data set that is not the same for everybody.
    """

    label: str
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
class _Rules(Checked):
    """The plain fields at the top of a benchmark file.

    tolerance: accuracy that a defense may cost and still be ranked. precision: "auto" is bf16 where the hardware has it.
    """

    title: str = ""
    seeds: Count | tuple[Whole, ...] = 3
    tolerance: Share = 0.02
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    defenses: tuple[str, ...] = (NO_DEFENSE,)
    attacks: tuple[str, ...] = ("kd",)
    baselines: tuple[str, ...] = ("cross-entropy", "label-smoothing", "hard-label")


@dataclass(frozen=True)
class Figure(Checked):
    """`[[published]]`: an accuracy that a paper reports, of the student of a cell; without an attack, of the victim.

    Without a defense it is a student's that was trained without the victim. evidence: how it is known, as in "code" (the
    official repository), "paper", "issue" (a thread of its authors), "log" (somebody's run of the official code),
    "secondary" (quoted elsewhere) or "memory" (read nowhere: shown as unverified, and never a gate).
    """

    accuracy: Share
    source: str
    evidence: Literal["code", "paper", "issue", "log", "secondary", "memory"]
    defense: str = ""
    attack: str = ""
    student: str = ""
    victim: str = ""

    def of(self, defense: str, attack: str, student: str, victim: str) -> Published | None:
        """What it says of the cell of these labels, if it is about that."""
        said = (self.attack, self.student, self.victim)
        if self.defense != defense or any(
            a not in ("", b) for a, b in zip(said, (attack, student, victim), strict=True)
        ):
            return None
        return Published("student_acc" if self.attack else "victim_acc", self.accuracy, self.source, self.evidence)


@dataclass(frozen=True)
class _Sides(Checked):
    """`[victim]` and `[student]`: the networks; the recipe stands in a table of its own."""

    networks: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """Who plays whom, on what, under which rules."""

    name: str
    title: str
    dataset: Choice
    seeds: tuple[int, ...]
    tolerance: float
    precision: str
    threat: ThreatModel
    evasion: Evasion
    victim: str
    victim_recipe: Recipe
    students: tuple[str, ...]
    student_recipes: Mapping[str, Recipe]
    defenses: tuple[Choice, ...]
    attacks: tuple[Choice, ...]
    baselines: tuple[Choice, ...]
    publics: tuple[Choice, ...] = ()
    published: tuple[Figure, ...] = ()

    def stamped(self, folder: Path) -> "Suite":
        """The same suite, its data sets stamped with the fingerprint of their files below `folder`."""
        dataset, *publics = (
            replace(choice, files=choice.instance.fingerprint(folder)) for choice in (self.dataset, *self.publics)
        )
        return replace(self, dataset=dataset, publics=tuple(publics))


TABLES = ("dataset", "threat", "victim", "student", "robustness", "defense", "attack", "sweep", "published")


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
    return _Reader(file, text, tree, {_parts(path) for path in changes or {}}).suite()


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
    *tables, key = _parts(path)
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

    def suite(self) -> Suite:
        with self._blame("sweep"):
            self._swept = spread(self._tree, self._list(Sweep, "sweep"))
        rules = self._rules()
        with self._blame("seeds"):
            seeds = _seeds(rules.seeds)
        suite = Suite(
            name=Path(self._file).stem,
            title=rules.title,
            dataset=self._dataset(),
            seeds=seeds,
            tolerance=rules.tolerance,
            precision=rules.precision,
            threat=self._table(ThreatModel, "threat"),
            evasion=self._table(Evasion, "robustness"),
            victim=self._victim(),
            victim_recipe=self._table(Recipe, "victim", "recipe"),
            students=self._side("student"),
            student_recipes=self._student_recipes(),
            defenses=self._choices("defense", "defenses", rules.defenses, Defense),
            attacks=self._choices("attack", "attacks", rules.attacks, Attack),
            baselines=self._choices("attack", "baselines", rules.baselines, Attack),
            published=tuple(self._list(Figure, "published")),
        )
        self._check_others(suite)
        return replace(suite, publics=tuple(self._publics(suite)))

    def _publics(self, suite: Suite) -> Iterator[Choice]:
        """The data sets that thieves draw queries from, each once."""
        wanted = {name: choice for choice in suite.attacks + suite.baselines for name in choice.instance.publics()}
        for name, attack in wanted.items():
            with self._blame("attack", attack.label):
                if name == suite.dataset.method:
                    raise KdbenchError(f"attack.{attack.label} draws on '{name}', the data set that the game is about.")
                entry = registry.find("dataset", name)
                yield Choice(name, name, build(entry.load(), {}, "dataset"), entry.origin)

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
        common = self._get("student", "recipe")
        self._table(Recipe, "student", "recipe")
        recipes = {}
        for name in self._side("student"):
            with self._blame("student", "recipes", name):
                changes = self._get("student", "recipes", name)
                recipes[name] = build(Recipe, {**common, **changes}, f"student.recipes.{name}")
        return recipes

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
        doubled = sorted(label for label in set(labels) if labels.count(label) > 1)
        with self._blame(key):
            if doubled:
                raise KdbenchError(f"'{doubled[0]}' is named twice among the {key}.")
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
            others = [label for label in self._get(kind) if label not in {choice.label for choice in played}]
            for label in others:
                with self._blame(kind, label):
                    self._choice(kind, label, base, (kind, label))

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
        written = place in (key for _, key in _keys(self._text))
        made = any(place[: len(change)] == change or change[: len(place)] == place for change in self._changed)
        if place in self._changed or (made and not written):
            return ""
        line = _line(self._text, place)
        return f"{self._file}, line {line}: " if line else f"{self._file}: "


def _seeds(given: int | tuple[int, ...]) -> tuple[int, ...]:
    seeds = tuple(range(given)) if isinstance(given, int) else given
    if not seeds or len(set(seeds)) < len(seeds):
        raise KdbenchError(f"seeds must be a number of seeds or a list of different ones, not {list(seeds)}.")
    return seeds


def _line(text: str, path: tuple[str, ...]) -> int | None:
    """The line (from 1) of the key or table at `path` in a TOML text, else of something in it, else of what holds it."""
    for depth in range(len(path), 0, -1):
        found = [(len(key), number) for number, key in _keys(text) if key[:depth] == path[:depth]]
        if found:
            return min(found)[1]
    return None


def _keys(text: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The lines (from 1) on which a table or a key begins, each with its full path."""
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            table = _parts(header[1])
            yield number, table
        elif key := re.match(r"\s*([\w.\"'+-]+)\s*=", line):
            yield number, (*table, *_parts(key[1]))


def _parts(dotted: str) -> tuple[str, ...]:
    """The names in a dotted key; a quoted one may hold dots."""
    return tuple("".join(names) for names in re.findall(r"""\"([^"]*)\"|'([^']*)'|([^."'\s]+)""", dotted)) or (dotted,)


def with_yardstick(suite: Suite) -> Suite:
    """The suite with `none` among its defenses: protection and utility loss are measured against it."""
    if any(choice.method == NO_DEFENSE for choice in suite.defenses):
        return suite
    entry = registry.find("defense", NO_DEFENSE)
    yardstick = Choice(NO_DEFENSE, NO_DEFENSE, entry.load()(), entry.origin)
    return replace(suite, defenses=(yardstick, *suite.defenses))
