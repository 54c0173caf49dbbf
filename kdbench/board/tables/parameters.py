"""What an attack was run with, in words."""

import json
from collections import defaultdict
from typing import Any

from kdbench.board.pairing import Pairing

CHOSEN = "steal.chosen_"  # what an attack reports of its own choices


def attack_parameters(pairing: Pairing) -> str:
    """The fields of an attack; in the place of a list that it chose from, what it chose with each seed."""
    choices: dict[str, list[str]] = defaultdict(list)
    for cell in pairing.cells:
        for name, value in cell.numbers.items():
            if name.startswith(CHOSEN):
                choices[name.removeprefix(CHOSEN)].append(f"{value:g}")
    chosen = [f"{name} {', '.join(values)} (chosen by seed)" for name, values in choices.items()]
    lists = {f"{name}s" for name in choices}
    fields = {name: value for name, value in pairing.attack.fields.items() if name not in lists}
    return "; ".join([*chosen, *(f"{name} {_plain(value)}" for name, value in fields.items())])


def _plain(value: Any) -> str:  # a field of a method may be anything that JSON holds
    return value if isinstance(value, str) else json.dumps(value)
