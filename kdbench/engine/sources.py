"""Digests of source code: a stage whose code changed is another stage."""

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import kdbench.game
from kdbench.errors import KdbenchError

REFEREES = ("referee.py", "robustness.py", "sparing.py")


def source_digest(thing: Any) -> str:
    """Digest of the module that defines `thing` and of the siblings that it imports relatively, directly or not.

    Modules of the current folder are loose files, which cannot: whatever of that folder they import counts. Raises
    `KdbenchError` when there is no source file: such a method could change without anyone noticing.
    """
    module = inspect.getmodule(thing)
    if module is None or not getattr(module, "__file__", None):
        raise KdbenchError(f"{thing!r} has no source file; methods and networks must come from a module on disk.")
    return _module_digest(module.__name__, _file(module))


@cache
def engine_digest(judging: bool) -> str:
    """Digest of the rules of the game as far as they shape a stage; the referee's only when it is `judging`."""
    game = Path(next(iter(kdbench.game.__path__)))
    runner = Path(__file__).parent / "stages.py"
    files = sorted(path for path in game.glob("*.py") if judging or path.name not in REFEREES)
    return _digest([*files, runner])


@cache
def _module_digest(name: str, file: Path) -> str:
    seen: dict[str, Path] = {}
    todo = [(name, file)]
    while todo:
        name, file = todo.pop()
        if name not in seen:
            seen[name] = file
            todo.extend(_siblings(name, file))
    return _digest(seen[name] for name in sorted(seen))


def _siblings(name: str, file: Path) -> list[tuple[str, Path]]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    loose = _is_loose(name, file)
    found = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom) and (node.level or (loose and _lies_here(str(node.module)))):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import) and loose:
            found += [alias.name for alias in node.names if _lies_here(alias.name)]
    return [(module, path) for module in found if (path := _origin(module))]


def _is_loose(name: str, file: Path) -> bool:
    """Whether a module is found by standing in its folder: somebody's own code."""
    depth = name.count(".") + (file.name == "__init__.py")
    return file.resolve().parents[depth] == Path.cwd() and _lies_here(name)


def _lies_here(module: str) -> bool:
    top = module.partition(".")[0]  # asked first: to find a module below a package imports the package
    return top != "kdbench" and (Path(top).is_dir() or Path(f"{top}.py").is_file())


def _origin(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a class or function of a module that is not a package
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _file(module: ModuleType) -> Path:
    return Path(str(module.__file__))


def _digest(files: Iterable[Path]) -> str:
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return sha.hexdigest()[:16]
