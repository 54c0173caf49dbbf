"""Networks in modules of the user's own: found, named when wrong, and part of the key with all that they import."""

import importlib
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench import listing, registry
from kdbench.api import KdbenchError
from kdbench.engine.sources import source_digest
from kdbench.records import read
from runs import TINY

NETS = '''
"""My networks."""
from functools import partial
from torch import nn
{imports}

def small(shape, classes):
    """A line through the pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))

class Wide(nn.Sequential):
    def __init__(self, shape, classes):
        super().__init__(small(shape, classes))

made = partial(small)
nothing = 3

def broken(shape, classes):
    return [shape, classes]
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; what is found because of it is found no more after the test."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(folder: Path, text: str = NETS, imports: str = "") -> str:
    """The name of a new module in `folder`."""
    name = f"nets_{secrets.token_hex(8)}"
    (folder / f"{name}.py").write_text(text.replace("{imports}", imports))
    return name


def refusal(kind: str, name: str) -> str:
    with pytest.raises(KdbenchError) as caught:
        registry.find(kind, name)
    return str(caught.value)


@pytest.mark.parametrize("function", ["small", "Wide", "made"])
def test_a_network_of_ones_own_comes_out_of_the_current_folder(here: Path, function: str) -> None:
    name = write(here)
    make = registry.load("model", f"{name}:{function}")
    assert make((1, 8, 8), 5)(torch.rand(2, 1, 8, 8)).shape == (2, 5)
    assert registry.find("model", f"{name}:{function}").origin == "your own code"


def test_a_network_of_ones_own_is_shown_with_its_words(here: Path) -> None:
    shown = listing.describe("model", f"{write(here)}:small")
    assert "from your own code" in shown
    assert "A line through the pixels." in shown
    assert "My networks." in shown


def test_a_package_in_the_current_folder_is_found(here: Path) -> None:
    package = f"package_{secrets.token_hex(8)}"
    (here / package / "deep").mkdir(parents=True)
    (here / package / "__init__.py").touch()
    (here / package / "deep" / "nets.py").write_text(NETS.replace("{imports}", ""))
    assert registry.load("model", f"{package}.deep.nets:small")((1, 2, 2), 3)(torch.rand(1, 1, 2, 2)).shape == (1, 3)


def test_the_current_folder_hides_nothing_that_is_installed(here: Path) -> None:
    (here / "json.py").write_text("def dumps(): ...\n")
    (here / "sklearn.py").write_text("def mine(): ...\n")
    assert "There is no function 'mine' in the module 'json'" in refusal("model", "json:mine")
    assert "There is no function 'mine' in the module 'sklearn'" in refusal("model", "sklearn:mine")


def test_what_is_wrong_with_a_module_of_ones_own_is_one_sentence(here: Path) -> None:
    name = write(here)
    missing, failing = write(here, imports="import no_such_module_anywhere"), write(here, imports="1 / 0")
    assert refusal("model", "no_such_nets:small") == (
        f"There is no model 'no_such_nets:small': 'no_such_nets' is neither a registered network nor a module in {here} "
        "or an installed one."
    )
    assert "'no.such.nets' is neither" in refusal("model", "no.such.nets:small")
    assert refusal("model", f"{missing}:small") == (
        f"The module '{missing}' of the model '{missing}:small' fails to import "
        "(ModuleNotFoundError: No module named 'no_such_module_anywhere')."
    )
    assert "fails to import (ZeroDivisionError: division by zero)." in refusal("model", f"{failing}:small")
    assert refusal("model", f"{name}:smal") == (
        f"There is no function 'smal' in the module '{name}' ({here / name}.py). Did you mean 'small'? "
        "Known: Wide, broken, small."
    )
    assert refusal("model", f"{name}:nothing") == (
        f"The model '{name}:nothing' is of type int, not a function (shape, classes)."
    )


@pytest.mark.parametrize("name", ["nets:", ":small", ".nets:small", "my nets:small", "nets:small:large", "nets.py:1"])
def test_what_is_no_name_of_a_function_is_refused(name: str) -> None:
    assert refusal("model", name) == (
        f"'{name}' is no name of a network: a module and a function in it are, such as nets:small."
    )


def test_a_function_that_makes_no_network_is_found_out(here: Path) -> None:
    name = write(here)
    with pytest.raises(KdbenchError, match=rf"^The model '{name}:broken' made a list, not a torch\.nn\.Module\.$"):
        registry.load("model", f"{name}:broken")((1, 8, 8), 3)


def test_ones_own_module_counts_with_its_source_wherever_the_function_was_made(here: Path) -> None:
    name = write(here)
    (here / f"{name}_copy.py").write_text((here / f"{name}.py").read_text() + "changed = 1\n")
    for function in ("small", "Wide", "made"):
        digests = {source_digest(registry.load("model", f"{module}:{function}")) for module in (name, f"{name}_copy")}
        assert len(digests) == 2


@pytest.fixture
def loose(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The digest of a network of which some of the files in the current folder are changed; each time in a new one."""
    files = {
        "nets.py": "from blocks import block\nimport package.deep\n\ndef small(shape, classes):\n    return block\n",
        "blocks.py": "from package import sizes\n\nblock = sizes.SIZE\n",
        "package/__init__.py": "",
        "package/sizes.py": "SIZE = 3\n",
        "package/deep.py": "import json\nimport torch\n",
        "other.py": "",
    }

    def digest(**changes: str) -> str:
        folder = here / secrets.token_hex(8)
        for path, text in (files | changes).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [place for place in sys.path if str(here) not in place])
        for name in ("nets", "blocks", "package", "package.sizes", "package.deep"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return source_digest(registry.load("model", "nets:small"))

    return digest


@pytest.mark.parametrize("file", ["nets.py", "blocks.py", "package/sizes.py", "package/deep.py"])
def test_ones_own_module_counts_with_all_that_it_imports_of_its_folder(loose: Callable[..., str], file: str) -> None:
    assert loose() == loose(**{"other.py": "x = 1\n"})
    changed = {"package/sizes.py": "SIZE = 4\n", "package/deep.py": "import json\n"}.get(file)
    text = changed or (Path(file).read_text() + "changed = 1\n")
    assert loose(**{file: text}) != loose()


def shell(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """kdbench as its console script starts it: without the current folder among the places of modules (-P)."""
    command = [sys.executable, "-P", "-m", "kdbench", "run", "tiny.toml", "--jobs", "1", "--device", "cpu", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False, timeout=120
    )


def test_workers_find_a_network_of_ones_own_and_train_it_again_when_its_source_changes(tmp_path: Path) -> None:
    text: Any = TINY.replace('["none", "nasty", "stingy"]', '["none"]').replace('["kd", "partial-kd"]', '["kd"]')
    text = text.replace('network = "mini-8"', 'network = "nets:small"').partition("[attack.")[0]
    (tmp_path / "tiny.toml").write_text("baselines = []\n" + text)
    late = "from blocks import block  # found only when it is made\n    return block(shape, classes)\n"
    (tmp_path / "nets.py").write_text(f"def small(shape, classes):\n    {late}")
    (tmp_path / "blocks.py").write_text(NETS.replace("{imports}", "block = lambda *given: small(*given)"))
    done = shell(tmp_path, "--out", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [cell.name for cell in read(tmp_path / "out")] == ["none--kd--nets-small--seed0"]
    (tmp_path / "blocks.py").write_text((tmp_path / "blocks.py").read_text() + "changed = 1\n")
    plan = shell(tmp_path, "--dry-run")
    assert [line.split()[:2] for line in plan.stdout.splitlines() if line.startswith("cached")] == [["cached", "data"]]
