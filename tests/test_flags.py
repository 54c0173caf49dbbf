"""Warnings on the board: each raised exactly where its numbers say so, and explained once."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from test_board import ended, over_seeds, played, rows

from kdbench.board.boards import accuracy_board, render
from kdbench.board.warnings import MEANING
from kdbench.records import Cell, MethodRecord, Status

ROBUST = {
    "victim_consistency": 1.0,
    "victim_adv_fgsm": 0.5,
    "victim_adv_square": 0.4,
    "victim_adv_pgd": 0.3,
    "transfer": 0.2,
}
SEEDS = (0.0, 0.01, 0.02)
LEFT = 0.96  # of the images, those that the made-up victims classify rightly


def calm(more: dict[str, float] | None = None, alone: float = 0.95, **changes: Any) -> list[Cell]:
    """`none` and `nasty` against `kd`, which gains nothing over a thief with accuracy `alone`; changes are to `nasty`."""
    cells = over_seeds("none", "kd", [0.90 + d for d in SEEDS], more=ROBUST)
    cells += over_seeds("nasty", "kd", [0.80 + d for d in SEEDS], more=ROBUST | (more or {}), **changes)
    return cells + over_seeds(None, "cross-entropy", [alone + d for d in SEEDS])


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


def flagged(cells: Iterable[Cell]) -> dict[str, str]:
    """The flags of each defense, as the ranking has them."""
    return {str(row["defense"]): str(row["flags"]) for row in rows(accuracy_board(cells), "ranking")}


def explained(cells: Iterable[Cell]) -> list[str]:
    """The flags that the notes explain."""
    notes = [note for note in accuracy_board(cells).notes if note.startswith("Flag '")]
    return [note.removeprefix("Flag '").partition("'")[0] for note in notes]


def test_where_nothing_is_suspicious_nothing_is_said() -> None:
    assert flagged(calm()) == {"none": "", "nasty": ""}
    assert explained(calm()) == []


def test_a_defense_whose_best_thief_looks_at_labels_only_is_flagged_but_not_the_reference() -> None:
    labels = [c for d in ("none", "nasty") for c in over_seeds(d, "hard-label", [0.93] * 3, more=ROBUST)]
    assert flagged(calm() + labels) == {"none": "", "nasty": "labels suffice"}


@pytest.mark.parametrize(
    ("labels", "flag"),
    [
        ([0.83, 0.84, 0.84], "labels suffice"),
        ([0.80, 0.81, 0.82], ""),
        ([0.79, 0.80, 0.81], ""),
        ([0.81, 0.80, 0.90], ""),  # better by 0.01, -0.01 and 0.08: the interval holds 0
        ([0.99], ""),  # one seed proves nothing
    ],
)
def test_a_best_thief_who_surely_does_worse_than_with_labels_only_is_flagged(labels: list[float], flag: str) -> None:
    """Chosen on validation data, `kd` with 0.80, 0.81, 0.82 is the best response, whatever labels alone would give."""
    worse = {"student_val_acc": 0.1}
    cells = [c for d in ("none", "nasty") for c in over_seeds(d, "hard-label", labels, more=ROBUST | worse)]
    assert flagged(calm(alone=0.995) + cells) == {"none": "", "nasty": flag}


def test_the_labels_flag_knows_the_method_and_not_the_label() -> None:
    for label, method, flag in (("cautious", "hard-label", "labels suffice"), ("hard-label", "kd", "")):
        attacker = MethodRecord(label, method, {}, "made up")
        cells = [replace(cell, attack=attacker) for cell in over_seeds("nasty", label, [0.93] * 3, more=ROBUST)]
        assert flagged(calm() + cells)["nasty"] == flag


def test_a_loss_above_the_tolerance_is_flagged_and_one_of_exactly_it_is_not() -> None:
    assert flagged(calm(victim_acc=0.939)) == {"none": "", "nasty": "too lossy"}
    assert flagged(calm(victim_acc=0.94)) == {"none": "", "nasty": ""}
    alone = [cell for cell in calm(victim_acc=0.5) if not cell.defense or cell.defense.name == "nasty"]
    assert flagged(alone) == {"nasty": ""}, "without the reference nothing is known to be lost"


def test_repeated_questions_with_other_answers_are_fickle_from_one_seed_on() -> None:
    assert flagged(by_seed("victim_consistency", [1.0, 0.989, 1.0]))["nasty"] == "fickle"
    assert flagged(by_seed("victim_consistency", [1.0, 0.99, 1.0]))["nasty"] == ""
    assert flagged(by_seed("victim_consistency", [0.5]))["nasty"] == "fickle"


def test_a_service_that_declares_its_state_is_not_fickle() -> None:
    assert flagged(calm({"victim_consistency": 0.1}))["nasty"] == "fickle"
    assert flagged(calm({"victim_consistency": 0.1}, stateful=True))["nasty"] == ""


@pytest.mark.parametrize(
    ("metric", "below", "name"),
    [
        ("victim_adv_fgsm", 0.25, "FGSM"),
        ("victim_adv_square", 0.25, "Square"),
        ("transfer", 1 - 0.25 / LEFT, "transfer from kd"),
    ],
)
def test_what_ought_to_be_weaker_than_pgd_and_is_not_is_named(metric: str, below: float, name: str) -> None:
    equal = 1 - 0.3 / LEFT if metric == "transfer" else 0.3
    assert flagged(by_seed(metric, [below] * 3)) == {"none": "", "nasty": f"masked gradients ({name})"}
    assert flagged(by_seed(metric, [equal] * 3))["nasty"] == ""
    assert flagged(by_seed(metric, [below]))["nasty"] == "", "one seed proves nothing"
    astray = [equal, equal, below]  # the interval of the difference holds 0
    assert flagged(by_seed(metric, astray))["nasty"] == ""


def test_all_masks_stand_in_one_flag_and_the_reference_may_wear_one() -> None:
    masked = {"victim_adv_fgsm": 0.2, "victim_adv_square": 0.1, "transfer": 0.9}
    cells = calm(masked) + over_seeds("nasty", "tuned", [0.7] * 3, more=ROBUST | masked)
    words = "masked gradients (FGSM, Square, transfer from kd, transfer from tuned)"
    assert flagged(cells) == {"none": "", "nasty": words}
    assert flagged(over_seeds("none", "kd", [0.9] * 3, more=ROBUST | masked)) == {
        "none": "masked gradients (FGSM, Square, transfer from kd)"
    }


def test_without_pgd_nothing_is_masked() -> None:
    bare = {name: value for name, value in ROBUST.items() if name != "victim_adv_pgd"} | {"victim_adv_fgsm": 0.0}
    assert flagged(over_seeds("nasty", "kd", [0.8] * 3, more=bare)) == {"nasty": ""}


def test_a_service_that_answers_wrongly_by_itself_is_not_masked_by_it() -> None:
    """0.2 as served is less than PGD leaves, but no adversarial example has fooled it."""
    assert flagged(calm({"transfer": 0.0}, victim_acc=0.2))["nasty"] == "too lossy"
    assert flagged(calm({"transfer": 0.9}, victim_acc=0.2))["nasty"] == "too lossy; masked gradients (transfer from kd)"


def test_a_gain_whose_interval_lies_above_0_is_still_stolen() -> None:
    assert flagged(calm(alone=0.79)) == {"none": "", "nasty": "still stolen"}
    assert flagged(calm(alone=0.80))["nasty"] == "", "a gain of 0 is none"


def test_an_uncertain_gain_or_one_of_one_seed_is_no_theft() -> None:
    uneven = [replace(c, metrics=c.metrics | {"student_acc": 0.79 - 0.1 * (c.seed == 1)}) for c in calm()[-3:]]
    assert flagged(calm()[:-3] + uneven)["nasty"] == "", "gains of 0.01, 0.12 and 0.03: the interval holds 0"
    one = [cell for cell in calm(alone=0.1) if cell.seed == 0]
    assert flagged(one)["nasty"] == ""
    assert flagged(calm()[:-3])["nasty"] == "", "without a baseline the gain is unknown"


def test_a_thief_without_data_steals_what_it_gains_over_guessing() -> None:
    cells = over_seeds("nasty", "inversion", [0.15, 0.16, 0.17], subset={"fraction": 0.0, "seed": 0})
    assert flagged(cells) == {"nasty": "still stolen"}
    assert flagged([replace(cell, classes=5) for cell in cells]) == {"nasty": ""}


def test_who_steals_is_looked_for_among_all_thieves_and_named_where_the_flag_is_explained() -> None:
    """`kd` is the best response on validation data, and gains nothing."""
    cells = calm(alone=0.82)
    for attacker, acc in (("lucky", 0.84), ("luckier", 0.86), ("luckless", 0.70)):
        for defense in ("none", "nasty"):
            cells += over_seeds(defense, attacker, [acc + d for d in SEEDS], more=ROBUST | {"student_val_acc": 0.1})
    cells += over_seeds("stingy", "kd", [0.9 + d for d in SEEDS], more=ROBUST)
    assert flagged(cells) == {"none": "", "nasty": "still stolen", "stingy": "still stolen"}
    [note] = [note for note in accuracy_board(cells).notes if "still stolen" in note]
    assert note.endswith(": nasty by luckier, lucky; stingy by kd.")
    both = accuracy_board([*cells, *(replace(cell, student="tiny") for cell in cells)])
    [note] = [note for note in both.notes if "still stolen" in note]
    assert "nasty by luckier, lucky (small); stingy by kd (small); nasty by luckier, lucky (tiny)" in note


def test_a_thief_whose_theft_is_not_scored_has_stolen_nothing() -> None:
    past = ended(over_seeds("nasty", "inversion", [0.99] * 3, more=ROBUST), Status.BYPASSED, "it has the weights")
    assert flagged(calm() + past) == {"none": "", "nasty": ""}


def test_a_defense_that_no_attack_was_scored_against_raises_nothing() -> None:
    assert flagged(ended(calm(), Status.FAILED, "training diverged")) == {"none": "", "nasty": ""}


def test_flags_stand_in_one_order_with_a_note_for_each_and_for_no_other() -> None:
    everything = {"victim_consistency": 0.5, "victim_adv_fgsm": 0.1}
    cells = calm(everything, alone=0.5, victim_acc=0.9)
    cells += over_seeds("nasty", "hard-label", [0.93] * 3, more=ROBUST | everything, victim_acc=0.9)
    assert flagged(cells)["nasty"] == "labels suffice; too lossy; fickle; masked gradients (FGSM); still stolen"
    assert explained(cells) == list(MEANING)
    assert explained(calm({"victim_adv_fgsm": 0.1}, victim_acc=0.9)) == ["too lossy", "masked gradients"]


def test_a_flag_of_several_defenses_and_students_is_explained_once() -> None:
    lossy = calm(victim_acc=0.9) + over_seeds("stingy", "kd", [0.8] * 3, victim_acc=0.9)
    lossy += [replace(cell, student="tiny") for cell in lossy]
    assert explained(lossy) == ["too lossy"]
    [note] = [note for note in accuracy_board(lossy).notes if note.startswith("Flag 'too lossy'")]
    assert MEANING["too lossy"] in note


def test_flags_are_in_every_format() -> None:
    board = accuracy_board(calm({"victim_adv_fgsm": 0.1}, victim_acc=0.9))
    words = "too lossy; masked gradients (FGSM)"
    for format in ("md", "html"):
        assert words in render(board, format)
    assert {line["defense"]: line["flags"] for line in csv.DictReader(StringIO(render(board, "csv")))}["nasty"] == words
    content = json.loads(render(board, "json"))
    assert {row["defense"]: row["flags"] for row in content["tables"]["ranking"]}["nasty"] == words


def test_the_winners_parameters_are_its_fields() -> None:
    attacker = MethodRecord("kd", "kd", {"temperature": 4.0, "layers": [1, 2], "queries": "once"}, "made up")
    [row] = rows(accuracy_board([replace(played("nasty", "kd", 0, 0.8), attack=attacker)]), "ranking")
    assert row["parameters"] == "temperature 4.0; layers [1, 2]; queries once"


def test_what_an_attack_chose_stands_in_the_place_of_what_it_chose_from() -> None:
    fields = {"temperatures": [4.0, 1.0, 20.0], "alphas": [0.9, 0.5], "held_out": 0.1}
    attacker = MethodRecord("kd-grid", "kd-grid", fields, "made up")
    cells = [
        replace(
            cell, attack=attacker, metrics=cell.metrics | {"steal.chosen_temperature": T, "steal.chosen_alpha": alpha}
        )
        for cell, T, alpha in zip(over_seeds("nasty", "kd-grid", [0.8] * 3), (4, 20, 1), (0.9, 0.9, 0.5), strict=True)
    ]
    [row] = rows(accuracy_board(cells), "ranking")
    assert row["parameters"] == (
        "temperature 4, 20, 1 (chosen by seed); alpha 0.9, 0.9, 0.5 (chosen by seed); held_out 0.1"
    )
