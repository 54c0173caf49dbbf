"""The accuracy board: which defenses protect, at what cost."""

from collections.abc import Sequence

from kdbench.board.document import MAIN, Board, Column, Kind, Table, filled, interval_note
from kdbench.board.pairing import ServedVictim
from kdbench.board.studies import Studies
from kdbench.board.study import NO_QUERY, AttackRow, DefenseRow, RankStatus, Study
from kdbench.board.tables import columns
from kdbench.board.tables.cross import BEST, NOT_ABOVE, cross
from kdbench.board.tables.missing import missing
from kdbench.board.tables.parameters import attack_parameters
from kdbench.board.tables.reported import NOTE as REPORTED_NOTE
from kdbench.board.tables.reported import reported
from kdbench.board.warnings import explanations, warnings
from kdbench.metrics import METRICS
from kdbench.records import Status

ABOUT_ROBUSTNESS = ("robust", "cw", "sensitivity")  # parts of the names of the metrics that the other board shows


def accuracy_board(studies: Studies) -> Board:
    """Defenses ranked by their protection under the strongest attack; a section for each study."""
    tables = [table for study in studies.all for table in _tables(study, studies.title(study))]
    title = f"Leaderboard: {studies.facts.suite}"
    return Board(
        "leaderboard", title, studies.facts, [t for t in tables if t.rows or t.name in _ALWAYS], _notes(studies)
    )


_ALWAYS = (MAIN, "attacks")


def _tables(study: Study, section: str) -> list[Table]:
    baselines = [AttackRow(study, pairing) for pairing in study.baselines]
    return [
        Table(MAIN, "Ranking", section, _RANKING, filled(_RANKING, study.rows), _breaks(study)),
        cross(study, section),
        reported(study, section),
        Table("baselines", "No-query baselines", section, _BASELINES, filled(_BASELINES, baselines)),
        missing(study, section),
        _victims(study, section),
        Table("attacks", "Every attack", section, _ATTACKS, filled(_ATTACKS, study.attack_rows), folded=True),
    ]


def _breaks(study: Study) -> dict[int, str]:
    """What stands before the first defense without a rank, and before the first above the tolerance."""
    words = {
        RankStatus.UNRANKED: "not ranked: nothing to rank by",
        RankStatus.ABOVE_TOLERANCE: f"below the line: utility loss above {100 * study.tolerance:g} points",
    }
    first = {row.status: index for index, row in reversed(list(enumerate(study.rows)))}
    return {first[status]: text for status, text in words.items() if status in first}


def _strongest(row: DefenseRow) -> AttackRow | None:
    return AttackRow(row.study, row.strongest) if row.strongest else None


_RANKING: Sequence[Column[DefenseRow]] = (
    columns.student(lambda row: row.study.student),
    columns.scenario(lambda row: row.study.scenario),
    columns.rank(lambda row: row.rank, "protection"),
    columns.defense(lambda row: row.defense.name),
    columns.method(lambda row: row.defense.method),
    Column(
        "rank_status",
        "Rank status",
        Kind.TEXT,
        "ranked, unranked, or above the tolerance of utility loss",
        lambda row: row.status.value,
        visible=False,
    ),
    Column(
        "strongest_attack",
        "Strongest attack",
        Kind.TEXT,
        "the attack with the highest mean validation accuracy of the student",
        lambda row: row.strongest.attack.name if row.strongest else None,
        drop_order=1,
    ),
    Column(
        "parameters",
        "Its parameters",
        Kind.TEXT,
        "what the strongest attack was run with, or chose by seed",
        lambda row: attack_parameters(row.strongest) if row.strongest else None,
        drop_order=6,
    ),
    columns.student_acc(_strongest),
    columns.protection(lambda row: row.protection),
    columns.utility_loss(lambda row: row.utility_loss),
    *columns.gains(_strongest),
    Column("n", "n", Kind.WHOLE, "seeds behind the number that ranks", lambda row: row.seeds, drop_order=3),
    Column(
        "warnings",
        "Warnings",
        Kind.TEXT,
        "automatic warnings, explained in the notes",
        lambda row: "; ".join(warnings(row)),
    ),
)
_ATTACKS: Sequence[Column[AttackRow]] = (
    columns.student(lambda row: row.study.student),
    columns.scenario(lambda row: row.study.scenario),
    columns.defense(lambda row: row.pairing.defense.name if row.pairing.defense else NO_QUERY),
    columns.attack(lambda row: row.pairing.attack.name),
    columns.fraction(lambda row: row.pairing.subset.fraction),
    Column(
        "adaptive",
        "Adaptive",
        Kind.TEXT,
        "whether the attack is made to undo defenses",
        lambda row: row.pairing.attack.adaptive,
    ),
    Column(
        "chosen",
        "Strongest attack",
        Kind.TEXT,
        "whether the attacker would choose this attack",
        lambda row: row.is_strongest,
    ),
    columns.cells(lambda row: row),
    columns.student_acc(lambda row: row),
    columns.protection(lambda row: row.study.protection(row.pairing)),
    *columns.gains(lambda row: row),
    Column(
        "bypassed_acc",
        "Bypassed (%)",
        Kind.SHARE,
        "student accuracy where the defense was not in the path",
        lambda row: row.pairing.mean("student_acc", Status.BYPASSED),
    ),
    columns.of_student("student_val_acc", lambda row: row.pairing, drop_order=6),
    columns.of_student("student_parameters", lambda row: row.pairing, drop_order=6),
)
_BASELINES: Sequence[Column[AttackRow]] = (
    columns.student(lambda row: row.study.student),
    columns.scenario(lambda row: row.study.scenario),
    Column("baseline", "Baseline", Kind.TEXT, "how the student is trained", lambda row: row.pairing.attack.name),
    columns.fraction(lambda row: row.pairing.subset.fraction),
    Column("subset", "Subset", Kind.TEXT, "the seed that chose the share", lambda row: row.pairing.subset.seed),
    columns.student_acc(lambda row: row),
    columns.of_student("student_val_acc", lambda row: row.pairing),
    Column(
        "chosen",
        "Chosen",
        Kind.TEXT,
        "whether gains on this data subset are measured against it",
        lambda row: row.is_strongest,
    ),
    columns.cells(lambda row: row),
)


def _victim(row: DefenseRow) -> ServedVictim:
    return row.victim


def _victims(study: Study, section: str) -> Table:
    """Every metric of the victims that the robustness board does not show, as far as it was measured."""
    names = [n for n in METRICS if n.startswith("victim_") and not any(part in n for part in ABOUT_ROBUSTNESS)]
    shown: Sequence[Column[DefenseRow]] = (
        columns.student(lambda row: row.study.student),
        columns.scenario(lambda row: row.study.scenario),
        columns.defense(lambda row: row.defense.name),
        *(columns.of_victim(name, _victim) for name in columns.measured(study.cells, names)),
    )
    return Table("victims", "Victims as served", section, shown, filled(shown, study.rows), folded=True)


def _notes(studies: Studies) -> list[str]:
    found, about = studies.all, studies.facts
    tolerance = f"Only defenses whose mean utility loss is at most {100 * about.tolerance:g} points are ranked."
    notes = [interval_note(len(about.seeds)), f"{_RANK_NOTE} {tolerance}", _STRONGEST_NOTE, _GAIN_NOTE, _SIGNS_NOTE]
    if any(study.reference is None for study in found):
        notes.append(_NO_REFERENCE_NOTE)
    if not any(study.baselines for study in found):
        notes.append(_NO_BASELINE_NOTE)
    notes += explanations(found)
    if any(reported(study, "").rows for study in found):
        notes.append(REPORTED_NOTE)
    return notes


_RANK_NOTE = (
    "Rank: 1 + the number of defenses whose protection interval lies wholly above; overlapping intervals share a rank."
)
_STRONGEST_NOTE = (
    "Strongest attack: the one with the highest mean validation accuracy of the student, reported by its test accuracy. "
    "Protection is the student accuracy under the strongest attack on the undefended victim, among the attacks that are "
    "scored on both sides, minus that under the strongest attack here."
)
_GAIN_NOTE = (
    "Gain: over the best no-query baseline on the same data subset, chosen on validation data; without data, over "
    "guessing. An attack without gain got nothing from the victim."
)
_SIGNS_NOTE = f"{BEST} strongest attack; {NOT_ABOVE} not above the {NO_QUERY} on the data subset that the attack uses."
_NO_REFERENCE_NOTE = (
    "The undefended victim was not attacked: protection and utility loss are unknown, and no defense has a rank."
)
_NO_BASELINE_NOTE = f"No {NO_QUERY} was trained: gain is unknown, except for attacks without data."
