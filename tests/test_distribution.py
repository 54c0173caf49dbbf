"""What is built out of the tree: the wheel, the sdist, and what linters and mypy say of it."""

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from source_tree import ROOT, modules

METADATA = {"PKG-INFO", "README.md", "LICENSE", "setup.cfg", "pyproject.toml", "MANIFEST.in"}
EGG_INFO = {"PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt"}


@dataclass(frozen=True)
class Built:
    """An sdist of a copy of the tree, a wheel of that sdist, and the wheel unpacked."""

    sdist: Path
    wheel: Path
    site: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built in a copy of the tracked files, so that no build folder appears in the checkout, nor any file of it."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if name and not name.startswith("results/") and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    before = set(ROOT.iterdir())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(ROOT.iterdir()) == before
    wheel = next(out.glob("*.whl"))
    zipfile.ZipFile(wheel).extractall(out / "site")
    return Built(next(out.glob("*.tar.gz")), wheel, out / "site")


def packaged() -> set[str]:
    """The files that the package consists of, as they lie in site-packages."""
    found = {installed(module, path) for module, path in modules().items()}
    suites = {f"kdbench/benchmarks/suites/{path.name}" for path in (ROOT / "benchmarks/suites").glob("*.toml")}
    return found | suites | {"kdbench/benchmarks/defaults.toml", "kdbench/py.typed"} | templates()


def templates() -> set[str]:
    """Files of the package that are no Python."""
    found = (path.relative_to(ROOT) for path in (ROOT / "kdbench").rglob("*.j2"))
    return {path.as_posix() for path in found}


def installed(module: str, path: Path) -> str:
    parts = module.replace(".", "/")
    return f"{parts}/__init__.py" if path.name == "__init__.py" else f"{parts}.py"


def test_the_wheel_holds_exactly_the_package(built: Built) -> None:
    files = {name for name in zipfile.ZipFile(built.wheel).namelist() if ".dist-info/" not in name}
    assert files == packaged()
    assert {name.split("/")[0] for name in files} == {"kdbench"}, "site-packages gets one name"


def test_the_sdist_holds_exactly_what_the_wheel_is_built_from(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    mapped = ("defenses/", "attacks/", "benchmarks/")
    sources = {
        name.removeprefix("kdbench/") if name.startswith(tuple(f"kdbench/{m}" for m in mapped)) else name
        for name in packaged()
    }
    assert files == sources | METADATA | {f"kdbench.egg-info/{name}" for name in EGG_INFO}


def test_the_package_list_is_complete() -> None:
    """A sub-package that setup.cfg does not list is imported in an editable install and is missing from the wheel."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {module for module, path in modules().items() if path.name == "__init__.py"}
    assert listed == found


def test_a_checkout_before_an_installed_wheel_is_told_in_one_sentence(built: Built, tmp_path: Path) -> None:
    """`python -m kdbench` in a checkout finds the checkout's package, which has no methods in it."""
    code = (
        f"import sys; sys.path[:] = [{str(ROOT)!r}, *(p for p in sys.path if p != {str(ROOT)!r}), {str(built.site)!r}];"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '') + str(f)];"
        "from kdbench.cli import main; main(['show', 'defense', 'nasty'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "pip install -e ." in done.stderr
    assert "Traceback" not in done.stderr


def test_ruff_is_content() -> None:
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_is_content(built: Built) -> None:
    """It sees the built tree: in the checkout, the methods do not lie where the package has them."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "setup.cfg"), "-p", "kdbench"]
    done = subprocess.run(command, cwd=built.site, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
