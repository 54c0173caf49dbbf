"""Migration: records of schema 1 are read in the present words, and rewritten with the same numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_records import merged

from kdbench import records
from kdbench.cli import main
from kdbench.errors import KdbenchError
from kdbench.metrics import METRICS
from kdbench.records import NumericsRecord, ScenarioRecord, Status
from kdbench.runs import plan_file
from kdbench.runs.conversion import convert

SCHEMA_1 = Path(__file__).with_name("schema_1")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A results folder of schema 1."""
    return Path(shutil.copytree(SCHEMA_1, tmp_path / "old"))


def test_records_of_schema_1_are_read_in_the_present_words(old: Path) -> None:
    cells = {cell.name: cell for cell in records.read(old)}
    assert cells.keys() == {path.stem for path in (old / "cells").iterdir()} == set(records.names(old))
    cell = cells["nasty--kd--mini-8--seed0"]
    assert cell.scenario == ScenarioRecord("default", "probs", 5, 60000, 1.0, True)
    assert cell.metrics.keys() >= {"fidelity", "victim_consistency", "victim_robust_pgd", "student_robust_fgsm"}
    assert cell.metrics.keys() <= METRICS.keys()
    assert cell.numbers.keys() == {"harden.contradiction"}
    assert cell.keys.keys() == cell.seconds.keys() == {"train", "harden", "steal", "evaluate", "evaluate_victim"}
    assert cell.keys["evaluate"].startswith("score/")
    assert cell.protocol.numerics == NumericsRecord()
    [number] = cell.reported
    assert (number.metric, number.value) == ("victim_acc", 0.9)
    assert cells["nasty--kd--mini-8--seed1"].status is Status.FAILED


def test_records_of_schema_1_keep_their_numbers(old: Path) -> None:
    for cell in records.read(old):
        written = json.loads((old / "cells" / f"{cell.name}.json").read_text())
        assert sorted([*cell.metrics.values(), *cell.numbers.values()]) == sorted(written["metrics"].values())
        assert sorted(cell.seconds.values()) == sorted(written["seconds"].values())


def test_what_methods_did_not_say_under_schema_1_is_known_of_the_two_that_matter(old: Path) -> None:
    cells = records.read(old)
    assert {c.defense.name for c in cells if c.defense and c.defense.is_reference} == {"none"}
    assert {c.attack.name for c in cells if c.attack.labels_only} == {"hard-label"}
    assert {c.attack.name for c in cells if c.attack.adaptive} == {"kd-grid"}


def test_auxiliary_models_have_their_new_name(old: Path) -> None:
    cell = next(cell for cell in records.read(old) if cell.attack.name == "kd-grid")
    assert cell.keys["auxiliary"].startswith("equip/")
    assert "auxiliary" in cell.seconds
    assert {"steal.chosen_temperature", "steal.chosen_alpha"} <= cell.numbers.keys()


def test_a_converted_folder_holds_the_same_cells_and_nothing_of_the_old_layout(old: Path) -> None:
    cells = records.read(old)
    assert records.is_old(old)
    assert convert(old) == len(cells) == 5
    assert not records.is_old(old)
    assert records.read(old) == cells
    assert sorted(path.name for path in old.iterdir()) == ["cells.jsonl", "plan.json"]
    assert plan_file.read(old).stages[0].title == "train the victim, seed 0"
    assert "label" not in (old / "plan.json").read_text().replace("hard-label", "")
    with pytest.raises(KdbenchError, match=f"^{old} does not have the old layout"):
        convert(old)


def test_a_conversion_that_was_interrupted_is_finished_by_the_next(old: Path) -> None:
    cells = records.read(old)
    records.write(cells, old)
    assert convert(old) == len(cells)
    assert not (old / "cells").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threat": ...}, ": the field 'threat' is missing"),
        ({"owned": {"fraction": 2.0}}, ": subset.fraction must be less than or equal to 1, not 2.0"),
        ({"metrics": {"student_acc": float("nan")}}, ": metrics.student_acc must be a finite number, not nan"),
        ({"schema": 3}, ": schema must be 1 in this layout, not 3"),
    ],
)
def test_a_damaged_record_of_schema_1_is_named_and_nothing_is_converted(
    change: dict[str, Any], said: str, old: Path
) -> None:
    path = old / "cells" / "nasty--kd--mini-8--seed0.json"
    path.write_text(json.dumps(merged(json.loads(path.read_text()), change)))
    with pytest.raises(KdbenchError, match=f"^{path}{said}"):
        convert(old)
    assert len(list((old / "cells").iterdir())) == 5
    assert not (old / "cells.jsonl").exists()


def test_the_command_line_converts_a_folder(old: Path) -> None:
    done = CliRunner().invoke(main, ["convert", str(old)])
    assert (done.exit_code, done.output) == (0, f"5 cells rewritten to {old / 'cells.jsonl'}\n")
    again = CliRunner().invoke(main, ["convert", str(old)])
    assert again.exit_code == 2
    assert "does not have the old layout" in again.stderr
