"""The runner: stages are planned once, played once, kept when finished; what breaks costs only what builds on it."""

import importlib
import io
import json
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn

from helpers import blobs
from kdbench import registry
from kdbench.api import UNKNOWN, Answers, Attack, Context, Defense, KdbenchError, Oracle, Service, infer
from kdbench.board.results import Cell, Status, read
from kdbench.runner import command, journal, matrix, suite, worker
from kdbench.runner.checkpoint import load_state, load_tensors
from kdbench.runner.executors.local import LocalExecutor
from kdbench.runner.executors.protocol import Handle, Report, State
from kdbench.runner.journal import BEAT_SECONDS, CHECKPOINT_SECONDS, PROGRESS_SECONDS, Journal, Stopped
from kdbench.runner.matrix import LOST_ATTEMPTS, play
from kdbench.runner.plan import Numerics, Plan, PlannedCell, Stage, make_plan
from kdbench.runner.session import Options, Session
from kdbench.runner.sources import engine_digest, source_digest
from kdbench.runner.stages import TENSORS, WEIGHTS, Desk, Workshop, run_stage
from kdbench.runner.store import MANIFEST, Store, file_digest, write_json
from kdbench.runner.suite import Suite, with_yardstick
from kdbench.runner.watch import LiveWatcher, PlainWatcher, SilentWatcher, duration
from kdbench.runner.worker import BUSY, FAILED, PUBLISHED, STOPPED

TINY = """
seeds = 1
defenses = ["none", "nasty", "stingy"]
attacks = ["kd", "partial-kd"]
dataset = "blobs"

[victim]
network = "mini-8"
recipe = { epochs = 2, batch = 32, lr = 0.05 }

[student]
network = "mini-8"
recipe = { epochs = 2, batch = 32, lr = 0.05 }

[robustness]
level = "none"

[attack.partial-kd]
fraction = 0.5
"""
Json = dict[str, Any]
DUEL: Json = {"defenses": ["none"], "attacks": ["kd"], "baselines": []}
DUEL_STAGES = [
    "read blobs",
    "train the victim, seed 0",
    "kd from none, seed 0",
    "score kd on none, seed 0",
    "score none, seed 0",
]
DIVERGES: Json = {"defense.nasty.omega": 1e30, "defense.nasty.clip": 0.0}
ON_NASTY = {
    "hard-label from nasty, seed 0",
    "kd from nasty, seed 0",
    "partial-kd from nasty, seed 0",
    "score hard-label on nasty, seed 0",
    "score kd on nasty, seed 0",
    "score partial-kd on nasty, seed 0",
    "score nasty, seed 0",
}


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("suites") / "tiny.toml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="session")
def tiny(tiny_file: str) -> Callable[..., Suite]:
    """Makes the suite above with some dotted paths changed."""

    def load(changes: Mapping[str, Any] | None = None) -> Suite:
        return with_yardstick(suite.load(tiny_file, changes))

    return load


@pytest.fixture
def plan(tiny: Callable[..., Suite]) -> Callable[..., Plan]:
    """Plans the suite above with some dotted paths changed, on made-up data."""

    def make(changes: Mapping[str, Any] | None = None, numerics: Numerics | None = None, content: str = "d") -> Plan:
        return make_plan(tiny(changes), numerics or Numerics(), content)

    return make


@dataclass
class Recorder(SilentWatcher):
    """Remembers what it was told."""

    begun: list[tuple[int, int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    finished: list[Stage] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    most: int = 0
    closed: int = 0

    def begin(self, stages: dict[str, Stage], cached: int) -> None:
        self.begun.append((len(stages), cached))

    def started(self, stage: Stage) -> None:
        self.labels.append(stage.label)

    def ended(self, stage: Stage, seconds: float, problem: str) -> None:
        assert seconds > 0
        self.finished.append(stage)
        if problem:
            self.problems[stage.label] = problem

    def dropped(self, stages: list[Stage]) -> None:
        self.lost |= {stage.label for stage in stages}

    def tick(self, running: dict[str, tuple[Stage, float, str]]) -> None:
        self.most = max(self.most, len(running))

    def close(self) -> None:
        self.closed += 1


def options(folder: Path, **changes: Any) -> Options:
    values: Json = {"store": folder / "store", "out": folder / "out", "device": "cpu", "jobs": 2}
    return Options(**values | changes)


def run(played: Suite, folder: Path, watcher: Recorder | None = None, **changes: Any) -> dict[str, Cell]:
    """Play a suite into `folder`; its cells by name."""
    cells = Session(played, options(folder, **changes), watcher or Recorder()).run()
    assert read(options(folder, **changes).out) == sorted(cells, key=lambda cell: f"{cell.name}.json")
    return {cell.name: cell for cell in cells}


def numbers(cells: Mapping[str, Cell]) -> dict[str, Any]:
    """What of cells must not depend on who played them when."""
    return {name: (cell.status, cell.reason, cell.metrics, cell.keys) for name, cell in cells.items()}


def digests(store: Store) -> dict[str, dict[str, str]]:
    """The digests of all files of all finished stages."""
    return {key: store.manifest(key)["files"] for key in store.published()}


@dataclass(frozen=True)
class Played:
    """The tiny suite, played once for all tests; nobody changes this folder."""

    folder: Path
    cells: dict[str, Cell]
    watcher: Recorder

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    def copy(self, folder: Path) -> Path:
        """`folder`, with a copy of the store in it."""
        shutil.copytree(self.folder / "store", folder / "store")
        return folder


@pytest.fixture(scope="module")
def golden(tiny: Callable[..., Suite], tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder, watcher = tmp_path_factory.mktemp("golden"), Recorder()
    return Played(folder, run(tiny(), folder, watcher), watcher)


# The plan


def by_kind(plan: Plan) -> Counter[str]:
    return Counter(stage.kind for stage in plan.stages.values())


def cell(plan: Plan, defense: str | None, attack: str, fraction: float = 1.0) -> PlannedCell:
    """The planned cell of a defense (None: the baseline on that part of the data) and an attack; there is one."""
    cells = [c for c in plan.cells if (c.defense and c.defense.label) == defense and c.attack.label == attack]
    [found] = [c for c in cells if defense or c.owned.fraction == fraction]
    return found


def test_every_stage_is_planned_once_however_many_cells_need_it(plan: Callable[..., Plan]) -> None:
    """By hand: 3 defenses x (hard-label, kd, partial-kd), and 2 baselines x (all data, half of it)."""
    one = plan()
    assert len(one.cells) == 3 * 3 + 2 * 2
    assert by_kind(one) == {"data": 1, "train": 1, "harden": 1, "steal": 9 + 4, "score": 9 + 4 + 3}
    two = plan({"seeds": 2})
    assert len(two.cells) == 2 * len(one.cells)
    assert by_kind(two) == {"data": 1, "train": 2, "harden": 2, "steal": 26, "score": 32}
    students = plan({"student.networks": ["mini-8", "mini-16"]})
    assert by_kind(students) == {"data": 1, "train": 1, "harden": 1, "steal": 26, "score": 26 + 3}
    assert by_kind(plan(DUEL)) == {"data": 1, "train": 1, "steal": 1, "score": 2}


def test_a_method_that_is_a_baseline_and_an_attack_is_played_once(plan: Callable[..., Plan]) -> None:
    both = plan({"attacks": ["kd", "partial-kd", "hard-label", "cross-entropy"]})
    assert both.stages.keys() == plan().stages.keys()
    assert {c.name for c in both.cells} == {c.name for c in plan().cells}


def test_stages_come_after_what_they_build_on_and_name_exactly_that(plan: Callable[..., Plan]) -> None:
    before: set[str] = set()
    for key, stage in plan({"seeds": 2}).stages.items():
        assert set(stage.inputs) <= before
        named = re.findall(r"\b(?:data|train|harden|steal)/[0-9a-f]{32}\b", json.dumps(stage.spec))
        assert set(named) == set(stage.inputs)
        assert key == stage.key
        before.add(key)


def test_cells_have_names_of_their_own(plan: Callable[..., Plan]) -> None:
    cells = plan({"seeds": [3, 5], "student.networks": ["mini-8", "mini-16"]}).cells
    assert len({c.name for c in cells}) == len(cells) == 4 * 13


def test_none_and_a_defense_that_only_serves_deploy_the_victim_itself(plan: Callable[..., Plan]) -> None:
    found = plan()
    none, stingy, nasty = (cell(found, defense, "kd").stages for defense in ("none", "stingy", "nasty"))
    assert none["harden"] == none["train"] == stingy["harden"]
    assert nasty["harden"] != none["harden"]
    assert none["steal"] != stingy["steal"]
    assert none["audit"] != stingy["audit"]


def test_a_baseline_has_no_victim_in_its_key_and_does_not_depend_on_the_defenses(plan: Callable[..., Plan]) -> None:
    found = plan()
    stages = cell(found, None, "cross-entropy").stages
    assert set(stages) == {"steal", "score"}
    assert found.stages[stages["steal"]].spec["victim"] is None
    assert [key.split("/")[0] for key in found.stages[stages["steal"]].inputs] == ["data"]
    for changes in (
        {"defenses": ["none"]},
        {"victim.network": "mini-16"},
        {"victim.recipe.epochs": 9},
        {"defense.nasty.omega": 0.5},
        {"attacks": ["kd"]},
        {"threat.answers": "label"},
        {"threat.budget": 7},
        {"attack.label-smoothing.smoothing": 0.3},
    ):
        assert cell(plan(changes), None, "cross-entropy").stages == stages, changes


ALL_ON = {who: {f"{a} from {who}" for a in ("hard-label", "kd", "partial-kd")} for who in ("none", "nasty", "stingy")}
SCORES_ON = {
    who: {f"score {a} on {who}" for a in ("hard-label", "kd", "partial-kd")} for who in ("none", "nasty", "stingy")
}
AUDITS = {f"score {who}" for who in ("none", "nasty", "stingy")}
BASE = {f"{a} on {part} of the data" for a in ("cross-entropy", "label-smoothing") for part in ("100%", "50%")}
BASE_SCORES = {"score cross-entropy", "score label-smoothing"}
THEFTS = ALL_ON["none"] | ALL_ON["nasty"] | ALL_ON["stingy"]
THEFT_SCORES = SCORES_ON["none"] | SCORES_ON["nasty"] | SCORES_ON["stingy"]
NASTY = {"harden by nasty", "score nasty"} | ALL_ON["nasty"] | SCORES_ON["nasty"]
VICTIMS = {"train the victim", "harden by nasty"} | AUDITS | THEFTS | THEFT_SCORES


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({}, set()),
        ({"title": "Another", "tolerance": 0.5}, set()),
        ({"defenses": ["stingy", "nasty", "none"], "attacks": ["partial-kd", "kd"]}, set()),
        ({"defense.nasty.omega": 0.1}, NASTY),
        ({"defense.nasty.tau": 5}, NASTY),
        ({"defense.stingy.ratio": 0.9}, {"score stingy"} | ALL_ON["stingy"] | SCORES_ON["stingy"]),
        ({"attack.kd.temperature": 9}, {f"{s}kd {w} {d}" for s, w in (("", "from"), ("score ", "on")) for d in ALL_ON}),
        ({"attack.label-smoothing.smoothing": 0.2}, {b for b in BASE | BASE_SCORES if "label-smoothing" in b}),
        ({"robustness.level": "fast"}, AUDITS | THEFT_SCORES | BASE_SCORES),
        ({"student.recipe.lr": 0.01}, THEFTS | THEFT_SCORES | BASE | BASE_SCORES),
        ({"student.network": "mini-16"}, THEFTS | THEFT_SCORES | BASE | BASE_SCORES),
        ({"victim.recipe.lr": 0.01}, VICTIMS),
        ({"victim.network": "mini-16"}, VICTIMS),
        ({"threat.budget": 1000}, THEFTS | THEFT_SCORES),
        ({"threat.answers": "topk"}, THEFTS | THEFT_SCORES),
        ({"threat.data": 0.5}, THEFTS | THEFT_SCORES | BASE | BASE_SCORES),
        ({"threat.labels": False}, THEFTS | THEFT_SCORES | BASE | BASE_SCORES),
        ({"dataset": {"name": "blobs", "noise": 0.3}}, {"read blobs"} | VICTIMS | BASE | BASE_SCORES),
    ],
    ids=str,
)
def test_a_change_makes_new_keys_for_its_own_stages_and_those_above(
    plan: Callable[..., Plan], changes: Json, anew: set[str]
) -> None:
    before, after = plan().stages, plan(changes).stages
    new = {stage.label.removesuffix(", seed 0") for key, stage in after.items() if key not in before}
    assert new == anew
    assert len(after) == len(before)
    assert sum(key not in before for key in after) == sum(
        stage.label.removesuffix(", seed 0") in anew for stage in before.values()
    )


def test_defaults_that_are_written_out_change_no_key(plan: Callable[..., Plan]) -> None:
    written = {
        "defense.nasty.tau": 4,
        "attack.kd.alpha": 0.9,
        "threat.data": 1,
        "seeds": [0],
        "victim.recipe.momentum": 0.9,
    }
    assert plan(written).stages.keys() == plan().stages.keys()


def test_a_label_is_a_name_and_no_part_of_a_key(plan: Callable[..., Plan]) -> None:
    renamed = {"attacks": ["hinton", "partial-kd"], "attack.hinton.method": "kd"}
    assert plan(renamed).stages.keys() == plan().stages.keys()


@pytest.mark.parametrize(
    "changes", [{"numerics": Numerics(threads=2)}, {"numerics": Numerics(device="cuda")}, {"content": "e"}]
)
def test_arithmetic_and_the_content_of_the_data_are_in_every_key_but_that_of_the_data(
    plan: Callable[..., Plan], changes: Json
) -> None:
    kept = plan().stages.keys() & plan(None, **changes).stages.keys()
    assert [key.split("/")[0] for key in kept] == ["data"]


def test_more_seeds_keep_what_fewer_seeds_have_done(plan: Callable[..., Plan]) -> None:
    assert plan({"seeds": 3}).stages.keys() > plan({"seeds": [2, 0]}).stages.keys() > plan().stages.keys()


def test_an_attack_that_needs_more_than_is_granted_is_skipped_with_the_reason(plan: Callable[..., Plan]) -> None:
    found = plan({"threat.answers": "label", "attacks": ["kd", "deep-inversion"]})
    for defense in ("none", "nasty", "stingy"):
        assert cell(found, defense, "kd").skipped == "'kd' needs topk; the suite grants label"
        assert (
            cell(found, defense, "deep-inversion").skipped == "'deep-inversion' needs weights; the suite grants label"
        )
        assert cell(found, defense, "kd").stages == {}
        assert cell(found, defense, "hard-label").skipped == ""
    assert {s.label for s in found.stages.values() if s.kind == "steal" and "hard-label" in s.label} == {
        f"hard-label from {defense}, seed 0" for defense in ("none", "nasty", "stingy")
    }
    assert not any("kd" in stage.label or "deep-inversion" in stage.label for stage in found.stages.values())


def test_weights_are_granted_only_to_those_who_need_them(plan: Callable[..., Plan]) -> None:
    found = plan({"threat.answers": "weights", "attacks": ["kd", "deep-inversion"]})
    assert cell(found, "none", "kd").threat.answers is Answers.PROBS
    assert cell(found, "none", "deep-inversion").threat.answers is Answers.WEIGHTS
    probs = plan({"threat.answers": "probs", "attacks": ["kd"]})
    assert cell(found, "nasty", "kd").stages == cell(probs, "nasty", "kd").stages


def test_a_defense_that_only_serves_is_bypassed_by_who_has_the_weights(plan: Callable[..., Plan]) -> None:
    found = plan({"threat.answers": "weights", "attacks": ["kd", "deep-inversion"]})
    bypassed = {(c.defense.label, c.attack.label) for c in found.cells if c.bypassed and c.defense}
    assert bypassed == {("stingy", "deep-inversion")}
    assert cell(found, "stingy", "deep-inversion").stages  # played all the same


def test_baselines_are_trained_on_the_parts_that_attacks_use(plan: Callable[..., Plan]) -> None:
    found = plan()
    parts = {c.owned.fraction for c in found.cells if c.defense is None}
    assert parts == {1.0, 0.5}
    partial, baseline = cell(found, "none", "partial-kd"), cell(found, None, "cross-entropy", 0.5)
    assert partial.owned == baseline.owned
    specs = [found.stages[c.stages["steal"]].spec for c in (partial, baseline)]
    assert specs[0]["owned"] == specs[1]["owned"]
    assert specs[0]["seed"] == specs[1]["seed"]


def test_an_attack_without_data_gets_no_baseline_without_data(plan: Callable[..., Plan]) -> None:
    found = plan({"threat.answers": "weights", "attacks": ["deep-inversion"]})
    assert cell(found, "none", "deep-inversion").owned.fraction == 0
    assert {c.owned.fraction for c in found.cells if c.defense is None} == {1.0}


def test_a_thief_without_images_plays_only_what_needs_none(plan: Callable[..., Plan]) -> None:
    found = plan({"threat.answers": "weights", "threat.data": 0, "attacks": ["kd", "deep-inversion"]})
    assert cell(found, "none", "kd").skipped == "'kd' needs images of its own; the suite grants none"
    assert cell(found, "none", "deep-inversion").skipped == ""
    assert not [c for c in found.cells if c.defense is None]


# Sources


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
        assert ("judges" in stage.spec) == (stage.kind == "score")
        assert ("engine" in stage.spec) == (stage.kind != "data")


# The journal


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(journal, "time", made)
    return made


def journals(folder: Path) -> Callable[[], Journal]:
    """Makes the journals of one attempt after another at one stage."""
    for name in ("out", "work"):
        (folder / name).mkdir()
    return lambda: Journal(folder / "out", folder / "work")


def test_a_journal_puts_back_numbers_generators_and_the_query_count(tmp_path: Path) -> None:
    new = journals(tmp_path)
    log = new()
    log.generators += [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)]
    log("loss", 0.25)
    torch.rand(3, generator=log.generators[1])
    log.meter.answered = 77
    log.save("part-1", {"epochs": 4, "w": torch.arange(3)})
    expected = [torch.rand(5, generator=generator) for generator in log.generators]

    again = new()
    again.generators += [torch.Generator(), torch.Generator()]
    state = again.load("part-1")
    assert state["epochs"] == 4
    assert state["w"].tolist() == [0, 1, 2]
    assert again.numbers == {"loss": 0.25}
    assert again.meter.answered == 77
    assert all(torch.equal(torch.rand(5, generator=g), x) for g, x in zip(again.generators, expected, strict=True))


def test_a_journal_without_a_checkpoint_puts_nothing_back(tmp_path: Path) -> None:
    log = journals(tmp_path)()
    log.meter.answered = 5
    log.generators.append(torch.Generator().manual_seed(3))
    assert log.load("part-1") is None
    assert log.meter.answered == 5
    assert torch.equal(
        torch.rand(2, generator=log.generators[0]), torch.rand(2, generator=torch.Generator().manual_seed(3))
    )


def test_pieces_of_work_are_kept_apart(tmp_path: Path) -> None:
    new = journals(tmp_path)
    log = new()
    slots = [log.slot(), log.slot()]
    for number, slot in enumerate(slots):
        log.save(slot, {"number": number})
    again = new()
    assert [again.load(again.slot())["number"] for _ in slots] == [0, 1]


def test_a_damaged_checkpoint_only_costs_the_work(tmp_path: Path) -> None:
    new = journals(tmp_path)
    new().save("part-1", {"epochs": 1})
    (tmp_path / "work" / "part-1.safetensors").write_bytes(b"torn")
    assert new().load("part-1") is None


def test_a_checkpoint_is_due_when_the_interval_has_passed_since_the_last(tmp_path: Path, clock: Clock) -> None:
    log = journals(tmp_path)()
    assert not log.due()
    clock.now += CHECKPOINT_SECONDS - 0.1
    assert not log.due()
    clock.now += 0.2
    assert log.due()
    log.save("part-1", {})
    assert not log.due()
    clock.now += CHECKPOINT_SECONDS
    assert log.due()


def test_a_stage_that_is_asked_to_stop_saves_first_and_then_stops(tmp_path: Path, clock: Clock) -> None:
    log = journals(tmp_path)()
    log.stop = True
    log.progress(0.5, "there is something to save")
    assert log.due()
    with pytest.raises(Stopped):
        log.save("part-1", {"epochs": 2})
    assert load_state(tmp_path / "work" / "part-1.safetensors")["state"] == {"epochs": 2}


def test_no_method_can_swallow_the_stop() -> None:
    assert not issubclass(Stopped, Exception)


def test_what_cannot_be_resumed_is_never_saved_and_stops_at_once(tmp_path: Path, clock: Clock) -> None:
    new = journals(tmp_path)
    new().save("part-1", {"epochs": 1})
    log = new()
    log.resumable = False
    clock.now += 10 * CHECKPOINT_SECONDS
    assert not log.due()
    assert log.load("part-1") is None
    log.progress(0.1, "")
    log.stop = True
    assert not log.due()
    with pytest.raises(Stopped):
        log.progress(0.2, "")


def test_progress_is_told_at_most_twice_a_second(tmp_path: Path, clock: Clock) -> None:
    log = journals(tmp_path)()
    path = tmp_path / "work" / "progress.json"
    told: list[Json] = []
    for step in range(1, 101):
        clock.now += 0.04
        log.progress(step / 100, f"step {step}")
        if path.exists() and (not told or told[-1] != json.loads(path.read_text())):
            told.append(json.loads(path.read_text()))
    assert 100 * 0.04 * 0.5 / PROGRESS_SECONDS <= len(told) <= 100 * 0.04 / PROGRESS_SECONDS
    assert told[-1]["text"] == f"step {round(told[-1]['share'] * 100)}"


def test_progress_keeps_the_claim_alive(tmp_path: Path, clock: Clock) -> None:
    beats = []

    class Pulse:
        def beat(self) -> None:
            beats.append(clock.now)

    journals(tmp_path)
    log = Journal(tmp_path / "out", tmp_path / "work", Pulse())  # type: ignore[arg-type]
    for _ in range(100):
        clock.now += 1
        log.progress(0.5, "")
    assert all(BEAT_SECONDS <= later - earlier < 2 * BEAT_SECONDS for earlier, later in pairwise(beats))
    assert len(beats) >= 4


def test_pictures_are_kept_and_listed_and_small_ones_enlarged(tmp_path: Path) -> None:
    from PIL import Image

    log = journals(tmp_path)()
    log.images("inverted", torch.rand(9, 1, 8, 8))
    assert log.pictures == ["inverted.png"]
    with Image.open(tmp_path / "out" / "inverted.png") as picture:
        assert min(picture.size) > 3 * 64


# Stages, played in this process


@dataclass
class Room:
    """Where stages of the golden store are played again; the store is only read."""

    store: Store
    folder: Path
    attempts: int = 0

    def play(self, stage: Stage, spec: Mapping[str, Any] | None = None) -> tuple[dict[str, float], Path]:
        """The stage's numbers, and the folder it filled."""
        return run_stage(stage.kind, spec or stage.spec, desk := self.desk()), desk.out

    def desk(self) -> Desk:
        self.attempts += 1
        out = self.folder / f"out{self.attempts}"
        work = self.folder / f"work{self.attempts}"
        out.mkdir()
        work.mkdir()
        return Desk(self.store, out, Journal(out, work), "cpu", self.folder)


@pytest.fixture
def room(golden: Played, tmp_path: Path) -> Room:
    return Room(golden.store, tmp_path)


@pytest.fixture
def stage(golden: Played) -> Callable[[str], Stage]:
    """A stage of the golden run by its label."""
    stages = {stage.label: stage for stage in golden.watcher.finished}
    return lambda label: stages[label]


@dataclass(frozen=True)
class Spy(Attack):
    """Writes down what it was given, and asks about all its images once."""

    needs: ClassVar[Answers] = Answers.LABEL
    seen: ClassVar[list[Context]] = []
    answers: ClassVar[list[Tensor]] = []

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        self.seen.append(ctx)
        self.answers.append(oracle(ctx.data.x))
        return ctx.new_student()


@dataclass(frozen=True)
class Tired(Defense):
    """Answers at random after the first so many questions: what it answers depends on what was asked."""

    stateful: ClassVar[bool] = True
    seeds: ClassVar[list[int]] = []

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        asked = torch.zeros(())
        self.seeds.append(ctx.seed)

        def answer(x: Tensor) -> Tensor:
            asked.add_(len(x))
            logits: Tensor = model(x) / (1 + asked)
            return logits.log_softmax(dim=1)

        return answer


@dataclass(frozen=True)
class Swindler(Attack):
    """Hands in a network of another architecture."""

    needs: ClassVar[Answers] = Answers.NOTHING

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        return ctx.new_student("mini-16")


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the methods above under their names in lower case."""
    extra: dict[str, Any] = {"spy": Spy, "tired": Tired, "swindler": Swindler}
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda kind, name: extra.get(name) or load(kind, name))
    for kept in (Spy.seen, Spy.answers, Tired.seeds):
        kept.clear()


def with_attack(stage: Stage, method: str, **changes: Any) -> Json:
    """The specification of a theft with another attack and a changed threat."""
    threat = {**stage.spec["threat"], **changes}
    return {**stage.spec, "attack": {"method": method, "fields": {}, "source": ""}, "threat": threat}


def test_every_stage_played_here_leaves_the_bits_that_a_worker_left(golden: Played, room: Room) -> None:
    for stage in golden.watcher.finished:
        found, out = room.play(stage)
        assert found == golden.store.manifest(stage.key)["metrics"], stage.label
        files = {path.name: file_digest(path) for path in out.iterdir()}
        assert files == golden.store.manifest(stage.key)["files"], stage.label


def test_a_data_stage_holds_images_as_tensors_and_counts_them(golden: Played, stage: Callable[[str], Stage]) -> None:
    key = stage("read blobs").key
    tensors = load_tensors(golden.store.path(key) / TENSORS)
    data = blobs()
    assert golden.store.manifest(key)["metrics"] == {"classes": 3, "train": 96, "validation": 96, "test": 96}
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        assert torch.equal(tensors[f"{name}.x"], split.x)
        assert torch.equal(tensors[f"{name}.y"], split.y)


def test_queries_are_counted_by_the_runner(golden: Played) -> None:
    assert golden.cells["none--kd--mini-8--seed0"].metrics["queries"] == 2 * 96
    assert golden.cells["none--partial-kd--mini-8--seed0"].metrics["queries"] == 2 * 48
    assert golden.cells["baseline-1-0--cross-entropy--mini-8--seed0"].metrics["queries"] == 0


@pytest.mark.usefixtures("strangers")
def test_a_thief_gets_the_share_of_images_that_it_owns_and_labels_only_if_granted(
    room: Room, stage: Callable[[str], Stage]
) -> None:
    theft = stage("kd from none, seed 0")
    room.play(theft, with_attack(theft, "spy"))
    room.play(theft, with_attack(theft, "spy", data=0.5))
    room.play(theft, with_attack(theft, "spy", data=0.5, labels=False))
    room.play(theft, {**with_attack(theft, "spy", data=0.5), "owned": {"fraction": 0.25, "seed": 0}})
    whole, half, blind, part = (ctx.data for ctx in Spy.seen)
    assert [len(data) for data in (whole, half, blind, part)] == [96, 48, 48, 12]
    assert torch.equal(half.x, blind.x)
    assert (blind.y == UNKNOWN).all()
    assert half.labelled
    owned = {x.numpy().tobytes() for x in half.x}
    assert {x.numpy().tobytes() for x in part.x} < owned < {x.numpy().tobytes() for x in blobs().train.x}
    assert half.y.bincount().tolist() == [16, 16, 16]


@pytest.mark.usefixtures("strangers")
def test_a_thief_sees_no_more_than_is_granted(room: Room, stage: Callable[[str], Stage]) -> None:
    theft = stage("kd from none, seed 0")
    for answers in ("label", "topk", "probs"):
        room.play(theft, with_attack(theft, "spy", answers=answers, topk=2))
    revealed = [answer.isfinite().sum(dim=1).unique().tolist() for answer in Spy.answers]
    assert revealed == [[1], [2], [3]]


@pytest.mark.usefixtures("strangers")
def test_the_thief_and_the_public_are_served_apart(room: Room, stage: Callable[[str], Stage]) -> None:
    theft, score = stage("kd from none, seed 0"), stage("score kd on none, seed 0")
    victim = {**theft.spec["victim"], "defense": {"method": "tired", "fields": {}, "source": ""}}
    alone, _ = room.play(score, {**score.spec, "victim": victim})
    room.play(theft, {**with_attack(theft, "spy"), "victim": victim})
    after, _ = room.play(score, {**score.spec, "victim": victim})
    assert after == alone
    public, thief, again = Tired.seeds
    assert public == again != thief


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(("defense", "kept"), [("tired", False), ("stingy", True)])
def test_a_stateful_service_switches_checkpoints_off(
    room: Room, stage: Callable[[str], Stage], monkeypatch: pytest.MonkeyPatch, defense: str, kept: bool
) -> None:
    monkeypatch.setattr(journal, "CHECKPOINT_SECONDS", 0.0)
    theft = stage("kd from none, seed 0")
    victim = {**theft.spec["victim"], "defense": {"method": defense, "fields": {}, "source": ""}}
    desk = room.desk()
    run_stage("steal", {**theft.spec, "victim": victim}, desk)
    assert desk.journal.resumable is kept
    assert [path.name for path in room.folder.glob("work*/*")] == (["part-1.safetensors"] if kept else [])


@pytest.mark.usefixtures("strangers")
def test_a_network_of_another_architecture_is_refused(room: Room, stage: Callable[[str], Stage]) -> None:
    theft = stage("cross-entropy on 100% of the data, seed 0")
    with pytest.raises(KdbenchError, match=r"steal of the attack 'swindler' must return .* architecture 'mini-8'"):
        room.play(theft, with_attack(theft, "swindler"))


def test_a_network_depends_on_the_seed_the_role_and_its_number_and_on_no_draw() -> None:
    data = blobs().train

    def weights(make: Workshop, name: str | None = None) -> Tensor:
        return torch.cat([p.detach().flatten() for p in make(name).parameters()])

    def workshop(seed: int = 0, role: str = "student") -> Workshop:
        return Workshop("mini-8", data, seed, role, "cpu")

    first, second = (weights(make) for make in [workshop()] * 2)
    torch.rand(7)
    assert torch.equal(weights(workshop()), first)
    assert not torch.equal(first, second)
    assert not torch.equal(weights(workshop(seed=1)), first)
    assert not torch.equal(weights(workshop(role="victim")), first)
    assert len(weights(workshop(), "mini-16")) > len(first)


def test_making_a_network_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Workshop("mini-8", blobs().train, 0, "student", "cpu")()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("images", [96, 0])
def test_normalisation_lives_inside_the_network(images: int) -> None:
    """By the images of its owner; a thief without any assumes mid-grey and a deviation of a quarter."""
    data = blobs().train
    network = Workshop("mini-8", data.take(torch.arange(images)), 0, "student", "cpu")()
    assert isinstance(network, nn.Sequential)
    inside = infer(network[0], data.x)
    mean, std = (data.x.mean(), data.x.std()) if images else (0.5, 0.25)
    torch.testing.assert_close(inside, (data.x - mean) / std)


# The matrix, played by workers


def test_a_played_matrix_has_all_its_cells_done(golden: Played, plan: Callable[..., Plan]) -> None:
    assert set(golden.cells) == {c.name for c in plan().cells}
    assert {c.status for c in golden.cells.values()} == {Status.DONE}
    assert golden.watcher.begun == [(1, 0), (31, 1)]
    assert sorted(golden.watcher.labels) == sorted(stage.label for stage in plan().stages.values())
    assert golden.watcher.closed == 2
    for name, found in golden.cells.items():
        expected = {"student_acc", "student_val_acc", "queries"}
        expected |= set() if name.startswith("baseline") else {"victim_acc", "victim_val_acc", "agreement"}
        assert set(found.metrics) >= expected, name


def test_no_more_workers_run_at_once_than_jobs(golden: Played) -> None:
    assert golden.watcher.most == 2


def test_no_stage_starts_before_what_it_builds_on_is_there(golden: Played) -> None:
    ended: set[str] = set()
    for stage in golden.watcher.finished:
        assert set(stage.inputs) <= ended
        ended.add(stage.key)


def test_a_finished_run_leaves_nothing_but_stages_and_what_they_mean(golden: Played) -> None:
    for name in ("claims", "tmp", "work", "failures"):
        assert os.listdir(golden.store.root / name) == [], name
    assert len(os.listdir(golden.store.root / "specs")) == len(golden.store.published()) == 32


def test_every_manifest_says_what_when_and_by_what(golden: Played) -> None:
    for stage in golden.watcher.finished:
        manifest = golden.store.manifest(stage.key)
        assert manifest["key"] == stage.key
        assert manifest["kind"] == stage.kind
        assert manifest["spec"] == stage.spec
        assert manifest["seconds"] > 0
        assert {"kdbench", "torch", "python", "cpu"} <= set(manifest["machine"])


def test_no_file_in_a_store_is_a_pickle(golden: Played) -> None:
    for path in (path for path in golden.store.root.rglob("*") if path.is_file()):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert list(file.keys())
        elif path.suffix == ".json":
            assert isinstance(json.loads(path.read_text()), dict)
        else:
            assert path.suffix == ".log", path


def test_a_matrix_that_is_cached_runs_no_stage_and_gives_the_same_results(
    golden: Played, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    watcher = Recorder()
    again = run(tiny(), tmp_path, watcher, store=golden.folder / "store")
    assert watcher.labels == []
    assert watcher.begun == [(0, 32)]
    for path in (tmp_path / "out" / "cells").iterdir():
        assert path.read_bytes() == (golden.folder / "out" / "cells" / path.name).read_bytes()
    assert again == golden.cells


def test_force_plays_everything_again_but_the_data(golden: Played, tiny: Callable[..., Suite], tmp_path: Path) -> None:
    golden.copy(tmp_path)
    watcher = Recorder()
    again = run(tiny(DUEL), tmp_path, watcher, force=True)
    assert sorted(watcher.labels) == sorted(DUEL_STAGES[1:])
    assert numbers(again) == {name: value for name, value in numbers(golden.cells).items() if name in again}


def test_a_stage_that_fails_costs_only_what_builds_on_it(
    golden: Played, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    watcher = Recorder()
    cells = run(tiny(DIVERGES), golden.copy(tmp_path), watcher)
    reason = "training diverged: the loss was not finite in epoch 0"
    assert watcher.labels == ["harden by nasty, seed 0"]
    assert watcher.problems == {"harden by nasty, seed 0": reason}
    assert watcher.lost == ON_NASTY
    for name, found in cells.items():
        if name.startswith("nasty--"):
            assert (found.status, found.reason, found.metrics) == (Status.FAILED, reason, {})
        else:
            assert found.metrics == golden.cells[name].metrics
            assert found.status is Status.DONE


def test_a_failure_is_never_cached(golden: Played, tiny: Callable[..., Suite], tmp_path: Path) -> None:
    golden.copy(tmp_path)
    store, cells = Store(tmp_path / "store"), []
    for _ in range(2):
        watcher = Recorder()
        cells.append(run(tiny(DIVERGES), tmp_path, watcher))
        assert watcher.labels == ["harden by nasty, seed 0"]
        assert store.published() == golden.store.published()
    assert numbers(cells[0]) == numbers(cells[1])


def test_a_refused_question_is_the_reason_of_the_cells_that_asked(
    golden: Played, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    cells = run(tiny({"threat.budget": 100}), golden.copy(tmp_path))
    for name, found in cells.items():
        if name.startswith("baseline") or "partial" in name:  # 2 epochs x 48 images are inside the budget
            assert found.status is Status.DONE, name
        else:
            assert found.reason == "asked for 32 answers with 4 of 100 left"
            assert found.status is Status.FAILED


def test_an_error_that_nobody_foresaw_is_reported_with_its_traceback(
    golden: Played, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    store = Store(golden.copy(tmp_path) / "store")
    [train] = [key for key in store.published() if key.startswith("train/")]
    (store.path(train) / WEIGHTS).unlink()
    cells = run(tiny(DUEL | {"attack.kd.temperature": 3.0}), tmp_path)
    [found] = cells.values()
    assert found.status is Status.FAILED
    assert found.reason.startswith("FileNotFoundError: ")
    failure = store.failure(found.keys["steal"])
    assert failure is not None
    assert "Traceback (most recent call last)" in failure["traceback"]
    assert "load_weights" in failure["traceback"]


def test_a_cell_that_is_skipped_says_why_and_runs_nothing(
    golden: Played, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    watcher = Recorder()
    cells = run(tiny({"attacks": ["deep-inversion"]}), tmp_path, watcher, store=golden.folder / "store")
    skipped = {name: c.reason for name, c in cells.items() if c.status is Status.SKIPPED}
    reason = "'deep-inversion' needs weights; the suite grants probs"
    assert skipped == {f"{defense}--deep-inversion--mini-8--seed0": reason for defense in ("none", "nasty", "stingy")}
    assert watcher.labels == []


def test_results_of_another_matrix_are_not_mixed_in(golden: Played, tiny: Callable[..., Suite], tmp_path: Path) -> None:
    store = golden.folder / "store"
    run(tiny(), tmp_path, store=store)
    with pytest.raises(KdbenchError, match=r"holds 12 cells of another matrix .* Choose another folder with --out"):
        run(tiny(DUEL), tmp_path, store=store)
    assert len(read(tmp_path / "out")) == 13


# Workers that die


@dataclass
class Killer(Recorder):
    """Kills the worker of a stage as soon as it is at work, so many times."""

    store: Store | None = None
    victim: str = ""
    times: int = 1
    killed: int = 0

    def tick(self, running: dict[str, tuple[Stage, float, str]]) -> None:
        assert self.store
        for key, (stage, _, _) in running.items():
            if stage.label == self.victim and self.killed < self.times:
                claim = self.store.root / "claims" / key.replace("/", "-")
                until(lambda claim=claim: claim.exists() and claim.stat().st_size > 0)  # type: ignore[misc]
                [worker] = multiprocessing.active_children()
                worker.kill()
                worker.join()
                assert not self.store.has(key)
                self.killed += 1


@pytest.mark.parametrize("victim", DUEL_STAGES[1:4])
def test_a_worker_that_is_killed_is_replaced_and_the_result_is_the_same(
    golden: Played, tiny: Callable[..., Suite], tmp_path: Path, victim: str
) -> None:
    watcher = Killer(store=Store(tmp_path / "store"), victim=victim, times=LOST_ATTEMPTS - 1)
    cells = run(tiny(DUEL), tmp_path, watcher, jobs=1)
    assert watcher.killed == LOST_ATTEMPTS - 1
    assert watcher.labels.count(victim) == LOST_ATTEMPTS
    assert watcher.problems == {}
    assert numbers(cells) == {name: numbers(golden.cells)[name] for name in cells}
    assert digests(Store(tmp_path / "store")).items() <= digests(golden.store).items()
    assert os.listdir(tmp_path / "store" / "claims") == []


def test_a_worker_that_always_dies_becomes_a_failed_stage_that_names_its_log(
    golden: Played, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    watcher = Killer(store=store, victim="kd from none, seed 0", times=100)
    [found] = run(tiny(DUEL), tmp_path, watcher, jobs=1).values()
    assert watcher.killed == LOST_ATTEMPTS == 3
    log = store.log_path(found.keys["steal"])
    assert found.status is Status.FAILED
    assert found.reason == f"the worker was killed by signal 9 (out of memory?), 3 times; its log is {log}"
    assert log.is_file()
    assert watcher.lost == {"score kd on none, seed 0"}
    second = Recorder()
    [again] = run(tiny(DUEL), tmp_path, second, jobs=1).values()  # not cached: now that nobody kills it, it is done
    assert set(second.labels) == {"kd from none, seed 0", "score kd on none, seed 0"}
    assert again.metrics == golden.cells[again.name].metrics


@dataclass
class Neighbour(Recorder):
    """Another driver, which holds the claim on the victim and publishes it when this run has asked for it five times."""

    store: Store | None = None
    other: Store | None = None
    claims: ExitStack = field(default_factory=ExitStack)

    def started(self, stage: Stage) -> None:
        super().started(stage)
        assert self.store
        assert self.other
        asked = self.labels.count(stage.label)
        if stage.kind == "train" and asked == 1:
            assert self.claims.enter_context(self.store.claim(stage.key)) is not None
        elif stage.kind == "train" and asked == 5:
            shutil.copytree(self.other.path(stage.key), built := self.store.scratch(stage.key), dirs_exist_ok=True)
            built.rename(self.store.path(stage.key))
            self.claims.close()


def test_a_claim_of_another_driver_is_waited_for_and_its_result_taken(
    golden: Played, tiny: Callable[..., Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is refused: to be busy is no attempt that was lost."""
    monkeypatch.setattr(matrix, "BUSY_SECONDS", 0.05)
    store = Store(tmp_path / "store")
    watcher = Neighbour(store=store, other=golden.store)
    [found] = run(tiny(DUEL), tmp_path, watcher).values()
    assert watcher.labels.count("train the victim, seed 0") == 5 > LOST_ATTEMPTS
    assert watcher.problems == {}
    assert store.manifest(found.keys["train"])["token"] == golden.store.manifest(found.keys["train"])["token"]
    assert found.metrics == golden.cells[found.name].metrics


# The driver, with engines of paper


@dataclass
class Paper:
    """An engine whose workers do what `act` does, at once; each handle is reported by the script, then GONE."""

    act: Callable[[str, int], str]
    script: Sequence[State] = ()
    name: str = "paper"
    attempts: Counter[str] = field(default_factory=Counter)
    details: dict[Handle, str] = field(default_factory=dict)
    polls: Counter[Handle] = field(default_factory=Counter)
    closed: int = 0

    def slots(self) -> int:
        return 2 - len(self.details)

    def submit(self, keys: Sequence[str]) -> list[Handle]:
        handles = []
        for key in keys:
            self.attempts[key] += 1
            handles.append(Handle(self.name, str(self.attempts[key]), key))
            self.details[handles[-1]] = self.act(key, self.attempts[key])
        return handles

    def poll(self, handles: Collection[Handle]) -> dict[Handle, Report]:
        self.polls.update(handles)
        states = {h: [*self.script, State.GONE][min(self.polls[h] - 1, len(self.script))] for h in handles}
        return {h: Report(s, self.details.pop(h) if s is State.GONE else "") for h, s in states.items()}

    def wait(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


def publish(store: Store, key: str) -> str:
    store.publish(key, store.scratch(key), {})
    return "the worker ended with exit code 0"


def test_a_worker_that_dies_after_it_has_published_counts_as_done(plan: Callable[..., Plan], tmp_path: Path) -> None:
    store = Store(tmp_path)
    engine = Paper(lambda key, _: publish(store, key) and "the worker was killed by signal 9")
    outcome = play(plan(DUEL).stages, store, engine, Recorder(), "data")
    assert outcome.problems == {}
    assert set(engine.attempts.values()) == {1}


def test_a_worker_that_ends_well_without_publishing_is_not_believed(plan: Callable[..., Plan], tmp_path: Path) -> None:
    stages, store = plan(DUEL).stages, Store(tmp_path)
    engine = Paper(lambda key, _: "the worker ended with exit code 0")
    outcome = play(stages, store, engine, Recorder(), "data")
    assert set(outcome.problems) == set(stages)
    assert engine.attempts == {next(iter(stages)): LOST_ATTEMPTS}


def test_an_engine_that_does_not_answer_changes_nothing(plan: Callable[..., Plan], tmp_path: Path) -> None:
    stages, store = plan(DUEL).stages, Store(tmp_path)
    script = (State.QUEUED, State.UNKNOWN, State.UNKNOWN, State.RUNNING, State.UNKNOWN)
    engine = Paper(lambda key, _: publish(store, key), script)
    assert play(stages, store, engine, Recorder(), "data").problems == {}
    assert engine.attempts == dict.fromkeys(stages, 1)


def test_what_builds_on_a_failure_says_what_failed(plan: Callable[..., Plan], tmp_path: Path) -> None:
    found, store = plan(), Store(tmp_path)
    labels = {key: stage.label for key, stage in found.stages.items()}

    def act(key: str, _: int) -> str:
        if labels[key] in ("harden by nasty, seed 0", "kd from stingy, seed 0"):
            store.fail(key, {"reason": f"{key} broke"})
            return "the worker ended with exit code 1"
        return publish(store, key)

    outcome = play(found.stages, store, Paper(act), Recorder(), "data")
    problems = {labels[key]: reason for key, reason in outcome.problems.items()}
    broken = {label: key for key, label in labels.items()}
    harden, steal = broken["harden by nasty, seed 0"], broken["kd from stingy, seed 0"]
    assert problems == {
        "harden by nasty, seed 0": f"{harden} broke",
        "kd from stingy, seed 0": f"{steal} broke",
        "score kd on stingy, seed 0": f"'kd from stingy, seed 0' failed: {steal} broke",
        **dict.fromkeys(ON_NASTY, f"'harden by nasty, seed 0' failed: {harden} broke"),
    }
    assert store.published() == found.stages.keys() - outcome.problems.keys()


def test_a_failure_reaches_what_builds_on_it_through_others(plan: Callable[..., Plan], tmp_path: Path) -> None:
    """A theft from a hardened model does not name the victim that was hardened."""
    found, store, watcher = plan(), Store(tmp_path), Recorder()
    victim = cell(found, "nasty", "kd").stages["train"]

    def act(key: str, _: int) -> str:
        if key == victim:
            store.fail(key, {"reason": "it broke"})
            return "the worker ended with exit code 1"
        return publish(store, key)

    outcome = play(found.stages, store, Paper(act), watcher, "data")
    failed = {found.stages[key].label.removesuffix(", seed 0") for key in outcome.problems}
    assert failed == VICTIMS
    assert {label.removesuffix(", seed 0") for label in watcher.lost} == VICTIMS - {"train the victim"}
    assert store.published() == found.stages.keys() - outcome.problems.keys()


def test_an_old_failure_is_forgiven_before_another_attempt(plan: Callable[..., Plan], tmp_path: Path) -> None:
    stages, store = plan(DUEL).stages, Store(tmp_path)
    for key in stages:
        store.fail(key, {"reason": "yesterday's"})
    engine = Paper(lambda key, attempt: publish(store, key) if attempt == 2 else "the worker was killed by signal 9")
    assert play(stages, store, engine, Recorder(), "data").problems == {}
    assert os.listdir(store.root / "failures") == []


def test_thefts_go_before_scores_that_nothing_waits_for(plan: Callable[..., Plan], tmp_path: Path) -> None:
    found, store, watcher = plan(), Store(tmp_path), Recorder()
    play(found.stages, store, Paper(lambda key, _: publish(store, key)), watcher, "data")
    kinds = [stage.kind for stage in watcher.finished]
    assert kinds.index("score") > max(index for index, kind in enumerate(kinds) if kind == "steal") - 2


def test_the_engine_and_the_display_are_closed_whatever_happens(plan: Callable[..., Plan], tmp_path: Path) -> None:
    def interrupt(key: str, attempt: int) -> str:
        raise KeyboardInterrupt

    engine, watcher = Paper(interrupt), Recorder()
    with pytest.raises(KeyboardInterrupt):
        play(plan(DUEL).stages, Store(tmp_path), engine, watcher, "data")
    assert (engine.closed, watcher.closed) == (1, 1)


# The local engine


@pytest.fixture
def long_stage(tiny: Callable[..., Suite], golden: Played, tmp_path: Path) -> Callable[..., tuple[Store, str]]:
    """Makes a store in which a training of so many epochs (hours, by default) waits to be started, and its key."""

    def make(epochs: int = 10**6) -> tuple[Store, str]:
        store = Store(golden.copy(tmp_path) / "store")
        [data] = [key for key in store.published() if key.startswith("data/")]
        found = make_plan(tiny(DUEL | {"victim.recipe.epochs": epochs}), Numerics(), store.manifest(data)["content"])
        [stage] = [stage for stage in found.stages.values() if stage.kind == "train"]
        store.write_spec(stage.key, {"kind": stage.kind, "spec": stage.spec, "label": "long", "data_folder": "data"})
        return store, stage.key

    return make


def until(claim: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until `claim` holds."""
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def under_way(store: Store, key: str) -> bool:
    return bool(store.progress(key))


def test_closing_lets_workers_stop_at_a_checkpoint(long_stage: Callable[..., tuple[Store, str]]) -> None:
    store, key = long_stage()
    engine = LocalExecutor(store.root, 1)
    engine.submit([key])
    until(lambda: under_way(store, key))
    [worker] = multiprocessing.active_children()
    engine.close()
    assert worker.exitcode == STOPPED
    assert load_state(store.workplace(key) / "part-1.safetensors")["state"]["epochs"] > 0
    assert not store.has(key)
    assert store.failure(key) is None
    for name in ("claims", "tmp"):
        assert os.listdir(store.root / name) == []


def test_closing_kills_workers_that_do_not_stop(
    long_stage: Callable[..., tuple[Store, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, key = long_stage()
    monkeypatch.setattr("kdbench.runner.executors.local.GRACE_SECONDS", 0.3)
    engine = LocalExecutor(store.root, 1)
    engine.submit([key])
    until(lambda: under_way(store, key))
    [worker] = multiprocessing.active_children()
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 3
    assert worker.exitcode == -signal.SIGKILL


def test_two_workers_on_one_stage_do_no_harm(long_stage: Callable[..., tuple[Store, str]]) -> None:
    """Claims only save work: without them the second to finish discards its own, and nothing has failed."""
    store, key = long_stage(100)
    engine = LocalExecutor(store.root, 2)
    handles = []
    for _ in range(2):
        handles += engine.submit([key])
        until((store.root / "claims" / key.replace("/", "-")).exists)
        (store.root / "claims" / key.replace("/", "-")).unlink()
    until(lambda: all(report.state is State.GONE for report in engine.poll(handles).values()))
    assert store.failure(key) is None
    assert os.listdir(store.root / "tmp") == []
    files = store.manifest(key)["files"]
    assert files == {name: file_digest(store.path(key) / name) for name in files}


@pytest.fixture
def at_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets a worker do something else than its stage, in this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda act: monkeypatch.setattr(worker, "run_stage", lambda *_: act())
    signal.signal(signal.SIGTERM, before)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("published", [False, True])
def test_an_error_after_somebody_else_has_published_is_no_failure(
    long_stage: Callable[..., tuple[Store, str]], at_work: Callable[..., None], published: bool
) -> None:
    """The other has tidied up: a checkpoint that is written then finds no folder."""
    store, key = long_stage()

    def act() -> None:
        if published:
            publish(store, key)
        raise FileNotFoundError("part-1.safetensors")

    at_work(act)
    assert worker.work(str(store.root), key) == (PUBLISHED if published else FAILED)
    failure = store.failure(key)
    assert failure is None if published else failure["reason"] == "FileNotFoundError: part-1.safetensors"  # type: ignore[index]
    for name in ("claims", "tmp"):
        assert os.listdir(store.root / name) == [], name


def test_a_second_worker_on_a_stage_that_is_worked_on_is_busy(long_stage: Callable[..., tuple[Store, str]]) -> None:
    store, key = long_stage()
    first, second = LocalExecutor(store.root, 1), LocalExecutor(store.root, 1)
    first.submit([key])
    until(lambda: under_way(store, key))
    assert ending(second, key) == f"the worker ended with exit code {BUSY}"
    first.close()


def ending(engine: LocalExecutor, key: str) -> str:
    """How a worker on `key` ends."""
    [handle] = engine.submit([key])
    while (report := engine.poll([handle])[handle]).state is State.RUNNING:
        engine.wait(1)
    assert report.state is State.GONE
    assert engine.poll([handle]) == {handle: Report(State.GONE)}  # asked again, it has forgotten the handle
    return report.detail


def test_slots_are_taken_and_given_back(long_stage: Callable[..., tuple[Store, str]]) -> None:
    store, key = long_stage()
    [published] = [other for other in store.published() if other.startswith("train/")]
    engine = LocalExecutor(store.root, 3)
    assert engine.slots() == 3
    engine.submit([key, published])
    assert engine.slots() == 1
    engine.close()
    assert engine.slots() == 3


def test_a_worker_on_what_is_published_ends_at_once(golden: Played) -> None:
    engine = LocalExecutor(golden.store.root, 1)
    key = next(iter(golden.store.published()))
    before = golden.store.manifest(key)
    assert ending(engine, key) == f"the worker ended with exit code {PUBLISHED}"
    assert golden.store.manifest(key) == before


def test_a_worker_that_fails_says_so_in_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert ending(LocalExecutor(store.root, 1), "train/unheard-of") == f"the worker ended with exit code {FAILED}"
    failure = store.failure("train/unheard-of")
    assert failure is not None
    assert failure["reason"].startswith("FileNotFoundError")


@pytest.mark.parametrize("error", [EOFError(), ConnectionRefusedError("refused"), BrokenPipeError("pipe")], ids=repr)
def test_a_worker_that_cannot_be_started_is_a_lost_attempt_with_the_reason(
    golden: Played, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The forkserver was killed just as it was asked for a worker."""

    def fail(*_: object) -> None:
        raise error

    engine, key = LocalExecutor(golden.store.root, 1), next(iter(golden.store.published()))
    with monkeypatch.context() as patch:
        patch.setattr(ForkServerProcess, "start", fail)
        detail = ending(engine, key)
    assert detail == f"the worker could not be started ({type(error).__name__}: {error})"
    assert engine.slots() == 1
    assert ending(engine, key) == f"the worker ended with exit code {PUBLISHED}"


def test_what_a_worker_prints_stands_in_its_log(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ending(LocalExecutor(store.root, 1), "no-kind")
    assert "ValueError" in store.log_path("no-kind").read_text()


def test_workers_run_one_thread_each_whatever_this_process_runs(golden: Played) -> None:
    """A stage's numbers depend on the threads, which the key names; the environment of the driver must not matter."""
    for key in golden.store.published():
        assert golden.store.manifest(key)["spec"]["numerics"]["threads"] == 1
    before = dict(os.environ)
    LocalExecutor(golden.store.root, 1).submit([])
    assert dict(os.environ) == before


# The command behind the command line


def request(folder: Path, **changes: Any) -> command.Request:
    values: Json = {"store": folder / "store", "out": folder / "out", "device": "cpu", "jobs": 2, "quiet": True}
    return command.Request(**values | changes)


def test_a_run_whose_cells_are_done_ends_with_0(
    golden: Played, tiny_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(tiny_file, request(golden.copy(tmp_path), attack=["kd"], defense=["nasty"])) == 0
    printed = capsys.readouterr().out
    assert "nasty" in printed
    assert "failed" not in printed
    assert {c.defense.label for c in read(tmp_path / "out") if c.defense} == {"none", "nasty"}


def test_a_run_in_which_cells_fail_ends_with_1_and_says_how_many_and_why(
    golden: Played, tiny_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"{path}={value}" for path, value in DIVERGES.items()]
    assert command.run(tiny_file, request(golden.copy(tmp_path), changes=changes)) == 1
    assert "3 cells failed: training diverged: the loss was not finite in epoch 0" in capsys.readouterr().out
    status = command.status(tmp_path / "out")
    assert "cells: 10 done, 3 failed" in status
    assert "failed: nasty--kd--mini-8--seed0: training diverged" in status


def test_a_dry_run_prints_the_plan_and_plays_nothing(
    golden: Played, tiny_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden.copy(tmp_path)
    assert command.run(tiny_file, request(tmp_path, dry_run=True, changes=["defense.nasty.omega=0.5"])) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^to do +harden +harden by nasty, seed 0$", printed, re.MULTILINE)
    assert re.search(r"^cached +train +train the victim, seed 0$", printed, re.MULTILINE)
    assert len(re.findall(r"^to do ", printed, re.MULTILINE)) == 1 + len(ON_NASTY)
    assert Store(tmp_path / "store").published() == golden.store.published()
    assert not (tmp_path / "out").exists()


def test_the_status_of_a_run_counts_stages_and_cells(golden: Played) -> None:
    lines = command.status(golden.folder / "out").splitlines()
    assert lines[0].startswith("stages: 32 of 32 done, ")
    assert lines[1:] == ["cells: 13 done"]


def test_the_status_of_a_run_under_way_says_what_runs(golden: Played, tmp_path: Path) -> None:
    shutil.copytree(golden.folder, tmp_path / "copy")
    store = Store(tmp_path / "copy" / "store")
    key = golden.cells["none--kd--mini-8--seed0"].keys["steal"]
    store.discard(key)
    write_json(store.workplace(key) / "progress.json", {"share": 0.25, "text": "epoch 1/4"})
    lines = command.status(tmp_path / "copy" / "out").splitlines()
    assert lines[0].startswith("stages: 31 of 32 done, ")
    assert lines[1] == "  under way: kd from none, seed 0 25% epoch 1/4"


def test_the_status_of_another_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(KdbenchError, match="is not the results folder of a run"):
        command.status(tmp_path)


def test_a_change_is_a_toml_value_or_else_a_string() -> None:
    changes = ["attack.kd.temperature=20", "threat.labels=false", "title=a b", "seeds=[1,2]", "a.b==c"]
    tree = command.Request(changes=changes).tree()
    assert tree == {"attack.kd.temperature": 20, "threat.labels": False, "title": "a b", "seeds": [1, 2], "a.b": "=c"}


@pytest.mark.parametrize("text", ["omega", "=3", ""])
def test_a_change_without_a_path_or_a_value_is_a_sentence(text: str) -> None:
    with pytest.raises(KdbenchError, match="--set takes PATH=VALUE"):
        command.Request(changes=[text]).tree()


def test_a_device_that_is_not_there_is_a_sentence(tiny: Callable[..., Suite], tmp_path: Path) -> None:
    absent = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(KdbenchError, match=f"The device '{absent}' is not available here. Available: cpu"):
        Session(tiny(), options(tmp_path, device=absent), Recorder())


# Watching


@pytest.fixture
def watched(plan: Callable[..., Plan]) -> list[Stage]:
    return list(plan(DUEL).stages.values())


def tell(watcher: SilentWatcher, stages: Sequence[Stage]) -> None:
    """A run of five stages: two end, one fails and costs two."""
    first, second, third, *above = stages
    watcher.begin({stage.key: stage for stage in stages}, 7)
    for stage in (first, second, third):
        watcher.started(stage)
        watcher.tick({stage.key: (stage, 0.5, "epoch 1/2")})
        watcher.ended(stage, 1.5, "it [broke]" if stage is third else "")
    watcher.dropped(above)
    watcher.close()


def test_a_run_in_plain_lines_says_what_ended_and_what_failed(watched: list[Stage]) -> None:
    out = io.StringIO()
    tell(PlainWatcher(Console(file=out)), watched)
    lines = out.getvalue().splitlines()
    assert lines[0] == "5 stages to do, 7 done before"
    assert lines[1].startswith("[1/5] read blobs: 1.5 s; ")
    assert lines[2].startswith("[2/5] train the victim, seed 0: 1.5 s; ")
    assert lines[3].startswith("[3/5] kd from none, seed 0: FAILED: it [broke]; ")
    assert len(lines) == 4


def test_plain_lines_say_now_and_then_what_runs(watched: list[Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock = io.StringIO(), Clock()
    monkeypatch.setattr("kdbench.runner.watch.time", clock)
    watcher = PlainWatcher(Console(file=out))
    running = {watched[1].key: (watched[1], 0.5, "epoch 1/2")}
    for _ in range(25):
        clock.now += 1
        watcher.tick(running)
        watcher.tick({})
    assert out.getvalue().splitlines() == ["running: train the victim, seed 0 50% epoch 1/2"] * 2


def test_a_live_display_shows_what_runs_and_keeps_failures_on_the_screen(watched: list[Stage]) -> None:
    out = io.StringIO()
    watcher = LiveWatcher(Console(file=out, force_terminal=True, width=200))
    tell(watcher, watched[:1] * 3)  # the data stage comes first, in a run of its own
    tell(watcher, watched)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "FAILED kd from none, seed 0: it [broke]" in text
    assert "train the victim, seed 0  50%  epoch 1/2" in text
    assert "2/5" in text


def test_a_display_without_work_stays_dark(watched: list[Stage]) -> None:
    out = io.StringIO()
    for watcher in (LiveWatcher(Console(file=out, force_terminal=True)), PlainWatcher(Console(file=out))):
        watcher.begin({}, 32)
        watcher.tick({})
        watcher.close()
    assert out.getvalue() == ""


def test_time_left_is_the_work_left_at_the_pace_so_far(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 of 13 thefts of 10 s each, two at a time, took 20 s: the other 9 take 45 s."""
    out, clock = io.StringIO(), Clock()
    monkeypatch.setattr("kdbench.runner.watch.time", clock)
    thefts = {key: stage for key, stage in plan().stages.items() if stage.kind == "steal"}
    watcher = PlainWatcher(Console(file=out))
    watcher.begin(thefts, 0)
    watcher._tally.since = clock.now
    clock.now += 20
    for stage in list(thefts.values())[:4]:
        watcher.ended(stage, 10.0, "")
    assert out.getvalue().splitlines()[-1].endswith("about 45 s left")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (600, "10 min"), (5400, "1.5 h"), (86400, "24.0 h")],
)
def test_durations_are_in_a_persons_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_manifests_are_the_only_json_of_a_stage(golden: Played) -> None:
    for key in golden.store.published():
        assert [path.name for path in golden.store.path(key).glob("*.json")] == [MANIFEST]
