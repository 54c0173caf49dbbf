"""Automatic warnings: what a number on the board does not say by itself, as AutoAttack warns about evasion."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from kdbench.board.intervals import BySeed, Estimate, estimate, paired
from kdbench.board.study import LABELS_ONLY, REFERENCE, Pairing, Study, victim_by_seed
from kdbench.records import Cell, MethodRecord

LABELS, LOSSY, FICKLE, MASKED, STOLEN = "labels suffice", "too lossy", "fickle", "masked gradients", "still stolen"
ALIKE = 0.99  # share of repeated questions that must get the same answer; rounding may move one that stands on an edge
WHITE_BOX = "victim_adv_pgd"

MEANING: Mapping[str, str] = {
    LABELS: "the best response looks at top-1 answers only, or does worse than the thief who does, by an interval wholly "
    "below 0: whatever the defense does to the rest of an answer, it does not matter",
    LOSSY: "the accuracy as served lies below what the tolerance allows",
    FICKLE: "repeated questions get other answers, though the defense does not declare that it keeps state",
    MASKED: "an attack that needs no gradient of the victim, or a weaker one, beats PGD on it: its gradients are masked, "
    "and adversarial accuracy says little",
    STOLEN: "a thief, be it the best response or not, gains more than it could alone, by an interval wholly above 0",
}


def warnings(found: Study, defense: MethodRecord, best: Pairing | None) -> tuple[str, ...]:
    """What to warn of in `defense`; `best`: the best response to it."""
    raised = [name for name, holds in _FLAGS.items() if holds(found, defense, best)]
    return tuple(f"{name} ({', '.join(_masks(found, defense))})" if name == MASKED else name for name in raised)


def explained(students: Sequence[Study]) -> list[str]:
    """A note for each flag that is raised; of what is still stolen it names the thieves, for whom a board has no room."""
    raised = {flag for s in students for row in s.rows() for flag in warnings(s, row.defense, row.best)}
    attackers = {STOLEN: f": {'; '.join(text for student in students for text in _stolen(student, len(students) > 1))}"}
    return [
        f"Flag '{name}': {words}{attackers.get(name, '')}."
        for name, words in MEANING.items()
        if any(flag.startswith(name) for flag in raised)
    ]


def _labels_suffice(found: Study, defense: MethodRecord, best: Pairing | None) -> bool:
    if best is None or defense.method == REFERENCE:
        return False
    gain = found.gain_over_labels(best)
    return best.attack.method == LABELS_ONLY or (gain is not None and _surely_below(gain))


def _too_lossy(found: Study, defense: MethodRecord, best: Pairing | None) -> bool:
    loss = found.utility_loss(defense.name)
    return loss is not None and loss.mean > found.tolerance


def _fickle(found: Study, defense: MethodRecord, best: Pairing | None) -> bool:
    cells = _cells(found, defense.name)
    repeats = victim_by_seed(cells, "victim_consistency").values()
    return any(share < ALIKE for share in repeats) and not any(cell.stateful for cell in cells)


def _masked(found: Study, defense: MethodRecord, best: Pairing | None) -> bool:
    return bool(_masks(found, defense))


def _still_stolen(found: Study, defense: MethodRecord, best: Pairing | None) -> bool:
    return bool(_attackers(found, defense))


_FLAGS: Mapping[str, Callable[[Study, MethodRecord, Pairing | None], bool]] = {
    LABELS: _labels_suffice,
    LOSSY: _too_lossy,
    FICKLE: _fickle,
    MASKED: _masked,
    STOLEN: _still_stolen,
}


def _stolen(found: Study, several: bool) -> Iterator[str]:
    """Who steals from each defense, in words, where anybody does; with the student where there are `several`."""
    for defense in found.defenses:
        if attackers := _attackers(found, defense):
            yield f"{defense.name} by {', '.join(attackers)}{f' ({found.student})' if several else ''}"


def _attackers(found: Study, defense: MethodRecord) -> list[str]:
    """The attacks that surely gain something from `defense`, the greatest gain first; what nobody defends is no matter."""
    if defense.method == REFERENCE:
        return []
    gains = {pairing.attack.name: found.gain(pairing) for pairing in found.against(defense.name)}
    sure = {label: gain.mean for label, gain in gains.items() if gain and _surely_above(gain)}
    return sorted(sure, key=lambda label: -sure[label])


def _masks(found: Study, defense: MethodRecord) -> list[str]:
    """The attacks that ought to do worse than PGD with the weights known, and do better."""
    cells = _cells(found, defense.name)
    white_box = victim_by_seed(cells, WHITE_BOX)
    return [name for name, left in _weaker(found, defense, cells) if _beats(left, white_box)]


def _weaker(found: Study, defense: MethodRecord, cells: Sequence[Cell]) -> Iterator[tuple[str, BySeed]]:
    """Accuracy left by each attack that is weaker by nature: one step, no gradient, somebody else's gradient."""
    yield "FGSM", victim_by_seed(cells, "victim_adv_fgsm")
    yield "Square", victim_by_seed(cells, "victim_adv_square")
    # A service that answers wrongly by itself is not fooled by anybody: its network is as good as the reference's.
    normal, served = (victim_by_seed(own, "victim_acc") for own in (_cells(found, found.reference), cells))
    for pairing in found.against(defense.name):
        fooled = pairing.by_seed("transfer")
        right = {seed: max(served[seed], normal.get(seed, 0)) for seed in fooled if seed in served}
        yield f"transfer from {pairing.attack.name}", {seed: right[seed] * (1 - fooled[seed]) for seed in right}


def _beats(left: BySeed, white_box: BySeed) -> bool:
    lead = estimate(paired(white_box, left))
    return lead is not None and _surely_above(lead)


def _surely_above(value: Estimate) -> bool:
    """One seed proves nothing."""
    return value.half_width is not None and value.low > 0


def _surely_below(value: Estimate) -> bool:
    """One seed proves nothing."""
    return value.half_width is not None and value.high < 0


def _cells(found: Study, defense: str | None) -> list[Cell]:
    return [cell for pairing in found.against(defense or "") for cell in pairing.cells]
