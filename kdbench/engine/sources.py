"""Digests of source code: a stage whose code changed is another stage. Words do not count: comments and docstrings.

A digest is of the tokens that remain, not of a syntax tree, which is written differently by other versions of Python.
"""

import ast
import hashlib
import importlib.util
import inspect
import io
import tokenize
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kdbench
from kdbench.errors import KdbenchError

PACKAGE = Path(kdbench.__file__).parent
STAGE_CODE = ("kdbench.engine.stages", "kdbench.engine.numerics")  # the code of stages starts here
ROOMS = {"data": ("game",), "evaluate": ("game", "training", "evaluation")}  # whose code decides, by kind of stage
OF_TRAINING = ("game", "training")  # the same for all kinds in which something is trained
WORDS = frozenset({tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER})
LAYOUT = frozenset({tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT})
Find = Callable[[str], Path | None]
Token = tuple[str, str]
Position = tuple[int, int]


def source_digest(thing: Any) -> str:
    """Digest of the module that defines `thing` and of the modules beside it that it imports, directly or not.

    Those are what it imports relatively, or by the name of its own package. Modules of the current folder are loose
    files, which have no package: whatever of that folder they import counts. Raises `KdbenchError` when there is no
    source file: such a method could change without anyone noticing.
    """
    module = inspect.getmodule(thing)
    if module is None or not getattr(module, "__file__", None):
        raise KdbenchError(f"{thing!r} has no source file; methods and networks must come from a module on disk.")
    return _installed_digest(module.__name__, Path(str(module.__file__)))


@cache
def _installed_digest(name: str, file: Path) -> str:
    return module_digest(name, file, _installed)


def module_digest(name: str, file: Path, find: Find) -> str:
    """Digest of the module `name` at `file` and of the modules beside it that it imports; find: where a module lies."""
    found = _closure({name: file}, find, _is_beside)
    return _digest((path.name, path) for _, path in sorted(found.items()))


@cache
def engine_digest(kind: str) -> str:
    """Digest of the code of kdbench that decides the results of stages of a kind."""
    return package_digest(kind, PACKAGE)


def package_digest(kind: str, root: Path) -> str:
    """The same of the package whose folder is `root`.

    That is of the stages with all that they import of the engine, of the numerics policy, and of the rooms of that kind.
    """
    find = find_in(root)
    start = {name: path for name in STAGE_CODE if (path := find(name))}
    assert len(start) == len(STAGE_CODE), f"{root} is not the folder of kdbench"
    files = set(_closure(start, find, _is_of_engine).values())
    for room in ROOMS.get(kind, OF_TRAINING):
        files |= set((root / room).rglob("*.py"))
    return _digest(sorted((path.relative_to(root).as_posix(), path) for path in files))


def find_in(root: Path) -> Find:
    """Finds modules of the package whose folder is `root`, whether it is the installed one or a copy of it."""

    def find(name: str) -> Path | None:
        top, *inner = name.split(".")
        file = root.joinpath(*inner)
        candidates = (file.with_suffix(".py"), file / "__init__.py") if top == root.name and inner else ()
        return next((path for path in candidates if path.is_file()), None)

    return find


def code(text: str) -> Iterator[Token]:
    """The tokens of a Python source text that decide what it does: (name of the kind, spelling).

    Comments, line breaks within brackets, statements without effect (docstrings and other strings, `pass`, `...`) and
    how far a block is indented are left out. A formatted string is one token, as before Python 3.12.
    """
    text += "" if text.endswith("\n") else "\n"
    idle = _idle_statements(text)
    last: Token | None = None
    skipping = False
    for kind, spelling, start in _tokens(text):
        skipping |= start in idle and kind not in LAYOUT
        if skipping:
            skipping = kind != tokenize.NEWLINE and spelling != ";"
            starts_line = last is None or last[0] in ("NEWLINE", "INDENT", "DEDENT")
            if kind != tokenize.NEWLINE or starts_line:
                continue
        token = (tokenize.tok_name[kind], "" if kind in LAYOUT else spelling)
        if last and last[0] == "INDENT":  # held back until it is known whether the block has code
            if token[0] == "DEDENT":
                last = ("NEWLINE", "")
                continue
            yield last
        if token[0] != "INDENT":
            yield token
        last = token


def _tokens(text: str) -> Iterator[tuple[int, str, Position]]:
    """Tokens but for words: (kind, spelling, start). A formatted string is one: its source from start to end."""
    lines = _lines(text)
    depth, begin = 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name in ("FSTRING_START", "TSTRING_START"):
            begin = begin if depth else token.start
            depth += 1
        elif name in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            if not depth:
                yield tokenize.STRING, _slice(lines, begin, token.end), begin
        elif not depth and token.type not in WORDS:
            yield token.type, token.string, token.start


def _lines(text: str) -> list[str]:
    return [f"{line}\n" for line in text.split("\n")]  # str.splitlines knows line ends that Python does not


def _slice(lines: list[str], start: Position, end: Position) -> str:
    inner = lines[start[0] - 1 : end[0]]
    inner[-1] = inner[-1][: end[1]]
    inner[0] = inner[0][start[1] :]
    return "".join(inner)


def _idle_statements(text: str) -> set[Position]:
    """Where statements without effect start."""
    lines = _lines(text)
    found = set()
    for node in ast.walk(ast.parse(text)):
        words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if words or isinstance(node, ast.Pass):
            assert isinstance(node, ast.stmt)
            line = lines[node.lineno - 1].encode()  # a tree counts bytes, tokens count characters
            found.add((node.lineno, len(line[: node.col_offset].decode())))
    return found


def _closure(start: dict[str, Path], find: Find, follows: Callable[[str, Path, str, bool], bool]) -> dict[str, Path]:
    """The modules of `start` and all that they import, directly or not, where `follows` says so."""
    seen: dict[str, Path] = {}
    todo = list(start.items())
    while todo:
        name, file = todo.pop()
        if name in seen:
            continue
        seen[name] = file
        for module, relative in _imports(name, file.name == "__init__.py", file.read_bytes()):
            if follows(name, file, module, relative) and (path := find(module)):
                todo.append((module, path))
    return seen


@cache
def _imports(name: str, is_package: bool, source: bytes) -> tuple[tuple[str, bool], ...]:
    """What may be a module among all that a module imports when it runs, and whether relatively."""
    package = name if is_package else name.rpartition(".")[0]
    found = []
    for node in _running(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = (base, *(f"{base}.{alias.name}" for alias in node.names))
            found += [(module, node.level > 0) for module in names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
    return tuple(found)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a tree, without what only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _running(other)
        else:
            yield from _running(child)


def _is_beside(name: str, file: Path, module: str, relative: bool) -> bool:
    package = name.rpartition(".")[0]
    if relative or (package and module.startswith(f"{package}.")):
        return True
    return _is_loose(name, file) and _lies_here(module)


def _is_of_engine(_name: str, _file: Path, module: str, _relative: bool) -> bool:
    return module.startswith("kdbench.engine.")


def _is_loose(name: str, file: Path) -> bool:
    """Whether a module is found because it lies in the current folder: somebody's own code."""
    depth = name.count(".") + (file.name == "__init__.py")
    return file.resolve().parents[depth] == Path.cwd() and _lies_here(name)


def _lies_here(module: str) -> bool:
    top = module.partition(".")[0]  # asked first: to find a module below a package imports the package
    return top != "kdbench" and (Path(top).is_dir() or Path(f"{top}.py").is_file())


def _installed(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a class or function of a module that is not a package
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    """Digest of the code in files, each under its name."""
    sha = hashlib.sha256()
    for name, file in files:
        sha.update(f"{name}\0{_code_digest(file.read_bytes())}\0".encode())
    return sha.hexdigest()[:16]


@cache
def _code_digest(source: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    text = io.TextIOWrapper(io.BytesIO(source), encoding).read()  # whatever ends its lines, as Python reads them
    sha = hashlib.sha256()
    for kind, spelling in code(text):
        sha.update(f"{kind}\0{spelling}\0".encode())
    return sha.hexdigest()
