"""Digests of source code."""

import importlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdbench.api import KdbenchError
from kdbench.engine.plan import Plan
from kdbench.engine.sources import engine_digest, source_digest


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Writes a package of methods, some of its files changed, and imports the method; each time under a new name."""
    monkeypatch.syspath_prepend(tmp_path)
    files = {
        "__init__.py": "",
        "method.py": "from . import formulas, shapes\nfrom .loss import loss\n\n\nclass Method:\n    use = loss, shapes\n",
        "loss.py": "def loss() -> float:\n    from .deep.constants import C\n    return C\n",
        "deep/__init__.py": "",
        "deep/constants.py": "from ..formulas import F\nC = F\n",
        "formulas.py": "F = 1.0\n",
        "shapes.py": "",
        "other.py": "import json\n",
    }

    def write(**changes: str) -> Any:
        name = f"methods_{secrets.token_hex(8)}"
        for path, text in (files | changes).items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(f"{name}.method").Method

    return write


def test_the_same_source_elsewhere_has_the_same_digest(package: Callable[..., Any]) -> None:
    assert source_digest(package()) == source_digest(package())


@pytest.mark.parametrize("file", ["method.py", "loss.py", "shapes.py", "formulas.py", "deep/constants.py"])
def test_a_digest_changes_with_the_module_and_with_all_it_imports_relatively(
    package: Callable[..., Any], file: str
) -> None:
    before = package()
    text = (Path(importlib.import_module(before.__module__).__file__ or "").parent / file).read_text()
    assert source_digest(package(**{file: text + "# changed\n"})) != source_digest(before)


@pytest.mark.parametrize("change", [{"other.py": "import os\n"}, {"new.py": "x = 1\n"}, {"notes.txt": "n"}], ids=str)
def test_a_digest_does_not_change_with_a_file_that_is_not_imported(
    package: Callable[..., Any], change: dict[str, str]
) -> None:
    assert source_digest(package(**change)) == source_digest(package())


def test_modules_that_import_each_other_have_a_digest(package: Callable[..., Any]) -> None:
    circle = {"loss.py": "from . import method\n\n\ndef loss() -> None: ...\n"}
    assert source_digest(package(**circle)) == source_digest(package(**circle)) != source_digest(package())


def test_a_method_without_a_source_file_is_refused() -> None:
    made = type("Made", (), {"__module__": "nowhere"})
    with pytest.raises(KdbenchError, match="has no source file"):
        source_digest(made)


def test_partial_kd_changes_with_kd_but_kd_not_with_partial_kd(package: Callable[..., Any]) -> None:
    """The built-in wings are packages like any: one method may build on another."""
    folder = Path(importlib.import_module("kdbench.attacks").__file__ or "").parent
    built_in = {name: (folder / name).read_text() for name in ("kd.py", "partial_kd.py")}

    def both(**changes: str) -> tuple[str, str]:
        name = package(**built_in | changes).__module__.removesuffix(".method")
        classes = importlib.import_module(f"{name}.kd").KD, importlib.import_module(f"{name}.partial_kd").PartialKD
        return source_digest(classes[0]), source_digest(classes[1])

    kd, partial = both()
    assert both(**{"partial_kd.py": built_in["partial_kd.py"] + "#\n"})[0] == kd
    assert both(**{"partial_kd.py": built_in["partial_kd.py"] + "#\n"})[1] != partial
    assert both(**{"kd.py": built_in["kd.py"] + "#\n"})[0] != kd
    assert both(**{"kd.py": built_in["kd.py"] + "#\n"})[1] != partial


def test_who_judges_is_in_the_keys_of_scores_alone(plan: Callable[..., Plan]) -> None:
    assert engine_digest(judging=True) != engine_digest(judging=False)
    for stage in plan().stages.values():
        assert ("judges" in stage.spec) == (stage.kind == "evaluate")
        assert ("engine" in stage.spec) == (stage.kind != "data")
