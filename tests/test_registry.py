"""Names -> classes: built-ins and plugins by the same entry points, each imported when it is asked for."""

import configparser
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

import kdbench
from kdbench import api, listing, registry
from kdbench.api import Attack, Dataset, Defense, KdbenchError

ROOT = Path(__file__).parents[1]
AGAIN = "run pip install -e . again"


def registered() -> list[tuple[str, str, str]]:
    """(kind, name, target) of every entry point in setup.cfg."""
    config = configparser.ConfigParser(delimiters="=")
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    points = config["options.entry_points"]
    return [
        (kind, *(part.strip() for part in line.split("=")))  # type: ignore[misc]
        for kind, group in registry.KINDS.items()
        for line in points.get(group, "").split("\n")
        if line.strip()
    ]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Entry points are looked up anew in this test, and after it."""
    registry._entries.cache_clear()
    yield
    registry._entries.cache_clear()


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Path:
    """A folder of installed distributions."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(folder: Path, name: str, points: str, module: str = "") -> None:
    """Put a distribution into `folder` as an installer leaves it, with entry points and one module of its own name."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    (folder / f"{name}.py").write_text(module)


GOOD = '''
from dataclasses import dataclass
from kdbench.api import Defense

@dataclass(frozen=True)
class Mute(Defense):
    """Says what the victim says."""
'''


def run(*arguments: str, path: Path) -> "subprocess.CompletedProcess[str]":
    """kdbench as a user of a machine where the distributions in `path` are installed."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-m", "kdbench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=path, env=environment, check=False, timeout=120)


# Built-ins


@pytest.mark.parametrize(("kind", "name", "target"), registered())
def test_what_setup_cfg_registers_is_installed(kind: str, name: str, target: str) -> None:
    assert name in registry.names(kind), AGAIN
    assert registry.find(kind, name).target == target, AGAIN


@pytest.mark.parametrize(("kind", "name", "target"), registered())
def test_what_is_registered_can_be_imported_and_is_of_its_kind(kind: str, name: str, target: str) -> None:
    thing = registry.find(kind, name).load()
    assert target == f"{thing.__module__}:{thing.__name__}", AGAIN
    if isinstance(thing, registry.Parametrised):
        assert thing.__doc__
        assert thing.__doc__.startswith(f"{name}:{thing.argument} is ")
    elif kind in ("victim", "executor"):
        assert isinstance(thing, type)
    elif kind == "model":
        with torch.device("meta"):  # the large ones take seconds to draw their weights
            assert isinstance(thing((3, 32, 32), 10), nn.Module)
    else:
        assert issubclass(thing, {"defense": Defense, "attack": Attack, "dataset": Dataset}[kind])


@pytest.mark.parametrize("folder", ["defenses", "attacks"])
def test_no_method_is_forgotten_in_setup_cfg(folder: str) -> None:
    files = {path.stem for path in (ROOT / folder).glob("[!_]*.py")}
    modules = {target.partition(":")[0] for _, _, target in registered()}
    assert {f"kdbench.{folder}.{name}" for name in files} <= modules


def test_names_are_sorted_and_every_entry_says_where_it_comes_from() -> None:
    for kind in registry.KINDS:
        entries = registry.entries(kind)
        assert [entry.name for entry in entries] == registry.names(kind) == sorted(registry.names(kind))
        assert all(entry.origin and entry.kind == kind for entry in entries)
    assert registry.find("defense", "nasty").origin == f"kdbench {kdbench.__version__}"


def test_the_api_has_all_that_it_lists() -> None:
    assert all(name in vars(api) for name in api.__all__)
    assert len(set(api.__all__)) == len(api.__all__)


def test_a_name_that_does_not_exist_is_told_with_the_nearest() -> None:
    with pytest.raises(KdbenchError, match=r"^There is no attack 'kdd'\. Did you mean 'kd'\? Known: "):
        registry.load("attack", "kdd")


def test_names_are_told_without_importing_anything_heavy() -> None:
    code = (
        "import sys; from kdbench import registry\n"
        "assert all(registry.names(kind) for kind in ('defense', 'attack', 'model', 'dataset'))\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'kdbench.defenses', 'kdbench.zoo'} & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "[]"


# Plugins


def test_a_plugin_is_found_and_loaded_when_it_is_asked_for(plugins: Path) -> None:
    install(plugins, "muteness", "[kdbench.defenses]\nmute = muteness:Mute\n", GOOD)
    assert "mute" in registry.names("defense")
    assert "muteness" not in sys.modules
    entry = registry.find("defense", "mute")
    assert (entry.origin, entry.target) == ("muteness 1.0", "muteness:Mute")
    assert "muteness" not in sys.modules
    assert issubclass(entry.load(), Defense)
    assert "muteness" in sys.modules
    assert registry.load("defense", "mute") is entry.load()


def test_two_distributions_that_claim_one_name_are_an_error(plugins: Path) -> None:
    install(plugins, "impostor", "[kdbench.defenses]\nnasty = impostor:Nasty\n")
    said = (
        rf"^Two distributions register the defense 'nasty': (kdbench {kdbench.__version__} and impostor 1\.0"
        rf"|impostor 1\.0 and kdbench {kdbench.__version__})\. Uninstall one\.$"
    )
    with pytest.raises(KdbenchError, match=said):
        registry.names("defense")
    assert registry.names("attack")


def test_one_distribution_found_twice_is_no_error() -> None:
    point = EntryPoint("mute", "muteness:Mute", "kdbench.defenses")
    assert list(registry.unique("defense", [point, point])) == ["mute"]
    with pytest.raises(KdbenchError, match="an unknown distribution"):
        registry.unique("defense", [point, EntryPoint("mute", "other:Mute", "kdbench.defenses")])


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError: "),
        ("", "AttributeError: module 'broken' has no attribute 'Broken'"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named_with_the_reason(
    plugins: Path, module: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    install(plugins, "broken", "[kdbench.attacks]\nbroken = broken:Broken\n", module)
    assert "broken" in registry.names("attack")
    with pytest.raises(KdbenchError) as caught:
        registry.load("attack", "broken")
    said = str(caught.value)
    assert said.startswith(f"The attack 'broken' of broken 1.0 cannot be imported ({reason}")
    assert "pip install -e" not in said
    assert registry.load("attack", "kd")


def test_a_broken_plugin_costs_a_warning_and_nothing_else(tmp_path: Path) -> None:
    install(tmp_path, "broken", "[kdbench.defenses]\nbroken = broken:Broken\n", "1 / 0")
    install(tmp_path, "muteness", "[kdbench.defenses]\nmute = muteness:Mute\n", GOOD)
    said = run("list", "defenses", path=tmp_path)
    assert said.returncode == 0
    warning = "Warning: The defense 'broken' of broken 1.0 cannot be imported (ZeroDivisionError: division by zero)."
    assert said.stderr.strip() == warning
    listed = [line.split()[0] for line in said.stdout.splitlines()]
    assert listed == sorted({*registry.names("defense"), "mute"})
    assert "muteness 1.0" in said.stdout
    assert "Says what the victim says." in said.stdout


def test_two_names_in_conflict_are_one_sentence_at_the_keyboard(tmp_path: Path) -> None:
    install(tmp_path, "impostor", "[kdbench.defenses]\nnasty = impostor:Nasty\n")
    said = run("list", path=tmp_path)
    assert said.returncode == 2
    assert said.stderr.startswith("Error: Two distributions register the defense 'nasty': ")
    assert "Traceback" not in said.stderr


# A checkout that is not installed


def test_a_core_without_its_methods_says_how_to_install_them(tmp_path: Path) -> None:
    core = Path(kdbench.__file__).parent
    methods = shutil.ignore_patterns("defenses", "attacks", "benchmarks", "__pycache__")
    shutil.copytree(core, tmp_path / "kdbench", ignore=methods)
    code = (
        "import sys; from click.testing import CliRunner\n"
        # What an editable install puts in here would find the methods all the same.
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]\n"
        "from kdbench.cli import main\n"
        "for command in (['show', 'defense', 'nasty'], ['run']):\n"
        "    result = CliRunner().invoke(main, command); print(result.exit_code, result.output.strip())"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=120
    )
    for line, thing in zip(said.stdout.splitlines(), ("defense 'nasty'", "benchmarks"), strict=True):
        assert line.startswith(f"2 Error: The {thing} of kdbench")
        assert line.endswith("Inside a checkout, run pip install -e .")


# What is said of each


@pytest.mark.parametrize("kind", list(registry.KINDS))
def test_everything_registered_is_listed_and_can_be_shown(kind: str) -> None:
    plural = listing.PLURALS[kind]
    lines = listing.listing(plural)
    assert [line.split()[0] for line in lines] == registry.names(kind)
    for name in registry.names(kind):
        assert listing.describe(kind, name).startswith(f"{name}: {registry.find(kind, name).target}, from ")


def test_a_method_is_shown_with_its_fields_their_types_and_defaults_and_its_citation() -> None:
    shown = listing.describe("defense", "nasty")
    assert "Ma et al." in shown
    assert "tau: float > 0 = 4.0" in shown
    assert "omega: float >= 0 = 0.04" in shown
    assert "acts: at training time" in shown


def test_a_method_is_shown_with_its_place_in_the_threat_model() -> None:
    assert "acts: when answering" in listing.describe("defense", "stingy")
    assert "acts: never" in listing.describe("defense", "none")
    assert "needs nothing of the victim (a no-query baseline)" in listing.describe("attack", "cross-entropy")
    assert "access: needs label\n" in listing.describe("attack", "hard-label")
    assert "access: needs weights" in listing.describe("attack", "deep-inversion")
    assert "fraction: float > 0 <= 1 = 0.1" in listing.describe("attack", "partial-kd")
    assert "fields:\n  none" in listing.describe("attack", "cross-entropy")


def test_the_whole_list_has_a_heading_for_each_kind() -> None:
    headings = [line for line in listing.listing() if not line.startswith(" ")]
    assert headings == ["defenses:", "attacks:", "models:", "datasets:", "victims:", "executors:", "suites:"]
