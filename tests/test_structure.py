"""The structure of the package: who imports whom, what names no method, and how large a file may become."""

import ast
from itertools import combinations

import pytest

from source_tree import ROOT, circles, entry_points, imported, imports, modules, parsed

# Rooms, by layer. A module imports modules of its own room and of rooms in lower layers, and nothing else.
LAYERS = [
    {"kdbench.__main__"},
    {"kdbench.cli"},
    {"kdbench", "kdbench.testing", "kdbench.listing"},
    {"kdbench.runs"},
    {"kdbench.engine", "kdbench.board"},
    {"kdbench.suites"},
    {"kdbench.defenses", "kdbench.attacks", "kdbench.zoo"},
    {"kdbench.api"},
    {"kdbench.registry"},
    {"kdbench.evaluation"},
    {"kdbench.training"},
    {"kdbench.game"},
    {"kdbench.records"},
    {"kdbench.migration"},
    {"kdbench.metrics"},
    {"kdbench.errors", "kdbench.atomic", "kdbench.benchmarks"},
]
# Within a room: no module imports one that stands before it, not even through others.
ORDERS = [
    ["engine.scheduler", "engine.worker", "engine.stages", "engine.specs"],
    ["engine.stages", "engine.store"],
    ["board.report", "board.formats", "board.document"],
    ["board.report", "board.plots", "board.study", "board.comparisons"],
    ["board.report", "board.tables", "board.study", "board.intervals"],
    ["suites.reader", "suites.methods", "suites.suite_file", "suites.suite"],
]
METHODS = ("kdbench.defenses", "kdbench.attacks")
CORE = sorted(module for module in modules() if not module.startswith(METHODS))
MOST_LINES, MOST_LINES_OF_A_CLASS = 300, 200


def layer(module: str) -> tuple[int, str]:
    """Number and name of the room of a module."""
    room = module
    while room:
        for number, rooms in enumerate(LAYERS):
            if room in rooms and (room != "kdbench" or module == room):
                return number, room
        room = room.rpartition(".")[0]
    raise LookupError(f"{module} stands in no room of tests/test_structure.py")


# Who imports whom


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    number, room = layer(module)
    wrong = [
        other for other in imports(module) if layer(other)[1] != room and layer(other)[0] <= number
    ]  # fmt: skip
    assert not wrong, f"{module} imports {wrong}, which do not lie below it"


def test_a_module_outside_all_rooms_is_noticed() -> None:
    with pytest.raises(LookupError, match=r"kdbench\.nowhere stands in no room"):
        layer("kdbench.nowhere")


def test_nothing_imports_in_circles() -> None:
    assert circles({module: imports(module) for module in modules()}) == []


def test_a_circle_would_be_found() -> None:
    graph = {"a": frozenset("b"), "b": frozenset("cd"), "c": frozenset("a"), "d": frozenset("e"), "e": frozenset()}
    assert circles(graph) == [["a", "b", "c"]]


def test_imports_are_found_wherever_they_stand() -> None:
    text = "def late():\n    from . import fields\n    from ..errors import unknown\n    import kdbench.metrics\n"
    found = imported(ast.parse(text), "kdbench.game")
    assert found == {"kdbench.game.fields", "kdbench.errors", "kdbench.metrics"}


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order[0])
def test_rooms_are_ordered_inside(order: list[str]) -> None:
    for upper, lower in combinations([f"kdbench.{name}" for name in order], 2):
        found = [module for module in modules() if f"{module}.".startswith(f"{lower}.")]
        assert found, f"there is no {lower}: the order is out of date"
        for module in found:
            above = [name for name in reached(module) if f"{name}.".startswith(f"{upper}.")]
            assert not above, f"{module} needs {above}, which should need it"


def reached(module: str) -> set[str]:
    """All modules that importing a module imports."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports(waiting.pop()) - found:
            found.add(name)
            if name in modules():
                waiting.append(name)
    return found


@pytest.mark.parametrize("module", sorted(m for m in modules() if m.startswith(METHODS) and m not in METHODS))
def test_methods_import_the_api_and_siblings_only(module: str) -> None:
    package = module.rpartition(".")[0]
    others = {name for name in imports(module) if name != "kdbench.api" and not name.startswith(f"{package}.")}
    assert not others, f"{module} imports {others}; methods import kdbench.api and siblings"


# The core names no method


def test_the_core_names_no_class_of_a_method() -> None:
    groups = entry_points()
    classes = {target.partition(":")[2] for group in METHODS for target in groups[group].values()}
    assert len(classes) > 20
    for module in CORE:
        names = {node.id for node in ast.walk(parsed(module)) if isinstance(node, ast.Name)}
        assert not names & classes, f"{module} names {names & classes}"


def test_the_core_names_no_method_as_a_string() -> None:
    groups = entry_points()
    methods = {name for group in METHODS for name in groups[group]}
    core = [module for module in CORE if module != "kdbench.migration"]  # which says what old records did not
    literals = [values for module in core for values in Literals(parsed(module)).declared]
    found = [
        f"{module}:{node.lineno} {node.value!r}" for module in core for node in named(parsed(module), methods, literals)
    ]
    assert not found, "ask the class for an attribute instead: " + ", ".join(found)


@pytest.mark.parametrize(
    ("text", "is_named"),
    [
        ("NO_DEFENSE = 'none'", True),
        ("x.method == 'none'", True),
        ("attacks = ('kd',)", True),
        ("'''kd'''", False),
        ("level: Literal['none', 'fast'] = 'none'", False),
        ("__all__ = ['kd']", False),
        ("x.level == 'none'", False),
        ("f(level='none')", False),
        ("choices(['none', 'fast'])", False),
        ("choices(['none', 'nasty'])", True),
    ],
)
def test_a_name_of_a_method_is_told_from_the_same_word_of_another_field(text: str, is_named: bool) -> None:
    found = named(ast.parse(text), {"none", "kd", "nasty"}, [("level", frozenset({"none", "fast"}))])
    assert bool(found) is is_named


class Literals(ast.NodeVisitor):
    """The fields that a module declares with a `Literal` type: name and values."""

    def __init__(self, tree: ast.Module) -> None:
        self.declared: list[tuple[str, frozenset[str]]] = []
        self.visit(tree)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """A field of a class, or an option of a function."""
        values = strings(node.annotation)
        if isinstance(node.target, ast.Name) and len(values) > 1:
            self.declared.append((node.target.id, values))


def strings(node: ast.AST) -> frozenset[str]:
    """All strings in a piece of syntax."""
    found = (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant))
    return frozenset(value for value in found if isinstance(value, str))


def named(tree: ast.Module, methods: set[str], literals: list[tuple[str, frozenset[str]]]) -> list[ast.Constant]:
    """The strings that are names of methods.

    Docstrings are none, nor is a name that a module exports. Neither is a word that a field of the core has among its
    values, such as "none" of a level:
    where the word stands in the type, is given to or compared with the field, or stands in a list of its values alone.
    """
    plain: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant() as docstring):
                plain.add(id(docstring))
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=exported)):
                plain |= {id(name) for name in exported}
        for field, values in literals:
            if is_about(node, field) or (
                isinstance(node, ast.List | ast.Tuple) and 1 < len(strings(node)) <= len(values & strings(node))
            ):
                plain |= {id(n) for n in ast.walk(node) if isinstance(n, ast.Constant) and n.value in values}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in methods]
    return [node for node in constants if id(node) not in plain]


def is_about(node: ast.AST, field: str) -> bool:
    """Whether syntax gives a value to a field of that name, or compares it."""
    match node:
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.keyword(arg=name):
            return name == field
        case ast.Compare(left=ast.Attribute(attr=name)) | ast.Compare(left=ast.Name(id=name)):
            return name == field
    return False


# What setup.cfg must say


def test_every_method_file_is_registered() -> None:
    targets = {target.partition(":")[0] for found in entry_points().values() for target in found.values()}
    for folder in ("defenses", "attacks"):
        for path in (ROOT / folder).glob("[!_]*.py"):
            assert f"kdbench.{folder}.{path.stem}" in targets, f"{folder}/{path.name} has no entry point in setup.cfg"


# How large things may become


def test_no_file_is_long() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules().items()}
    long = {module: length for module, length in lengths.items() if length > MOST_LINES}
    assert not long, f"split by topic: {long}"


def test_no_class_is_long() -> None:
    classes = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module in modules()
        for node in ast.walk(parsed(module))
        if isinstance(node, ast.ClassDef)
    }
    long = {name: length for name, length in classes.items() if length > MOST_LINES_OF_A_CLASS}
    assert not long, f"split by topic: {long}"


def test_stages_read_typed_specifications_not_string_keys() -> None:
    reads = [
        f"line {node.lineno}: [{node.slice.value!r}]"
        for node in ast.walk(parsed("kdbench.engine.stages"))
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
    ]
    assert not reads


def test_no_class_has_the_name_of_another() -> None:
    """A name that stands for two things makes a reader look twice."""
    found: dict[str, list[str]] = {}
    for module in modules():
        for node in parsed(module).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    twice = {name: places for name, places in found.items() if len(places) > 1}
    assert not twice, twice
