"""Digests of source code."""

import hashlib
import importlib
import secrets
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdbench.api import KdbenchError
from kdbench.engine.sources import code, find_in, module_digest, source_digest


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
    assert source_digest(package(**{file: text + "CHANGED = 1\n"})) != source_digest(before)


def test_a_digest_changes_with_what_is_imported_by_the_name_of_the_package(tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "method.py").write_text("from pack.loss import C\nimport pack.shapes\nfrom other.loss import D\n")

    def digest(**changes: str) -> str:
        for name in ("loss", "shapes", "unused"):
            (folder / f"{name}.py").write_text(changes.get(name, "C = 1\n"))
        return module_digest("pack.method", folder / "method.py", find_in(folder))

    before = digest()
    assert digest(loss="C = 2\n") != before
    assert digest(shapes="C = 2\n") != before
    assert digest(unused="C = 2\n") == before


def test_what_only_a_type_checker_imports_does_not_count(package: Callable[..., Any]) -> None:
    imports = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import other\n"

    def with_other(text: str) -> str:
        return source_digest(package(**{"shapes.py": imports, "other.py": text}))

    assert with_other("x = 1\n") == with_other("x = 2\n")


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
    """The packages of built-in methods are like any other: one method may build on another."""
    folder = Path(importlib.import_module("kdbench.attacks").__file__ or "").parent
    built_in = {name: (folder / name).read_text() for name in ("kd.py", "partial_kd.py")}

    def both(**changes: str) -> tuple[str, str]:
        name = package(**built_in | changes).__module__.removesuffix(".method")
        classes = importlib.import_module(f"{name}.kd").KD, importlib.import_module(f"{name}.partial_kd").PartialKD
        return source_digest(classes[0]), source_digest(classes[1])

    kd, partial = both()
    assert both(**{"partial_kd.py": built_in["partial_kd.py"] + "CHANGED = 1\n"})[0] == kd
    assert both(**{"partial_kd.py": built_in["partial_kd.py"] + "CHANGED = 1\n"})[1] != partial
    assert both(**{"kd.py": built_in["kd.py"] + "CHANGED = 1\n"})[0] != kd
    assert both(**{"kd.py": built_in["kd.py"] + "CHANGED = 1\n"})[1] != partial


# Code and words


def same(one: str, other: str) -> bool:
    return list(code(one)) == list(code(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1", "x = 1  # a comment\n\n\n# another\n"),
        ("f(1, 2)", "f(\n    1,  # one\n    2\n)"),
        ("if a:\n    b", "if a:\n\n        b\n"),
        ("if a:\n    b", "if a:\n\tb\n"),
        ("x = a + b", "x = a + \\\n    b"),
        ("x=1", "x  =  1"),
        ("x = 1\r\ny = 2\r\n".replace("\r", ""), "x = 1\ny = 2"),
        ('"words"\nx = 1', "'''other\nwords'''\n\nx = 1"),
        ("x = 1", '"""words"""\nx = 1'),
        ('def f():\n    "words"\n    return 1', "def f():\n    return 1"),
        ('def f():\n    "words"', "def f():\n    pass"),
        ('def f():\n    "words"', "def f(): ..."),
        ('def f():\n    "words"\n\n\nx = 1', "def f():\n    ...  # nothing\nx = 1"),
        ('def f():\n    "words"; return 1', "def f():\n    return 1"),
        (
            'class A:\n    "words"\n\n    x: int = 1\n    """more"""\n\n    def f(self):\n        "yet more"',
            "class A:\n    x: int = 1\n    def f(self): ...",
        ),
        ('class A:\n    class B:\n        "words"', "class A:\n    class B:\n        pass"),
        ('x: str = "ä"\n("wörds"\n "ä")', 'x: str = "ä"'),
        ("async def f():\n    'words'\n    await g()", "async def f():\n    await g()"),
        ("", "# nothing but words"),
    ],
)
def test_words_and_layout_change_no_code(one: str, other: str) -> None:
    assert same(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1", "x = 2"),
        ("x = 'a'", "x = 'b'"),
        ("x = 'a'", 'x = "a"'),  # spelling counts: two literals are told apart by nothing simpler
        ("x = 'words'", "x = 'other words'"),
        ("f('words')", "f('other words')"),
        ("return_ = 1", "return_ = 1.0"),
        ("if a:\n    b\n    c", "if a:\n    b\nc"),
        ("if a:\n    b\nc", "if a: b; c"),
        ("if a:\n    if b:\n        c\n    d", "if a:\n    if b:\n        c\n        d"),
        ("if a:\n    pass\nelse:\n    b", "if a:\n    b\nelse:\n    pass"),
        ("def f(): return 'words'", "def f(): return 'other'"),
        ("x = ...", "x = 1"),
        ('x = f"{a}"', 'x = f"{b}"'),
        ('def f():\n    f"{a}"', 'def f():\n    f"{b}"'),  # this one is evaluated
        ("ab = 1", "a = b = 1"),
    ],
)
def test_another_code_has_other_tokens(one: str, other: str) -> None:
    assert not same(one, other)


def test_line_ends_and_encodings_are_no_code(tmp_path: Path) -> None:
    def of(content: bytes) -> str:
        (tmp_path / "m.py").write_bytes(content)
        return module_digest("m", tmp_path / "m.py", lambda _: None)

    text = 'x = """one\ntwo ä"""\n'
    plain = of(text.encode())
    assert of(text.replace("\n", "\r\n").encode()) == plain
    assert of(b"# coding: latin-1\n" + text.encode("latin-1")) == plain
    assert of(text.encode("utf-8-sig")) == plain
    assert of(text.replace("two", "three").encode()) != plain


STRINGS = """
a = f"x{b!r:>{c}}{{}}" rf'{d}' "e"
g = f'''one {
    h + f"{i}"
} two ä''' + j
"""


def test_a_formatted_string_is_one_token_as_it_is_written() -> None:
    strings = [spelling for kind, spelling in code(STRINGS) if kind == "STRING"]
    assert strings == ['f"x{b!r:>{c}}{{}}"', "rf'{d}'", '"e"', "f'''one {\n    h + f\"{i}\"\n} two ä'''"]


def test_formatted_strings_in_parts_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 and later hand out their parts; here older ones are made to, so that both ways are tested by each."""
    text = STRINGS
    expected = list(code(text))
    start, middle, end = (tokenize.N_TOKENS + number for number in range(3))
    for number, name in ((start, "FSTRING_START"), (middle, "FSTRING_MIDDLE"), (end, "FSTRING_END")):
        monkeypatch.setitem(tokenize.tok_name, number, name)
    whole = tokenize.generate_tokens

    def in_parts(readline: Callable[[], str]) -> Iterator[tokenize.TokenInfo]:
        for token in whole(readline):
            if token.type != tokenize.STRING or "f" not in token.string.partition(token.string[-1])[0]:
                yield token
                continue
            row, column = token.start
            yield tokenize.TokenInfo(start, "f'", token.start, (row, column + 2), token.line)
            yield tokenize.TokenInfo(tokenize.OP, "{", (row, column + 2), (row, column + 3), token.line)
            inner = (row, column + 3)  # a string within: Python 3.12 nests them
            yield tokenize.TokenInfo(start, "f'", inner, inner, token.line)
            yield tokenize.TokenInfo(middle, "x", inner, inner, token.line)
            yield tokenize.TokenInfo(end, "'", inner, inner, token.line)
            yield tokenize.TokenInfo(end, "'", (token.end[0], token.end[1] - 1), token.end, token.line)

    monkeypatch.setattr(tokenize, "generate_tokens", in_parts)
    assert list(code(text)) == expected


def test_the_same_code_has_the_same_tokens_in_every_version_of_python() -> None:
    """This digest was made by Python 3.11; others must agree, or stores could not be shared."""
    text = Path(__file__).with_name("many_tokens.txt").read_text(encoding="utf-8")
    assert hashlib.sha256(repr(list(code(text))).encode()).hexdigest()[:16] == "896ca4b066c4088b"
