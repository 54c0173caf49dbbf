"""What the structure tests know of the source tree: its modules, what they import, and their parsed text. Read once."""

import ast
import configparser
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Folders beside the package that setup.cfg maps into it.
MAPPED = {"defenses": "kdbench.defenses", "attacks": "kdbench.attacks", "benchmarks": "kdbench.benchmarks"}


@cache
def modules() -> dict[str, Path]:
    """The file of each module of the package, by its name."""
    found = {}
    for top, package in {"kdbench": "kdbench", **MAPPED}.items():
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            if top != "benchmarks" or parts[0] != "speed":
                found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


@cache
def parsed(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of kdbench that a module imports, anywhere in its file; not itself, and not the bare package."""
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    return frozenset(imported(parsed(module), package)) - {module, "kdbench"}


def imported(tree: ast.AST, package: str) -> set[str]:
    """The modules of kdbench that the statements of `tree`, in a module of `package`, import."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            named = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else base for name in named}
    return {name for name in found if name.partition(".")[0] in {"kdbench", *MAPPED}}


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    above = package.split(".")
    return ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])])


def entry_points() -> dict[str, dict[str, str]]:
    """Group -> registered name -> target, as setup.cfg has them."""
    config = configparser.ConfigParser(delimiters="=")
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = {group: text.split("\n") for group, text in config["options.entry_points"].items()}
    return {
        group: {name.strip(): target.strip() for name, _, target in (line.partition("=") for line in found if line)}
        for group, found in lines.items()
    }


def circles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        path.append(node)
        for other in graph.get(node, ()):
            if other not in order:
                visit(other)
            if other in path:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            component = path[path.index(node) :]
            del path[path.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in order:
            visit(node)
    return found
