"""The laws of keys: words change none, code changes those that it decides and no others; and the keys of a tiny suite."""

import ast
import io
import re
import shutil
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import golden_keys
import pytest

from kdbench.engine.plan import Plan
from kdbench.engine.sources import engine_digest, find_in, module_digest, package_digest, source_digest
from source_tree import ROOT

KINDS = ("data", "steal", "evaluate")  # all others are stages in which something is trained, as in "steal"
METHODS = ("defenses", "attacks", "zoo")  # rooms whose modules are digested each with its siblings
# Of the engine, the code that stages run; what schedules them, keeps them and plans them decides no result.
OF_STAGES = {"stages", "specs", "parts", "models", "victims", "workspace", "stage_log", "tensors", "numerics"}
NOT_OF_STAGES = {"store", "leases", "scheduler", "stage_queue", "worker", "orders", "plan", "planner", "sources"}

Digests = dict[str, str]


def copy_of_the_package(folder: Path) -> Path:
    """The package as it is installed, in a folder of its own."""
    shutil.copytree(ROOT / "kdbench", folder / "kdbench", ignore=shutil.ignore_patterns("__pycache__"))
    for room in ("defenses", "attacks"):
        shutil.copytree(ROOT / room, folder / "kdbench" / room, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "kdbench"


def files() -> list[str]:
    """All files of code, relative to the installed package."""
    own = [path.relative_to(ROOT / "kdbench") for path in (ROOT / "kdbench").rglob("*.py")]
    methods = [path.relative_to(ROOT) for room in ("defenses", "attacks") for path in (ROOT / room).rglob("*.py")]
    return sorted(path.as_posix() for path in (*own, *methods))


def digests(root: Path) -> Digests:
    """Of the kinds of stages, and of all methods, networks and data sets of the package at `root`."""
    found = {f"stages {kind}": package_digest(kind, root) for kind in KINDS}
    for room in METHODS:
        for path in sorted((root / room).glob("[!_]*.py")):
            found[f"{room}/{path.name}"] = module_digest(f"kdbench.{room}.{path.stem}", path, find_in(root))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_package(tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def before(root: Path) -> Digests:
    return digests(root)


def test_a_copy_of_the_package_has_the_digests_of_the_package(root: Path) -> None:
    assert {kind: package_digest(kind, root) for kind in KINDS} == {kind: engine_digest(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", ["train", "harden", "auxiliary"])
def test_all_kinds_of_training_depend_on_the_same_code(kind: str) -> None:
    assert engine_digest(kind) == engine_digest("steal")


# Words


def other_words(text: str) -> str:
    """The same code with other docstrings, another comment and an empty line after every statement."""
    lines = text.splitlines(keepends=True)
    for node in sorted(_docstrings(ast.parse(text)), key=lambda node: -node.lineno):
        indent = lines[node.lineno - 1][: node.col_offset]
        assert node.end_lineno
        lines[node.lineno - 1 : node.end_lineno] = [f"{indent}'other' \"words\"\n"]
    tokens = list(tokenize.generate_tokens(io.StringIO("".join(lines)).readline))
    for token in tokens:
        if token.type == tokenize.NEWLINE:
            row = token.start[0] - 1
            lines[row] = f"{lines[row][: token.start[1]].rstrip()}  # other words\n\n"
    return "# of the whole file\n" + "".join(lines)


def _docstrings(tree: ast.Module) -> Iterator[ast.Expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node


def test_other_comments_and_docstrings_change_no_key(tmp_path: Path) -> None:
    root = copy_of_the_package(tmp_path)
    before = digests(root)
    for name in files():
        text = (root / name).read_text()
        assert other_words(text) != text
        (root / name).write_text(other_words(text))
    assert digests(root) == before


# Code


def other_code(text: str) -> str:
    """The same with another number, or, where there is none, with one statement more."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NUMBER:
            lines = text.splitlines(keepends=True)
            row, start, end = token.start[0] - 1, token.start[1], token.end[1]
            other = "8" if token.string == "7" else "7"
            lines[row] = f"{lines[row][:start]}{other}{lines[row][end:]}"
            return "".join(lines)
    return f"{text}\nADDED = 1\n"


def deciding(name: str, root: Path) -> set[str]:
    """Which digests a change of the file `name` must change."""
    room, _, rest = name.partition("/")
    if room in METHODS:
        return {f"{room}/{path.name}" for path in (root / room).glob("[!_]*.py") if rest in _reached(path)}
    if room == "engine":
        return {f"stages {kind}" for kind in KINDS} if Path(rest).stem in OF_STAGES else set()
    kinds = {"game": set(KINDS), "training": set(KINDS) - {"data"}, "evaluation": {"evaluate"}}
    return {f"stages {kind}" for kind in kinds.get(room, set())}


def _reached(path: Path) -> set[str]:
    """The names of the files beside `path` that it imports, directly or not, itself among them."""
    found: set[str] = set()
    todo = [path]
    while todo:
        path = todo.pop()
        if path.name not in found:
            found.add(path.name)
            todo += [path.with_name(f"{name}.py") for name in re.findall(r"from \.(\w+) import", path.read_text())]
            todo += [path.with_name("__init__.py")] if "from . import" in path.read_text() else []
    return found


@pytest.mark.parametrize("name", files())
def test_a_change_of_code_changes_the_keys_that_it_decides_and_no_others(
    root: Path, before: Digests, name: str
) -> None:
    path = root / name
    text = path.read_text()
    path.write_text(other_code(text))
    try:
        after = digests(root)
    finally:
        path.write_text(text)
    changed = {thing for thing in before if after[thing] != before[thing]}
    if name.startswith("engine/") and path.stem not in OF_STAGES | NOT_OF_STAGES and "executors" not in name:
        assert changed in (set(), {f"stages {kind}" for kind in KINDS})  # what stages use to read and write files
    else:
        assert changed == deciding(name, root)


def test_files_of_every_room_decide_something_and_many_decide_nothing(root: Path) -> None:
    decide = {name for name in files() if deciding(name, root)}
    assert {name.partition("/")[0] for name in decide} == {"game", "training", "evaluation", "engine", *METHODS}
    assert {"defenses/_ball.py", "zoo/layers.py", "game/fields.py", "engine/numerics.py"} <= decide
    assert {"cli.py", "records.py", "engine/store.py", "engine/executors/local.py"} <= set(files()) - decide


def test_two_methods_that_share_a_file_both_change_with_it(root: Path) -> None:
    assert {"defenses/mad.py", "defenses/gradient_redirection.py"} <= deciding("defenses/_ball.py", root)


# A plan


def test_stages_carry_the_digest_of_their_kind(plan: Callable[..., Plan]) -> None:
    assert len({engine_digest("data"), engine_digest("steal"), engine_digest("evaluate")}) == 3
    for stage in plan().stages.values():
        text = repr(stage.spec)
        kinds = {kind for kind in ("data", "steal", "evaluate") if engine_digest(kind) in text}
        assert kinds == {"data": {"data"}, "evaluate": {"steal", "evaluate"}}.get(stage.kind, {"steal"})


def test_stages_carry_the_digests_of_their_methods(plan: Callable[..., Plan]) -> None:
    from kdbench import registry

    found = {stage.title: repr(stage.spec) for stage in plan().stages.values()}
    nasty, kd = (source_digest(registry.load(*thing)) for thing in (("defense", "nasty"), ("attack", "kd")))
    assert nasty in found["harden by nasty, seed 0"]
    assert kd in found["kd from nasty, seed 0"]
    assert nasty not in found["kd from none, seed 0"]


def test_the_keys_of_a_tiny_suite_are_those_that_are_committed() -> None:
    """Every key in every user's store changes with these: that must be seen, and meant."""
    committed, found = golden_keys.read(), golden_keys.keys()
    changed = sorted(title for title in {*committed, *found} if committed.get(title) != found.get(title))
    assert not changed, (
        f"The keys of {len(changed)} of {len(found)} stages changed: {', '.join(changed[:5])} ... Finished stages in "
        f"everybody's store will be run again. If that is meant, write them anew with `{golden_keys.COMMAND}`, and say why."
    )
