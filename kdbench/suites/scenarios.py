"""Scenarios: what a suite file says of the attacker, and what of it one attack is given."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdbench.game.fields import build
from kdbench.game.methods import Attack
from kdbench.game.threat import Access, Scenario


def read_scenario(values: Mapping[str, Any]) -> Scenario:
    """The scenario of a table `[scenario]`. Raises `KdbenchError` for an unknown or ill-typed field."""
    return build(Scenario, values, "scenario")


def granted(scenario: Scenario, attack: Attack) -> Scenario:
    """What `attack` is given in `scenario`: the weights only if it needs them, everything below as the suite says.

    A field without effect gets its default, so that it changes no key: `topk` under any access but top-k.
    """
    if scenario.access is Access.WEIGHTS and attack.needs < Access.WEIGHTS:
        scenario = replace(scenario, access=Access.PROBS)
    return scenario if scenario.access is Access.TOPK else replace(scenario, topk=Scenario.topk)


def refusal(name: str, attack: Attack, scenario: Scenario) -> str:
    """Why the attack of that name cannot be run in a scenario as it is `granted`, in a sentence; "" where it can."""
    if attack.needs > scenario.access:
        return f"'{name}' needs {attack.needs.name.lower()}; the suite grants {scenario.access.name.lower()}"
    if attack.data_subset().fraction and not scenario.data:
        return f"'{name}' needs images of its own; the suite grants none"
    return ""
