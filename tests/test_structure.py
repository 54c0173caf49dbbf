"""The house: who imports whom, what is in the wheel, and what keeps its edges sharp."""

import ast
import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each may import those below it, strictly downwards; names on one line may not import each other unless listed.
LAYERS = [
    {"kdbench.cli", "kdbench.__main__"},
    {"kdbench.listing", "kdbench.testing", "kdbench.runs.command", "kdbench.runs.network_figures"},
    {"kdbench.runs.session", "kdbench.runs.timing"},
    {"kdbench.runs.progress", "kdbench.engine.executors.preload"},
    {"kdbench.engine.scheduler"},
    {"kdbench.engine.executors.local"},
    {"kdbench.engine.executors.protocol", "kdbench.engine.plan", "kdbench.engine.worker"},
    {"kdbench.engine.stages", "kdbench.suites.reader", "kdbench.suites.preflight"},
    {"kdbench.suites.suite", "kdbench.suites.sweeps"},
    {"kdbench.suites.toml_lines"},
    {"kdbench.engine.stage_log"},
    {"kdbench.engine.tensors", "kdbench.engine.store", "kdbench.engine.sources"},
    {"kdbench.board.report"},
    {"kdbench.board.boards", "kdbench.board.plots.drawing", "kdbench.board.plots.networks"},
    {"kdbench.board.tables.accuracy", "kdbench.board.plots.curves"},
    {"kdbench.board.plots.figures", "kdbench.board.warnings", "kdbench.board.tables.reported"},
    {"kdbench.board.tables.robustness"},
    {"kdbench.board.study", "kdbench.board.document", "kdbench.board.sweeps"},
    {"kdbench.board.intervals", "kdbench.records", "kdbench.board"},
    {"kdbench.defenses", "kdbench.attacks", "kdbench.zoo"},
    {"kdbench.api", "kdbench.registry"},
    {"kdbench.evaluation.accuracy"},
    {"kdbench.evaluation.adversarial"},
    {"kdbench.training.fit", "kdbench.training.fused", "kdbench.evaluation.early_stopping"},
    {"kdbench.training.loop"},
    {"kdbench.training.bn_folding", "kdbench.training.augmentation"},
    {"kdbench.game.methods"},
    {"kdbench.game.threat", "kdbench.game.losses", "kdbench.game.data"},
    {"kdbench.game.fields", "kdbench.game"},
    {"kdbench.errors", "kdbench", "kdbench.benchmarks"},
]
WINGS = {"defenses": "kdbench.defenses", "attacks": "kdbench.attacks", "benchmarks": "kdbench.benchmarks"}


def modules() -> dict[str, Path]:
    found = {}
    for top, package in {"kdbench": "kdbench", **WINGS}.items():
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            if top != "benchmarks" or parts[0] != "speed":
                found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(module: str, path: Path) -> set[str]:
    """Absolute names of kdbench that a module imports, anywhere in its file."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            named = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else base for name in named}
    return {name for name in found if name.split(".")[0] in {"kdbench", *WINGS}}


def layer(module: str) -> int:
    """The layer of the longest listed prefix."""
    while module:
        for number, names in enumerate(LAYERS):
            if module in names:
                return number
        module = module.rpartition(".")[0]
    raise AssertionError(f"{module} has no layer")


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    path = modules()[module]
    for other in imports(module, path) - {module}:
        siblings = layer(other) == layer(module) and other.rpartition(".")[0] == module.rpartition(".")[0]
        assert layer(other) > layer(module) or siblings or other == "kdbench", (
            f"{module} imports {other}, which lies above it"
        )


@pytest.mark.parametrize(
    "module", sorted(m for m in modules() if m.startswith(("kdbench.defenses.", "kdbench.attacks.")))
)
def test_methods_import_the_api_and_siblings_only(module: str) -> None:
    wing = module.rpartition(".")[0]
    strangers = {
        name for name in imports(module, modules()[module]) if name != "kdbench.api" and not name.startswith(wing)
    }
    assert not strangers, f"{module} imports {strangers}; methods import kdbench.api and siblings"


def test_the_core_names_no_method() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    points = config["options.entry_points"]
    classes = {
        line.partition(":")[2]
        for key in points
        if "defenses" in key or "attacks" in key
        for line in points[key].split("\n")
        if line
    }
    assert classes, "no methods are registered"
    for module, path in modules().items():
        if module.startswith(("kdbench.defenses", "kdbench.attacks")):
            continue
        names = {n.id for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Name)}
        assert not names & classes, f"{module} knows {names & classes}"


def test_the_package_list_is_complete() -> None:
    """A sub-package that setup.cfg does not list imports in editable mode and is missing from the wheel."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {module for module, path in modules().items() if path.name == "__init__.py"}
    assert listed == found


def test_every_method_file_is_registered() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    registered = "\n".join(config["options.entry_points"].values())
    for wing in ("defenses", "attacks"):
        for path in (ROOT / wing).glob("[!_]*.py"):
            assert f"kdbench.{wing}.{path.stem}:" in registered, f"{wing}/{path.name} has no entry point in setup.cfg"


def test_wheel_and_sdist_hold_exactly_the_package(tmp_path: Path) -> None:
    build(tmp_path)
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {f"{package_path(module, path)}" for module, path in modules().items()} | {"kdbench/py.typed"}
    expected |= {f"kdbench/benchmarks/suites/{path.name}" for path in (ROOT / "benchmarks/suites").glob("*.toml")}
    assert files == expected
    assert {name.split("/")[0] for name in files} == {"kdbench"}, "site-packages gets one name"


def test_a_wheel_elsewhere_and_a_checkout_underfoot_is_one_sentence(tmp_path: Path) -> None:
    build(tmp_path)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path[:] = ['{ROOT}'] + [p for p in sys.path if 'main' not in p] + ['{tmp_path / 'site'}'];"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '') + str(f)];"
        "from kdbench.cli import main; main(['show', 'defense', 'nasty'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "pip install -e ." in done.stderr
    assert "Traceback" not in done.stderr


def test_ruff_and_mypy_are_content(tmp_path: Path) -> None:
    """mypy sees the built tree: in the checkout, defenses/ is not where the package has it."""
    subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", "."], cwd=ROOT, check=True)
    build(tmp_path)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "site")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "setup.cfg"), "-p", "kdbench"]
    done = subprocess.run(command, cwd=tmp_path / "site", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def build(folder: Path) -> None:
    """Build the wheel out of a copy of the tracked tree, so that no build folder is left in the checkout."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)


def package_path(module: str, path: Path) -> str:
    parts = module.replace(".", "/")
    return f"{parts}/__init__.py" if path.name == "__init__.py" else f"{parts}.py"
