"""Keys of planned stages: they say all that a result depends on, and nothing else."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from kdbench.engine.numerics import Numerics
from kdbench.engine.orders import Order, WorkerOptions
from kdbench.engine.plan import Plan
from kdbench.engine.specs import EvaluateSpec, StealSpec, read_spec, stage_key
from kdbench.errors import KdbenchError
from kdbench.game.fields import plain
from runs import (
    ATTACK_RUNS,
    ATTACK_RUNS_ON,
    EVALUATIONS_ON,
    STUDENT_EVALUATIONS,
    VICTIM_EVALUATIONS,
    VICTIMS,
    Json,
    cell,
)


def test_a_worker_reads_the_specification_that_was_planned(plan: Callable[..., Plan]) -> None:
    """Whatever parts the planner shares between stages: what a worker reads has the same fields and the same key."""
    changes = {"seeds": 2, "student.networks": ["mini-8", "mini-16"], "scenario.access": "weights"}
    changes |= {"defenses": ["none", "adaptive-misinformation"], "attacks": ["kd", "deep-inversion"]}
    options = WorkerOptions("data", profile=True)
    for key, stage in plan(changes).stages.items():
        order = Order(stage.title, stage.spec, options)
        read = Order.from_json(json.loads(json.dumps(order.to_json())))
        assert read == order
        assert stage_key(read.spec) == stage.key == key


def leaves(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where the plain values in nested JSON lie."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for name, child in children for leaf in leaves(child, (*path, name))]
    yield from found if isinstance(value, dict | list) else [path]


def test_a_key_is_made_of_every_field_of_a_specification(plan: Callable[..., Plan]) -> None:
    """Of those of all its parts: another value anywhere is another key, or cannot be read at all."""
    for stage in plan().stages.values():
        written = {"kind": stage.kind, "spec": plain(stage.spec)}
        for path in leaves(written["spec"]):
            changed = copy.deepcopy(written)
            inner: Any = changed["spec"]
            for name in path[:-1]:
                inner = inner[name]
            inner[path[-1]] = other(inner[path[-1]])
            with suppress(KdbenchError):
                assert stage_key(read_spec(changed)) != stage.key, path


def other(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value / 2 + 1 if isinstance(value, float) else value + 1
    return f"{value}0"


@pytest.mark.parametrize(
    ("change", "said"),
    [({"x": 1}, "x: Unexpected keyword"), ({"seed": "0"}, "seed: Input should be"), ({"run": None}, "run: ")],
)
def test_a_specification_of_another_version_is_refused(plan: Callable[..., Plan], change: Json, said: str) -> None:
    stage = next(stage for stage in plan().stages.values() if stage.kind == "train")
    with pytest.raises(KdbenchError, match=f"written by another version of kdbench \\({said}"):
        read_spec({"kind": "train", "spec": {**plain(stage.spec), **change}})
    with pytest.raises(KdbenchError, match="written by another version of kdbench"):
        read_spec({"kind": "score", "spec": plain(stage.spec)})


def test_keys_depend_on_topk_only_where_an_attack_gets_topk_answers(plan: Callable[..., Plan]) -> None:
    few, many = (plan({"scenario.access": "topk", "scenario.topk": count}) for count in (2, 5))
    assert cell(few, "none", "kd").scenario.topk == 2
    assert cell(few, "none", "kd").stages["steal"] != cell(many, "none", "kd").stages["steal"]
    assert cell(few, None, "cross-entropy").stages == cell(many, None, "cross-entropy").stages


def test_the_key_of_a_baseline_depends_on_neither_victim_nor_defenses(plan: Callable[..., Plan]) -> None:
    found = plan()
    stages = cell(found, None, "cross-entropy").stages
    assert set(stages) == {"steal", "evaluate"}
    steal, evaluate = (found.stages[stages[name]].spec for name in ("steal", "evaluate"))
    assert isinstance(steal, StealSpec)
    assert isinstance(evaluate, EvaluateSpec)
    assert steal.victim is evaluate.victim is None
    assert [key.split("/")[0] for key in found.stages[stages["steal"]].inputs] == ["data"]
    for changes in (
        {"defenses": ["none"]},
        {"victim.network": "mini-16"},
        {"victim.recipe.epochs": 9},
        {"defense.nasty.omega": 0.5},
        {"attacks": ["kd"]},
        {"scenario.access": "label"},
        {"scenario.budget": 7},
        {"attack.label-smoothing.smoothing": 0.3},
    ):
        assert cell(plan(changes), None, "cross-entropy").stages == stages, changes


BASE = {f"{a} on {part} of the data" for a in ("cross-entropy", "label-smoothing") for part in ("100%", "50%")}


BASE_EVALUATIONS = {f"evaluate {baseline}" for baseline in BASE}


NASTY = {"harden by nasty", "evaluate nasty"} | ATTACK_RUNS_ON["nasty"] | EVALUATIONS_ON["nasty"]


CHANGES: list[tuple[Json, set[str]]] = [
    ({}, set()),
    ({"title": "Another", "tolerance": 0.5}, set()),
    ({"defenses": ["stingy", "nasty", "none"], "attacks": ["partial-kd", "kd"]}, set()),
    ({"defense.nasty.omega": 0.1}, NASTY),
    ({"defense.nasty.tau": 5}, NASTY),
    ({"defense.stingy.ratio": 0.9}, {"evaluate stingy"} | ATTACK_RUNS_ON["stingy"] | EVALUATIONS_ON["stingy"]),
    (
        {"attack.kd.temperature": 9},
        {f"{s}kd {w} {d}" for s, w in (("", "from"), ("evaluate ", "on")) for d in ATTACK_RUNS_ON},
    ),
    ({"attack.label-smoothing.smoothing": 0.2}, {b for b in BASE | BASE_EVALUATIONS if "label-smoothing" in b}),
    ({"robustness.level": "fast"}, VICTIM_EVALUATIONS | STUDENT_EVALUATIONS | BASE_EVALUATIONS),
    ({"student.recipe.lr": 0.01}, ATTACK_RUNS | STUDENT_EVALUATIONS | BASE | BASE_EVALUATIONS),
    ({"student.network": "mini-16"}, ATTACK_RUNS | STUDENT_EVALUATIONS | BASE | BASE_EVALUATIONS),
    ({"victim.recipe.lr": 0.01}, VICTIMS),
    ({"victim.network": "mini-16"}, VICTIMS),
    ({"scenario.budget": 1000}, ATTACK_RUNS | STUDENT_EVALUATIONS),
    ({"scenario.access": "topk"}, ATTACK_RUNS | STUDENT_EVALUATIONS),
    ({"scenario.topk": 2}, set()),
    ({"scenario.data": 0.5}, ATTACK_RUNS | STUDENT_EVALUATIONS | BASE | BASE_EVALUATIONS),
    ({"scenario.labels": False}, ATTACK_RUNS | STUDENT_EVALUATIONS | BASE | BASE_EVALUATIONS),
    ({"dataset": {"name": "blobs", "noise": 0.3}}, {"read blobs"} | VICTIMS | BASE | BASE_EVALUATIONS),
]


@pytest.mark.parametrize(("changes", "anew"), CHANGES, ids=[str(changes) for changes, _ in CHANGES])
def test_a_change_makes_new_keys_for_its_own_stages_and_those_above(
    plan: Callable[..., Plan], changes: Json, anew: set[str]
) -> None:
    before, after = plan().stages, plan(changes).stages
    new = {stage.title.removesuffix(", seed 0") for key, stage in after.items() if key not in before}
    assert new == anew
    assert len(after) == len(before)
    assert sum(key not in before for key in after) == sum(
        stage.title.removesuffix(", seed 0") in anew for stage in before.values()
    )


def test_defaults_that_are_written_out_change_no_key(plan: Callable[..., Plan]) -> None:
    written = {
        "defense.nasty.tau": 4,
        "attack.kd.alpha": 0.9,
        "scenario.data": 1,
        "seeds": [0],
        "victim.recipe.momentum": 0.9,
    }
    assert plan(written).stages.keys() == plan().stages.keys()


def test_the_name_of_a_method_in_a_suite_is_no_part_of_a_key(plan: Callable[..., Plan]) -> None:
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
