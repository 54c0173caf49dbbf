"""Automatic warnings: what a number on the board does not say by itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kdbench.board.intervals import BySeed, estimate, paired
from kdbench.board.study import DefenseRow, RankStatus, Study
from kdbench.metrics import ADVERSARIAL_ATTACKS, METRICS
from kdbench.records import Status

CONSISTENT = 0.99  # share of repeated queries that must get the same answer; rounding may move one that lies on an edge
WHITE_BOX = METRICS["victim_robust_pgd"].name
WEAKER = (
    "fgsm",
    "square",
)  # one step, and no gradient: they leave more images right than PGD, unless gradients are masked


@dataclass(frozen=True)
class WarningKind:
    """A warning. raised: its text for a row where it holds. explained: its meaning, as a note of the board says it."""

    name: str
    raised: Callable[[DefenseRow], str]
    explained: str


def warnings(row: DefenseRow) -> list[str]:
    """What to warn of in a defense, in the order of `WARNINGS`."""
    return [text for warning in WARNINGS if (text := warning.raised(row))]


def explanations(studies: Sequence[Study]) -> list[str]:
    """A note for each warning that is raised; it names the attacks that still extract, for whom a board has no room."""
    rows = [row for study in studies for row in sorted(study.rows, key=lambda row: row.defense.name)]
    attackers = "; ".join(text for row in rows if (text := _extracted(row, len(studies) > 1)))
    details = {EXTRACTABLE: f": {attackers}"}
    return [
        f"Warning '{warning.name}': {warning.explained}{details.get(warning.name, '')}."
        for warning in WARNINGS
        if any(warning.raised(row) for row in rows)
    ]


def _labels_suffice(row: DefenseRow) -> str:
    if row.strongest is None or row.defense.is_reference:
        return ""
    gain = row.study.gain_over_labels(row.strongest)
    return LABELS if row.strongest.attack.labels_only or (gain is not None and gain.surely_below_0) else ""


def _above_tolerance(row: DefenseRow) -> str:
    return LOSS if row.status is RankStatus.ABOVE_TOLERANCE else ""


def _inconsistent(row: DefenseRow) -> str:
    shares = row.victim.by_seed("victim_consistency").values()
    return INCONSISTENT if any(share < CONSISTENT for share in shares) and not row.defense.stateful else ""


def _masked(row: DefenseRow) -> str:
    """Names the attacks that should leave more images right than PGD with the weights known, and leave fewer."""
    white_box = row.victim.by_seed(WHITE_BOX)
    leads = {name: estimate(paired(white_box, left)) for name, left in _weaker(row)}
    stronger = [name for name, lead in leads.items() if lead and lead.surely_above_0]
    return f"{MASKED} ({', '.join(stronger)})" if stronger else ""


def _weaker(row: DefenseRow) -> Iterator[tuple[str, BySeed]]:
    """Accuracy left by each attack that is weaker by nature: one step, no gradient, another network's gradient."""
    for name in WEAKER:
        yield ADVERSARIAL_ATTACKS[name], row.victim.by_seed(f"victim_robust_{name}")
    # A service that answers wrongly by itself was not fooled by anybody: its network is as good as the undefended one.
    undefended = row.study.victims.get(row.study.reference or "")
    normal: BySeed = undefended.by_seed("victim_acc") if undefended else {}
    served = row.victim.by_seed("victim_acc")
    for pairing in row.study.against(row.defense.name):
        fooled = pairing.by_seed("transfer")
        right = {seed: max(served[seed], normal.get(seed, 0)) for seed in fooled if seed in served}
        yield f"transfer from {pairing.attack.name}", {seed: right[seed] * (1 - fooled[seed]) for seed in right}


def _still_extractable(row: DefenseRow) -> str:
    return EXTRACTABLE if _attackers(row) else ""


def _extracted(row: DefenseRow, several: bool) -> str:
    """Who extracts from a defense, in words; with the student where there are several studies."""
    if not (attackers := _attackers(row)):
        return ""
    return f"{row.defense.name} by {', '.join(attackers)}{f' ({row.study.student})' if several else ''}"


def _attackers(row: DefenseRow) -> list[str]:
    """The attacks that surely gain something, the greatest gain first; of the undefended victim nobody needs to be told."""
    if row.defense.is_reference:
        return []
    gains = {pairing.attack.name: row.study.gain(pairing) for pairing in row.study.against(row.defense.name)}
    sure = {name: gain.mean for name, gain in gains.items() if gain and gain.surely_above_0}
    return sorted(sure, key=lambda name: -sure[name])


def _no_adaptive_attack(row: DefenseRow) -> str:
    adaptive = [pairing for pairing in row.study.against(row.defense.name) if pairing.attack.adaptive]
    examined = row.defense.is_reference or any(pairing.count(Status.DONE) for pairing in adaptive)
    return "" if examined else NOT_ADAPTIVE


def _bypassed(row: DefenseRow) -> str:
    names = [p.attack.name for p in row.study.against(row.defense.name) if p.count(Status.BYPASSED)]
    return f"{Status.BYPASSED}: {', '.join(names)}" if names else ""


def _skipped(row: DefenseRow) -> str:
    return _count(row, Status.SKIPPED)


def _failed(row: DefenseRow) -> str:
    return _count(row, Status.FAILED)


def _count(row: DefenseRow, status: Status) -> str:
    count = row.count(status)
    return f"{status}: {count}" if count else ""


LABELS, LOSS, INCONSISTENT = "labels suffice", "utility loss above tolerance", "inconsistent answers"
MASKED, EXTRACTABLE, NOT_ADAPTIVE = "masked gradients", "still extractable", "no adaptive attack run"

WARNINGS = (
    WarningKind(
        LABELS,
        _labels_suffice,
        "the strongest attack learns from labels alone, or is weaker than the one that does, by an interval wholly below 0: "
        "what the defense does to the rest of an answer does not matter",
    ),
    WarningKind(
        LOSS,
        _above_tolerance,
        "the accuracy of the served answers is lower than the undefended victim's by more than the tolerance",
    ),
    WarningKind(
        INCONSISTENT,
        _inconsistent,
        "repeated queries get different answers, though the defense does not declare that it keeps state",
    ),
    WarningKind(
        MASKED,
        _masked,
        "an attack that is weaker than PGD, or needs no gradient of the victim, fools it more often than PGD does: "
        "its gradients are masked, and its adversarial accuracy says little",
    ),
    WarningKind(
        EXTRACTABLE,
        _still_extractable,
        "at least one attack ends above the no-query baseline, by an interval wholly above 0",
    ),
    WarningKind(
        NOT_ADAPTIVE,
        _no_adaptive_attack,
        "no attack that is made to undo defenses was scored against this one, so that its protection may be an illusion",
    ),
    WarningKind(
        Status.BYPASSED.value,
        _bypassed,
        "the defense was not in the path of these attacks. Their accuracy is listed, but not scored as if the defense had "
        "been tried: against such an attacker the defense does nothing",
    ),
    WarningKind(
        Status.SKIPPED.value, _skipped, "cells that could not be run; the table of cells without a score says why"
    ),
    WarningKind(Status.FAILED.value, _failed, "cells that broke; the table of cells without a score says why"),
)
"""All warnings, in the order in which a board shows them."""

MEANING: Mapping[str, str] = {warning.name: warning.explained for warning in WARNINGS}
