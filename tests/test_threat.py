"""The oracle counts, truncates and refuses; access levels are ordered; a scenario is a checked value."""

from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdbench.api import Access, KdbenchError, Oracle, Refused, Scenario, keep_top
from kdbench.game.threat import ANSWER_CHUNK, InputCheck, QueryCounter, truncate

CLASSES = 7


class Counting:
    """A service that remembers how many images it was handed at once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.asked: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.asked.append(len(x))
        log_p: Tensor = self.model(x).log_softmax(dim=1)
        return log_p


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))


@pytest.fixture
def service(model: nn.Module) -> Counting:
    return Counting(model)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def oracle(service: Counting, **scenario: Any) -> Oracle:
    return Oracle(service, Scenario(**scenario), service.model)


# The budget


def test_every_image_is_counted(service: Counting) -> None:
    asked = oracle(service, budget=10)
    assert (asked.answered, asked.left) == (0, 10)
    for count in (3, 0, 1, 2):
        asked(images(count))
    assert (asked.answered, asked.left) == (6, 4)
    assert sum(service.asked) == 6


def test_without_a_budget_everything_is_answered_and_counted(service: Counting) -> None:
    asked = oracle(service, budget=None)
    asked(images(5000))
    assert (asked.answered, asked.left) == (5000, None)


def test_a_question_past_the_budget_is_refused_before_anything_is_answered(service: Counting) -> None:
    asked = oracle(service, budget=50_000)
    asked(images(48_500))
    service.asked.clear()
    with pytest.raises(Refused, match=r"^asked for 2000 answers with 1500 of 50000 left$"):
        asked(images(2000))
    assert service.asked == []
    assert (asked.answered, asked.left) == (48_500, 1500)
    asked(images(1500))
    assert asked.left == 0


@given(budget=st.integers(1, 40), questions=st.lists(st.integers(0, 15), max_size=8))
def test_no_sequence_of_questions_gets_past_the_budget(budget: int, questions: list[int]) -> None:
    service = Counting(nn.Flatten())
    asked, answered = oracle(service, budget=budget), 0
    for count in questions:
        if answered + count <= budget:
            asked(images(count))
            answered += count
        else:
            with pytest.raises(Refused):
                asked(images(count))
    assert asked.answered == answered == sum(service.asked) <= budget


def test_a_resumed_attack_run_goes_on_counting_where_it_was(service: Counting) -> None:
    counter = QueryCounter(answered=8)
    asked = Oracle(service, Scenario(budget=10), service.model, counter)
    with pytest.raises(Refused, match="asked for 3 answers with 2 of 10 left"):
        asked(images(3))
    asked(images(2))
    assert counter.answered == 10


# What an answer reveals


def test_an_answer_in_chunks_equals_one_at_once(service: Counting) -> None:
    x = images(2 * ANSWER_CHUNK + 7)
    answers = oracle(service)(x)
    assert max(service.asked) <= ANSWER_CHUNK
    assert len(service.asked) == 3
    torch.testing.assert_close(answers, service.model(x).log_softmax(dim=1))
    torch.testing.assert_close(answers, torch.cat([oracle(service)(part) for part in x.split(100)]))


def test_the_access_level_label_reveals_the_label_alone(service: Counting) -> None:
    x = images(40)
    answers = oracle(service, access=Access.LABEL)(x)
    top = service(x).argmax(dim=1)
    assert torch.equal(answers.exp(), nn.functional.one_hot(top, CLASSES).float())


@pytest.mark.parametrize("k", [1, 2, 3, CLASSES, CLASSES + 5])
def test_the_access_level_topk_reveals_the_k_likeliest_classes_renormalised(service: Counting, k: int) -> None:
    x = images(40)
    p = service(x).exp()
    shown = oracle(service, access=Access.TOPK, topk=k)(x).exp()
    kept = min(k, CLASSES)
    assert ((shown > 0).sum(dim=1) == kept).all()
    top = p.topk(kept, dim=1)
    torch.testing.assert_close(shown.gather(1, top.indices), top.values / top.values.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("access", [Access.PROBS, Access.WEIGHTS])
def test_all_probabilities_are_answered_as_they_are(service: Counting, access: Access) -> None:
    x = images(40)
    assert torch.equal(oracle(service, access=access)(x), service(x))


# Rows of few different values: full of ties.
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=6)


@given(rows=ROWS, n=st.integers(1, 7))
def test_ties_never_enlarge_what_is_revealed(rows: list[list[int]], n: int) -> None:
    log_p = torch.tensor(rows, dtype=torch.float64).log_softmax(dim=1)
    shown = keep_top(log_p, n)
    assert (shown.isfinite().sum(dim=1) == min(n, 5)).all()
    torch.testing.assert_close(shown.exp().sum(dim=1), torch.ones(len(rows), dtype=torch.float64))
    least_shown = log_p.where(shown.isfinite(), torch.inf).amin(dim=1)
    most_hidden = log_p.where(~shown.isfinite(), -torch.inf).amax(dim=1)
    assert (least_shown >= most_hidden).all()


@given(rows=ROWS, access=st.sampled_from([Access.LABEL, Access.TOPK, Access.PROBS]), k=st.integers(1, 6))
def test_what_was_cut_down_once_is_not_cut_down_further(rows: list[list[int]], access: Access, k: int) -> None:
    scenario = Scenario(access=access, topk=k)
    shown = truncate(torch.tensor(rows, dtype=torch.float64).log_softmax(dim=1), scenario)
    torch.testing.assert_close(truncate(shown, scenario), shown)


def test_classes_that_a_defense_withholds_stay_withheld() -> None:
    log_p = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    assert torch.equal(keep_top(log_p, 3).exp(), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))


def test_answers_carry_no_gradient(service: Counting) -> None:
    assert not oracle(service)(images(3).requires_grad_()).requires_grad


def test_where_nothing_is_granted_nothing_is_answered(service: Counting) -> None:
    asked = oracle(service, access=Access.NOTHING)
    with pytest.raises(Refused, match="grants nothing"):
        asked(images(1))
    assert service.asked == []
    assert asked.answered == 0


@pytest.mark.parametrize("access", [a for a in Access if a is not Access.WEIGHTS])
def test_weights_are_given_at_the_access_level_weights_only(service: Counting, access: Access) -> None:
    with pytest.raises(Refused, match=rf"^asked for the weights, but only {access.name.lower()} were granted$"):
        oracle(service, access=access).model()


def test_the_model_given_is_a_frozen_copy_that_shares_nothing(service: Counting) -> None:
    before = {name: value.clone() for name, value in service.model.state_dict().items()}
    copy = oracle(service, access=Access.WEIGHTS).model()
    assert not copy.training
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    torch.testing.assert_close(copy(images(3)), service.model(images(3)))
    for parameter in copy.parameters():
        parameter.data.fill_(9.0)
    after = service.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in service.model.parameters())


def test_giving_the_model_costs_no_answers(service: Counting) -> None:
    asked = oracle(service, access=Access.WEIGHTS, budget=1)
    asked.model()
    assert asked.answered == 0


@pytest.mark.parametrize("value", [-0.01, 1.01, torch.nan, torch.inf])
def test_what_is_no_image_is_refused_and_not_counted(service: Counting, value: float) -> None:
    asked, x = oracle(service), images(4)
    x[2, 0, 1, 1] = value
    with pytest.raises(Refused, match=r"images in \[0,1\]"):
        asked(x)
    assert service.asked == []
    assert asked.answered == 0


@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 4, 4), torch.zeros(16), torch.zeros(1, 2, 1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)],
    ids=["rank 3", "rank 1", "rank 5", "bytes"],
)
def test_what_has_not_the_shape_of_images_is_refused(service: Counting, x: Tensor) -> None:
    with pytest.raises(Refused, match=r"float images \(N,C,H,W\)"):
        oracle(service)(x)
    assert service.asked == []


def test_pixels_recorded_as_outside_are_refused_once_when_the_check_is_read() -> None:
    """As on an accelerator, where the check of a batch is not read at once."""
    inputs = InputCheck()
    inputs.raise_if_outside()
    for outside in (False, True, False):
        inputs.record(torch.tensor(outside))
    with pytest.raises(Refused, match=r"images in \[0,1\]"):
        inputs.raise_if_outside()
    inputs.raise_if_outside()


def test_a_refusal_is_a_sentence_for_the_user() -> None:
    assert issubclass(Refused, KdbenchError)


# What an attack can reach from an oracle


def reachable(start: object) -> Iterator[object]:
    """All that an attack finds by walking attributes, items and bound objects; not what functions close over."""
    todo, seen = [start], set[int]()
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        yield thing
        todo += getattr(thing, "__dict__", {}).values()
        if isinstance(thing, dict):
            todo += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set | frozenset):
            todo += thing
        elif isinstance(thing, MethodType):
            todo += [thing.__self__, thing.__func__]
        elif isinstance(thing, FunctionType):
            todo += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]


def test_no_attribute_of_an_oracle_leads_to_the_service_or_the_model(service: Counting) -> None:
    found = list(reachable(oracle(service, access=Access.WEIGHTS)))
    assert len(found) > 3
    assert not any(isinstance(thing, nn.Module | Tensor | Counting | QueryCounter) for thing in found)


def test_an_oracle_that_stored_its_service_would_be_found_out(service: Counting) -> None:
    asked = oracle(service)
    asked.service = service  # type: ignore[attr-defined]
    assert service.model in list(reachable(asked))


def test_assigning_another_scenario_to_the_oracle_grants_nothing(service: Counting) -> None:
    asked = oracle(service, access=Access.LABEL, budget=2)
    asked.scenario = Scenario(access=Access.WEIGHTS)
    with pytest.raises(Refused):
        asked.model()
    with pytest.raises(Refused):
        asked(images(3))
    assert (asked(images(2)).exp() > 0).sum(dim=1).tolist() == [1, 1]


def test_access_levels_are_ordered_from_least_to_most_revealed() -> None:
    assert Access.NOTHING < Access.LABEL < Access.TOPK < Access.PROBS < Access.WEIGHTS


@pytest.mark.parametrize("access", Access)
def test_access_levels_are_written_by_name_in_either_case(access: Access) -> None:
    for name in (access.name, access.name.lower()):
        assert Access(name) is access  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "value"), [("topk", 0), ("budget", 0), ("data", 1.5), ("data", -0.1)])
def test_an_impossible_scenario_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(KdbenchError, match=rf"^Scenario\.{field} must be .*, not {value}\.$"):
        Scenario(**{field: value})  # type: ignore[arg-type]
