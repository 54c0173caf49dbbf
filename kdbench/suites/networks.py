"""The networks of both sides of a suite file, and how each is trained."""

from kdbench import registry
from kdbench.errors import KdbenchError
from kdbench.game.fields import build, plain
from kdbench.game.methods import Recipe
from kdbench.suites.methods import check_distinct
from kdbench.suites.places import Places
from kdbench.suites.suite_file import SuiteFile, VictimTable


def victim(file: SuiteFile, places: Places) -> str:
    """The victim's network."""
    networks = _networks("victim", file.victim, places)
    with places.located("victim", _key(file.victim)):
        if len(networks) != 1:
            raise KdbenchError(f"victim.network names one network, not {len(networks)}.")
    return networks[0]


def students(file: SuiteFile, places: Places) -> tuple[str, ...]:
    """The networks that attackers train, in order."""
    return _networks("student", file.student, places)


def student_recipes(file: SuiteFile, places: Places) -> dict[str, Recipe]:
    """The recipe of each student: `[student.recipe]` with the changes in `[student.recipes.NETWORK]`.

    Some networks do not learn at the rate of others; every attack trains one network by the same recipe. Recipes of
    networks that are not among the students are checked all the same.
    """
    for name in file.student.recipes:
        with places.located("student", "recipes", name):
            registry.find("model", name)
    common, recipes = plain(file.student.recipe), {}
    for name in dict.fromkeys((*students(file, places), *file.student.recipes)):
        with places.located("student", "recipes", name):
            changes = file.student.recipes.get(name, {})
            recipes[name] = build(Recipe, {**common, **changes}, f"student.recipes.{name}")
    return {name: recipes[name] for name in students(file, places)}


def _networks(side: str, table: VictimTable, places: Places) -> tuple[str, ...]:
    if table.network and table.networks:
        raise places.error((side, "networks"), f"{side} has both network and networks; write one of them.")
    with places.located(side, _key(table)):
        networks = table.named()
        if not networks:
            raise KdbenchError(f"{side}.network must name a network, one of {', '.join(registry.names('model'))}.")
        if side == "student":
            check_distinct(networks, "students")
        for name in networks:
            registry.load("model", name)
    return networks


def _key(table: VictimTable) -> str:
    return "networks" if table.networks else "network"
