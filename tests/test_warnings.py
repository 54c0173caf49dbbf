"""Warnings on the board: each raised exactly where its numbers say so, and explained once."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from made_up_cells import LABELS_ONLY, NO_DATA, defense, ended, leaderboard, made_up, over_seeds, rows

from kdbench.board.formats.rendering import render
from kdbench.board.warnings import MEANING
from kdbench.records import AttackRecord, Cell, Status

ROBUST = {
    "victim_consistency": 1.0,
    "victim_robust_fgsm": 0.5,
    "victim_robust_square": 0.4,
    "victim_robust_pgd": 0.3,
    "transfer": 0.2,
}
OF_CELLS = ("no adaptive attack run", "bypassed", "skipped", "failed")  # which cells there are, and not their numbers
SEEDS = (0.0, 0.01, 0.02)
LEFT = 0.96  # of the images, those that the made-up victims classify rightly


def calm(more: dict[str, float] | None = None, baseline: float = 0.95, **changes: Any) -> list[Cell]:
    """`none` and `nasty` against `kd`, which gains nothing over an attacker with accuracy `baseline`; changes are to `nasty`."""
    cells = over_seeds("none", "kd", [0.90 + d for d in SEEDS], more=ROBUST)
    cells += over_seeds("nasty", "kd", [0.80 + d for d in SEEDS], more=ROBUST | (more or {}), **changes)
    return cells + over_seeds(None, "cross-entropy", [baseline + d for d in SEEDS])


def by_seed(metric: str, values: Sequence[float]) -> list[Cell]:
    """`calm` cells in which a metric of `nasty` has these values with seeds 0, 1, …; other seeds are left out."""
    changed = [
        replace(cell, metrics=cell.metrics | {metric: values[cell.seed]})
        if cell.defense and cell.defense.name == "nasty"
        else cell
        for cell in calm()
        if cell.seed < len(values)
    ]
    assert len(changed) == 3 * len(values)
    return changed


def warned(cells: Iterable[Cell]) -> dict[str, str]:
    """The warnings of each defense that its numbers raise, as the ranking has them."""
    found = {str(row["defense"]): str(row["warnings"]).split("; ") for row in rows(leaderboard(cells), "ranking")}
    return {name: "; ".join(text for text in own if not text.startswith(OF_CELLS)) for name, own in found.items()}


def explained(cells: Iterable[Cell]) -> list[str]:
    """The warnings that the notes explain."""
    notes = [note for note in leaderboard(cells).notes if note.startswith("Warning '")]
    names = [note.removeprefix("Warning '").partition("'")[0] for note in notes]
    return [name for name in names if name not in OF_CELLS]


def test_where_nothing_is_suspicious_nothing_is_said() -> None:
    assert warned(calm()) == {"none": "", "nasty": ""}
    assert explained(calm()) == []


def test_a_defense_whose_strongest_attack_learns_from_labels_gets_a_warning_but_not_the_reference() -> None:
    labels = [c for d in ("none", "nasty") for c in over_seeds(d, "hard-label", [0.93] * 3, more=ROBUST)]
    assert warned(calm() + labels) == {"none": "", "nasty": "labels suffice"}


@pytest.mark.parametrize(
    ("labels", "warning"),
    [
        ([0.83, 0.84, 0.84], "labels suffice"),
        ([0.80, 0.81, 0.82], ""),
        ([0.79, 0.80, 0.81], ""),
        ([0.81, 0.80, 0.90], ""),  # better by 0.01, -0.01 and 0.08: the interval holds 0
        ([0.99], ""),  # one seed proves nothing
    ],
)
def test_a_strongest_attack_that_is_surely_weaker_than_from_labels_gets_a_warning(
    labels: list[float], warning: str
) -> None:
    """Chosen on validation data, `kd` with 0.80, 0.81, 0.82 is the strongest attack, whatever labels baseline would give."""
    worse = {"student_val_acc": 0.1}
    cells = [c for d in ("none", "nasty") for c in over_seeds(d, "hard-label", labels, more=ROBUST | worse)]
    assert warned(calm(baseline=0.995) + cells) == {"none": "", "nasty": warning}


def test_the_labels_warning_asks_the_record_and_not_the_name() -> None:
    for label, method, warning in (("cautious", "hard-label", "labels suffice"), ("hard-label", "kd", "")):
        attacker = AttackRecord(label, method, {}, "made up", labels_only=method == LABELS_ONLY)
        cells = [replace(cell, attack=attacker) for cell in over_seeds("nasty", label, [0.93] * 3, more=ROBUST)]
        assert warned(calm() + cells)["nasty"] == warning


def test_a_loss_above_the_tolerance_gets_a_warning_and_one_of_exactly_it_is_not() -> None:
    assert warned(calm(victim_acc=0.939)) == {"none": "", "nasty": "utility loss above tolerance"}
    assert warned(calm(victim_acc=0.94)) == {"none": "", "nasty": ""}
    baseline = [cell for cell in calm(victim_acc=0.5) if not cell.defense or cell.defense.name == "nasty"]
    assert warned(baseline) == {"nasty": ""}, "without the reference nothing is known to be lost"


def test_repeated_questions_with_other_answers_are_inconsistent_from_one_seed_on() -> None:
    assert warned(by_seed("victim_consistency", [1.0, 0.989, 1.0]))["nasty"] == "inconsistent answers"
    assert warned(by_seed("victim_consistency", [1.0, 0.99, 1.0]))["nasty"] == ""
    assert warned(by_seed("victim_consistency", [0.5]))["nasty"] == "inconsistent answers"


def test_a_service_that_declares_its_state_is_not_inconsistent() -> None:
    assert warned(calm({"victim_consistency": 0.1}))["nasty"] == "inconsistent answers"
    declared = replace(defense("nasty"), stateful=True)
    assert warned(calm({"victim_consistency": 0.1}, defense=declared))["nasty"] == ""


@pytest.mark.parametrize(
    ("metric", "below", "name"),
    [
        ("victim_robust_fgsm", 0.25, "FGSM"),
        ("victim_robust_square", 0.25, "Square"),
        ("transfer", 1 - 0.25 / LEFT, "transfer from kd"),
    ],
)
def test_what_ought_to_be_weaker_than_pgd_and_is_not_is_named(metric: str, below: float, name: str) -> None:
    equal = 1 - 0.3 / LEFT if metric == "transfer" else 0.3
    assert warned(by_seed(metric, [below] * 3)) == {"none": "", "nasty": f"masked gradients ({name})"}
    assert warned(by_seed(metric, [equal] * 3))["nasty"] == ""
    assert warned(by_seed(metric, [below]))["nasty"] == "", "one seed proves nothing"
    astray = [equal, equal, below]  # the interval of the difference holds 0
    assert warned(by_seed(metric, astray))["nasty"] == ""


def test_all_masks_stand_in_one_warning_and_the_reference_may_wear_one() -> None:
    masked = {"victim_robust_fgsm": 0.2, "victim_robust_square": 0.1, "transfer": 0.9}
    cells = calm(masked) + over_seeds("nasty", "tuned", [0.7] * 3, more=ROBUST | masked)
    words = "masked gradients (FGSM, Square, transfer from kd, transfer from tuned)"
    assert warned(cells) == {"none": "", "nasty": words}
    assert warned(over_seeds("none", "kd", [0.9] * 3, more=ROBUST | masked)) == {
        "none": "masked gradients (FGSM, Square, transfer from kd)"
    }


def test_without_pgd_nothing_is_masked() -> None:
    bare = {name: value for name, value in ROBUST.items() if name != "victim_robust_pgd"} | {"victim_robust_fgsm": 0.0}
    assert warned(over_seeds("nasty", "kd", [0.8] * 3, more=bare)) == {"nasty": ""}


def test_a_service_that_answers_wrongly_by_itself_is_not_masked_by_it() -> None:
    """0.2 as served is less than PGD leaves, but no adversarial example has fooled it."""
    assert warned(calm({"transfer": 0.0}, victim_acc=0.2))["nasty"] == "utility loss above tolerance"
    assert (
        warned(calm({"transfer": 0.9}, victim_acc=0.2))["nasty"]
        == "utility loss above tolerance; masked gradients (transfer from kd)"
    )


def test_a_gain_whose_interval_lies_above_0_is_still_extracted() -> None:
    assert warned(calm(baseline=0.79)) == {"none": "", "nasty": "still extractable"}
    assert warned(calm(baseline=0.80))["nasty"] == "", "a gain of 0 is none"


def test_an_uncertain_gain_or_one_of_one_seed_is_no_extraction() -> None:
    uneven = [replace(c, metrics=c.metrics | {"student_acc": 0.79 - 0.1 * (c.seed == 1)}) for c in calm()[-3:]]
    assert warned(calm()[:-3] + uneven)["nasty"] == "", "gains of 0.01, 0.12 and 0.03: the interval holds 0"
    one = [cell for cell in calm(baseline=0.1) if cell.seed == 0]
    assert warned(one)["nasty"] == ""
    assert warned(calm()[:-3])["nasty"] == "", "without a baseline the gain is unknown"


def test_an_attacker_without_data_extracts_what_it_gains_over_guessing() -> None:
    cells = over_seeds("nasty", "inversion", [0.15, 0.16, 0.17], subset=NO_DATA)
    assert warned(cells) == {"nasty": "still extractable"}
    assert warned([replace(cell, classes=5) for cell in cells]) == {"nasty": ""}


def test_who_extracts_is_looked_for_among_all_attackers_and_named_where_the_warning_is_explained() -> None:
    """`kd` is the strongest attack on validation data, and gains nothing."""
    cells = calm(baseline=0.82)
    for attacker, acc in (("lucky", 0.84), ("luckier", 0.86), ("luckless", 0.70)):
        for against in ("none", "nasty"):
            cells += over_seeds(against, attacker, [acc + d for d in SEEDS], more=ROBUST | {"student_val_acc": 0.1})
    cells += over_seeds("stingy", "kd", [0.9 + d for d in SEEDS], more=ROBUST)
    assert warned(cells) == {"none": "", "nasty": "still extractable", "stingy": "still extractable"}
    [note] = [note for note in leaderboard(cells).notes if "still extractable" in note]
    assert note.endswith(": nasty by luckier, lucky; stingy by kd.")
    both = leaderboard([*cells, *(replace(cell, student="tiny") for cell in cells)])
    [note] = [note for note in both.notes if "still extractable" in note]
    assert "nasty by luckier, lucky (small); stingy by kd (small); nasty by luckier, lucky (tiny)" in note


def test_an_attacker_whose_extraction_is_not_scored_has_extracted_nothing() -> None:
    past = ended(over_seeds("nasty", "inversion", [0.99] * 3, more=ROBUST), Status.BYPASSED, "it has the weights")
    assert warned(calm() + past) == {"none": "", "nasty": ""}


def test_a_defense_that_no_attack_was_scored_against_raises_nothing() -> None:
    assert warned(ended(calm(), Status.FAILED, "training diverged")) == {"none": "", "nasty": ""}


def test_warnings_stand_in_one_order_with_a_note_for_each_and_for_no_other() -> None:
    everything = {"victim_consistency": 0.5, "victim_robust_fgsm": 0.1}
    cells = calm(everything, baseline=0.5, victim_acc=0.9)
    cells += over_seeds("nasty", "hard-label", [0.93] * 3, more=ROBUST | everything, victim_acc=0.9)
    assert (
        warned(cells)["nasty"]
        == "labels suffice; utility loss above tolerance; inconsistent answers; masked gradients (FGSM); still extractable"
    )
    assert explained(cells) == [name for name in MEANING if name not in OF_CELLS]
    assert explained(calm({"victim_robust_fgsm": 0.1}, victim_acc=0.9)) == [
        "utility loss above tolerance",
        "masked gradients",
    ]


def test_a_warning_of_several_defenses_and_students_is_explained_once() -> None:
    lossy = calm(victim_acc=0.9) + over_seeds("stingy", "kd", [0.8] * 3, victim_acc=0.9)
    lossy += [replace(cell, student="tiny") for cell in lossy]
    assert explained(lossy) == ["utility loss above tolerance"]
    [note] = [note for note in leaderboard(lossy).notes if note.startswith("Warning 'utility loss above tolerance'")]
    assert MEANING["utility loss above tolerance"] in note


def test_warnings_are_in_every_format() -> None:
    board = leaderboard(calm({"victim_robust_fgsm": 0.1}, victim_acc=0.9))
    words = "utility loss above tolerance; masked gradients (FGSM); no adaptive attack run"
    for format in ("md", "html"):
        assert words in render(board, format)
    assert {line["defense"]: line["warnings"] for line in csv.DictReader(StringIO(render(board, "csv")))}[
        "nasty"
    ] == words
    content = json.loads(render(board, "json"))
    assert {row["defense"]: row["warnings"] for row in content["tables"]["ranking"]}["nasty"] == words


def test_the_parameters_of_the_strongest_attack_are_its_fields() -> None:
    attacker = AttackRecord("kd", "kd", {"temperature": 4.0, "layers": [1, 2], "queries": "once"}, "made up")
    [row] = rows(leaderboard([replace(made_up("nasty", "kd", 0, 0.8), attack=attacker)]), "ranking")
    assert row["parameters"] == "temperature 4.0; layers [1, 2]; queries once"


def test_what_an_attack_chose_stands_in_the_place_of_what_it_chose_from() -> None:
    fields = {"temperatures": [4.0, 1.0, 20.0], "alphas": [0.9, 0.5], "held_out": 0.1}
    attacker = AttackRecord("kd-grid", "kd-grid", fields, "made up")
    cells = [
        replace(cell, attack=attacker, numbers={"steal.chosen_temperature": T, "steal.chosen_alpha": alpha})
        for cell, T, alpha in zip(
            over_seeds("nasty", "kd-grid", [0.8] * 3), (4.0, 20.0, 1.0), (0.9, 0.9, 0.5), strict=True
        )
    ]
    [row] = rows(leaderboard(cells), "ranking")
    assert row["parameters"] == (
        "temperature 4, 20, 1 (chosen by seed); alpha 0.9, 0.9, 0.5 (chosen by seed); held_out 0.1"
    )


def test_what_cells_there_are_is_said_after_what_their_numbers_say() -> None:
    cells = calm(victim_acc=0.9) + ended(over_seeds("nasty", "inversion", [0.9] * 3), Status.BYPASSED)
    cells += ended(over_seeds("nasty", "skipped", [0.9] * 2), Status.SKIPPED)
    cells += ended(over_seeds("nasty", "tuned", [0.9] * 3), Status.FAILED)
    [text] = [row["warnings"] for row in rows(leaderboard(cells), "ranking") if row["defense"] == "nasty"]
    assert text == ("utility loss above tolerance; no adaptive attack run; bypassed: inversion; skipped: 2; failed: 3")
    notes = [note for note in leaderboard(cells).notes if note.startswith("Warning '")]
    assert [note.split("'")[1] for note in notes] == [
        "utility loss above tolerance",
        "no adaptive attack run",
        "bypassed",
        "skipped",
        "failed",
    ]


def test_an_adaptive_attack_that_was_scored_leaves_no_warning() -> None:
    cells = calm() + over_seeds("nasty", "tuned", [0.8] * 3)
    found = {row["defense"]: row["warnings"] for row in rows(leaderboard(cells), "ranking")}
    assert found == {"none": "", "nasty": ""}
