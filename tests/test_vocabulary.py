"""The words of the field: no former private word is left in names or prose; and no docstring has a sentence too long.

Each word stands here with what to write instead. Words that also have a plain meaning are looked for only where that
meaning is impossible, or not where a pattern of exceptions says.
"""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOOKED_AT = ("*.py", "*.md", "*.toml", "*.cfg", ".ci/run")
# They say what the old words became, or read old files.
EXEMPT = re.compile(
    r"CHANGELOG\.md|results/.+/.*|tests/test_vocabulary\.py|.*old_(spellings|records)\.py|.*migration\w*\.py"
)
PROSE, NAMES, BOTH = {"prose"}, {"name"}, {"prose", "name"}


@dataclass(frozen=True)
class Word:
    """A former word.

    pattern: the words in lower case. instead: what to write. where: whether in names, prose or both. but: what is not
    meant. not_in: files in which the word has its plain meaning, as "pool" in networks.
    """

    pattern: str
    instead: str
    where: frozenset[str] | set[str] = frozenset(BOTH)
    but: str = ""
    not_in: str = ""


WORDS = (
    Word("thief|thieves|thefts?", "attacker, attack run"),
    Word("loot|looted", "the attacker's data"),
    Word("stolen", "student (accuracy), extracted", but="stolen share"),
    Word("agreements?", "fidelity"),
    Word("best responses?", "strongest attack"),
    Word("net gain", "gain (over the no-query baseline)"),
    Word("no victim|without the victim", "no-query baseline", NAMES),
    Word("yardsticks?", "undefended victim"),
    Word("unexamined", "no adaptive attack run"),
    Word("fickle|victim repeat", "inconsistent answers, answer consistency"),
    Word("too lossy", "utility loss above tolerance"),
    Word("still stolen", "still extractable"),
    Word("standings?", "study, rank status"),
    Word("crews?|kin", "fused group, fusible group"),
    Word("company", "fused training", NAMES),
    Word("stack(s|ed|ing)?", "fused", NAMES, but="(torch|np|numpy) stack|[vhd] ?stack|exit stack|stack module state"),
    Word("desks?|workshops?|journals?", "workspace, model factory, stage log", NAMES),
    Word("truthful(ly)?", "undefended"),
    Word("forgive|forget work|crowned", "clear failure, delete checkpoints, keep_argmax", NAMES),
    Word("liars?|misled", "misinformation model, false-positive rate"),
    Word("duels?|hunts?|hunted|rivals?", "generator-student game, query campaign, competing student"),
    Word("people only", "human-only", NAMES),
    Word("companions?|equip(s|ped)?", "auxiliary model, auxiliary stage"),
    Word("twins?", "hardened model"),
    Word("publics|public (data|pool|images)", "surrogate data"),
    Word(
        "pools?",
        "surrogate data",
        but="(max|avg|average|adaptive|global|ceil|process|worker|thread) ?pools?|['\"]pool['\"]",
        not_in=r"kdbench/zoo/.*|kdbench/training/bn_folding\.py|tests/test_networks\.py",
    ),
    Word("owned", "data subset", NAMES),
    Word("meters?", "query counter", NAMES),
    Word("borders?", "input check", NAMES),
    Word("referees?", "evaluation"),
    Word("judge[sd]?|judging", "evaluate", NAMES),
    Word("evasion", "adversarial robustness"),
    Word("adv (acc|fgsm|pgd|square|autoattack)", "robust", NAMES),
    Word("spar(ed|ing)|felled", "early stopping, misclassified"),
    Word("lay out", "match_memory_format", NAMES),
    Word("slot", "checkpoint name", NAMES),
    Word("exhibits?|gallery|replies", "network figures, prediction bars"),
    Word("catalogues?", "listing"),
    Word("announced", "plan file", NAMES),
    Word("family|families", "parametrised entry", NAMES),
    Word("replay(s|ed)?|play(s|ed|ing|ers?)?", "run, method"),
    Word(
        "games?",
        "scenario, suite",
        PROSE,
        but=r"kdbench.game|game[./]\w*|['\"]game['\"]|generator-student game|game \+",
    ),
    Word("players?", "method, side"),
    Word("benchmark files?", "suite file"),
    Word("puts? up with|meddl\\w+|quarrels?|wings?", "plain words", BOTH),
    Word("marks", "warnings", NAMES, not_in="tests/.*"),
)


@dataclass(frozen=True)
class Piece:
    """A name, or a comment, string or paragraph, as words in lower case."""

    file: str
    line: int
    kind: str
    text: str


@cache
def pieces() -> tuple[Piece, ...]:
    """All names and all prose of the tracked files and of new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *LOOKED_AT]
    found = sorted(
        set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n"))
    )
    files = [name for name in found if name and not EXEMPT.fullmatch(name) and (ROOT / name).is_file()]
    return tuple(piece for name in files for piece in _of_file(name))


def _of_file(name: str) -> Iterator[Piece]:
    yield Piece(name, 0, "name", " ".join(_words(Path(name).stem)))
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        yield from _of_python(name, text)
    else:
        yield Piece(name, 1, "prose", text)


def _of_python(name: str, text: str) -> Iterator[Piece]:
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            qualified = f"{before} {token.string}" if before in ("torch", "np", "numpy") else token.string
            yield Piece(name, token.start[0], "name", " ".join(_words(qualified)))
            before = token.string
        elif token.type in (tokenize.COMMENT, tokenize.STRING) or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
            yield Piece(name, token.start[0], "prose", token.string)
        elif token.string != ".":
            before = ""


def _words(name: str) -> list[str]:
    """The words of an identifier: victim_repeat, VictimRepeat and victim-repeat are all two."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def places(word: Word) -> list[str]:
    """File, line and text of each place where `word` stands."""
    pattern, but = _pattern(word.pattern), _pattern(word.but) if word.but else None
    found = []
    for piece in pieces():
        if piece.kind not in word.where or re.fullmatch(word.not_in, piece.file):
            continue
        text = piece.text.lower().replace("_", " ")
        meant = [hit.span() for hit in but.finditer(text)] if but else []
        for hit in pattern.finditer(text):
            if not any(start <= hit.start() and hit.end() <= end for start, end in meant):
                found.append(f"{piece.file}:{piece.line + text.count(chr(10), 0, hit.start())}: {hit[0]!r}")
    return found


def _pattern(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![^\W\d_])(?:{words})(?![^\W\d_])".replace(" ", r"[\s_-]+"))


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word.pattern.partition("|")[0])
def test_no_private_word_is_left(word: Word) -> None:
    found = places(word)
    shown = "\n".join(found[:200])
    assert not found, f"{len(found)} places; write: {word.instead}\n{shown}"


def test_a_private_word_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a name, in a comment, and across a line's end; and not where it has a plain meaning."""
    text = "class BestResponse:  # of a thief\n    x = torch.stack([])\n    y = 'the best\\nresponse'\n"
    found = tuple(_of_python("some.py", text))
    monkeypatch.setattr("test_vocabulary.pieces", lambda: found)
    hits = {word.pattern: places(word) for word in WORDS}
    assert {pattern for pattern, where in hits.items() if where} == {"thief|thieves|thefts?", "best responses?"}


# Sentences

LONGEST = 40
DOCUMENTED = ("kdbench/*.py", "defenses/*.py", "attacks/*.py")


def docstrings(text: str) -> Iterator[str]:
    """Of a module, its classes and functions; also the strings that stand behind fields."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def long_sentences(text: str) -> list[str]:
    """Sentences of more words than allowed; an empty line and an item of a list end a sentence too."""
    paragraphs = [part for words in docstrings(text) for part in re.split(r"\n\s*\n|\n\s*[-*] ", words)]
    sentences = [one for part in paragraphs for one in re.split(r"(?<=[.!?])[)\"'`]*\s+", part)]
    return [one for one in sentences if len(re.findall(r"\S*\w\S*", one)) > LONGEST]


def test_no_docstring_of_the_package_has_a_sentence_of_more_than_40_words() -> None:
    names = subprocess.run(["git", "ls-files", "--", *DOCUMENTED], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in names.stdout.splitlines() if (ROOT / name).is_file()]
    assert len(files) > 100
    found = {name: long_sentences((ROOT / name).read_text(encoding="utf-8")) for name in files}
    assert {name: sentences for name, sentences in found.items() if sentences} == {}


def test_a_sentence_of_41_words_would_be_found() -> None:
    assert long_sentences(f'"""{"word " * 40}end. {"word " * 39}end."""') == ["word " * 40 + "end."]
    assert long_sentences(f'class A:\n    """{"word " * 30}\n\n    {"word " * 30}"""') == []
