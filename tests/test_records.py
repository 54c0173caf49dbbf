"""Records: what is written is read back, and what is damaged is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdbench import records
from kdbench.errors import KdbenchError
from kdbench.metrics import METRICS
from kdbench.records import (
    AttackRecord,
    Cell,
    DefenseRecord,
    NumericsRecord,
    Protocol,
    ScenarioRecord,
    Status,
    SubsetRecord,
)

NASTY = DefenseRecord("mine", "nasty", {"omega": 0.04}, "kdbench 0.1.0", None, False, False)
KD = AttackRecord("kd", "kd", {"temperature": 4.0}, "kdbench 0.1.0", None, False, False)
SCENARIO = ScenarioRecord("default", "probs", 5, 60000, 1.0, True)
CELL = Cell(
    suite="digits",
    dataset="digits",
    dataset_digest="d1",
    classes=10,
    victim="mini-16",
    student="mini-8",
    defense=NASTY,
    attack=KD,
    seed=0,
    scenario=SCENARIO,
    subset=SubsetRecord(),
    tolerance=0.02,
    status=Status.DONE,
    reason="",
    metrics={"student_acc": 0.9, "victim_acc": 0.95, "fidelity": 0.1 + 0.2, "queries": 27000.0},
    numbers={"harden.contradiction": 4.022445201873779},
    seconds={"train": 0.779},
    keys={"train": "train/91678f829587501bb4eb5259a69e24fe"},
    pictures=("pictures/sheet.png",),
    protocol=Protocol({"epochs": 30}, {"epochs": 30}, {"level": "none"}, NumericsRecord()),
    machine={"python": "3.11.7"},
)
FAILED = replace(CELL, seed=1, status=Status.FAILED, reason="it broke", metrics={}, numbers={}, seconds={})


def test_what_is_written_is_read_back_sorted_by_name(tmp_path: Path) -> None:
    baseline = replace(CELL, defense=None, scenario=replace(SCENARIO, access="nothing", budget=None))
    cells = [FAILED, CELL, baseline]
    records.write(cells, tmp_path)
    assert records.read(tmp_path) == [baseline, CELL, FAILED]
    assert list(records.names(tmp_path)) == [cell.name for cell in (baseline, CELL, FAILED)]
    assert [path.name for path in tmp_path.iterdir()] == [records.FILE]


def test_the_same_cells_make_the_same_bytes_in_whatever_order_they_come(tmp_path: Path) -> None:
    first = records.write([CELL, FAILED], tmp_path).read_bytes()
    assert records.write([FAILED, CELL], tmp_path).read_bytes() == first
    assert len(first.splitlines()) == 2


def test_writing_that_is_interrupted_leaves_the_records_of_before(tmp_path: Path) -> None:
    records.write([CELL], tmp_path)

    def interrupted() -> Any:
        yield CELL
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write_sorted(interrupted(), tmp_path)
    assert records.read(tmp_path) == [CELL]
    assert [path.name for path in tmp_path.iterdir()] == [records.FILE]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": "x"}, r"seed must be a valid integer, not 'x'\."),
        ({"seed": True}, r"seed must be a valid integer, not True\."),
        ({"classes": 0}, r"classes must be greater than or equal to 1, not 0\."),
        ({"status": "over"}, r"status must be 'done', 'bypassed', 'skipped' or 'failed', not 'over'\."),
        ({"metrics": {"student_acc": None}}, r"metrics\.student_acc must be a valid number, not None\."),
        ({"metrics": {"student_acc": float("nan")}}, r"metrics\.student_acc must be a finite number, not nan\."),
        ({"metrics": {"student_acc": float("inf")}}, r"metrics\.student_acc must be a finite number, not inf\."),
        ({"numbers": {"steal.kl": float("-inf")}}, r"numbers\.steal\.kl must be a finite number, not -inf\."),
        ({"metrics": {"likeness": 1.0}}, r"metrics\.likeness must be a metric that .* declares, not 'likeness'\."),
        ({"scenario": {"access": "all"}}, r"scenario\.access must be one of nothing, label, topk, probs, weights"),
        ({"subset": {"fraction": 1.5}}, r"subset\.fraction must be less than or equal to 1, not 1\.5\."),
        ({"defense": {"name": 3}}, r"defense\.name must be a valid string, not 3\."),
        ({"reported": [{"metric": "x"}]}, r"reported\.0\.metric must be a metric"),
        ({"schema": 1}, r"schema must be 2, not 1\."),
        ({"part": 1}, r"there is no field 'part'\."),
        ({"suite": None}, r"suite must be a valid string, not None\."),
        ({"status": "skipped"}, r"the record must say a reason with the status 'skipped'\."),
        ({"status": "failed", "reason": "x"}, r"the record must have no metrics with the status 'failed'\."),
        ({"status": "bypassed", "reason": "x", "defense": None}, r"the record must name a defense with the status"),
        ({"metrics": {"student_acc": ...}}, r"the record must have the metric student_acc with the status 'done'\."),
    ],
)
def test_a_damaged_record_is_a_sentence_that_names_file_line_field_value_and_what_is_allowed(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = records.write([CELL, FAILED], tmp_path)
    first, second = path.read_text().splitlines()
    path.write_text(f"{second}\n{json.dumps(merged(json.loads(first), change))}\n")
    with pytest.raises(KdbenchError, match=rf"^{path}, line 2: {said}") as error:
        records.read(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def merged(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The values with this change; of tables too. `...` takes a name out."""
    inner = {
        name: merged(values[name], value) if isinstance(value, dict) and isinstance(values.get(name), dict) else value
        for name, value in change.items()
    }
    return {name: value for name, value in (values | inner).items() if value is not ...}


def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    path = records.write([CELL], tmp_path)
    path.write_text(json.dumps(merged(json.loads(path.read_text()), {"suite": ...})))
    with pytest.raises(KdbenchError, match=rf"^{path}, line 1: the field 'suite' is missing\.$"):
        records.read(tmp_path)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"", b"\n"])
def test_a_line_that_is_not_json_is_named(text: bytes, tmp_path: Path) -> None:
    path = records.write([CELL], tmp_path)
    path.write_bytes(path.read_bytes() + text + b"\n")
    with pytest.raises(KdbenchError, match=rf"^{path}, line 2 is not JSON: "):
        records.read(tmp_path)


def test_two_cells_of_one_name_are_named(tmp_path: Path) -> None:
    path = records.write([CELL], tmp_path)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(KdbenchError, match=f"holds two cells of the name '{CELL.name}'"):
        records.read(tmp_path)


def test_a_folder_without_records_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(KdbenchError, match=f"^There are no results in {tmp_path}: it has no cells.jsonl"):
        records.read(tmp_path)
    assert list(records.names(tmp_path)) == []


def test_scenarios_other_than_the_default_stand_in_the_name() -> None:
    assert CELL.name == "mine--kd--mini-8--seed0"
    assert replace(CELL, scenario=replace(SCENARIO, name="poor")).name == "mine--kd--mini-8--seed0--poor"
    assert replace(CELL, defense=None, student="hub:a/b").name == "baseline-1-0--kd--hub-a-b--seed0"


def test_every_metric_is_declared_under_its_own_name() -> None:
    assert all(name == metric.name for name, metric in METRICS.items())
    assert all(metric.heading and metric.meaning and not metric.meaning.endswith(".") for metric in METRICS.values())
