"""What an attacker sees, asks and owns: the oracle, the ladder of answers, and the part of the data."""

from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import blobs
from kdbench.api import UNKNOWN, Access, DataSubset, KdbenchError, Oracle, Refused, Scenario, Split, keep_top
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


def oracle(service: Counting, **threat: Any) -> Oracle:
    return Oracle(service, Scenario(**threat), service.model)


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


def test_a_resumed_theft_goes_on_counting_where_it_was(service: Counting) -> None:
    meter = QueryCounter(answered=8)
    asked = Oracle(service, Scenario(budget=10), service.model, meter)
    with pytest.raises(Refused, match="asked for 3 answers with 2 of 10 left"):
        asked(images(3))
    asked(images(2))
    assert meter.answered == 10


# What an answer reveals


def test_an_answer_in_chunks_equals_one_at_once(service: Counting) -> None:
    x = images(2 * ANSWER_CHUNK + 7)
    answers = oracle(service)(x)
    assert max(service.asked) <= ANSWER_CHUNK
    assert len(service.asked) == 3
    torch.testing.assert_close(answers, service.model(x).log_softmax(dim=1))
    torch.testing.assert_close(answers, torch.cat([oracle(service)(part) for part in x.split(100)]))


def test_the_label_is_all_that_the_label_grant_reveals(service: Counting) -> None:
    x = images(40)
    answers = oracle(service, access=Access.LABEL)(x)
    top = service(x).argmax(dim=1)
    assert torch.equal(answers.exp(), nn.functional.one_hot(top, CLASSES).float())


@pytest.mark.parametrize("k", [1, 2, 3, CLASSES, CLASSES + 5])
def test_the_top_k_grant_reveals_the_k_likeliest_classes_renormalised(service: Counting, k: int) -> None:
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
    threat = Scenario(access=access, topk=k)
    shown = truncate(torch.tensor(rows, dtype=torch.float64).log_softmax(dim=1), threat)
    torch.testing.assert_close(truncate(shown, threat), shown)


def test_classes_that_a_defense_withholds_stay_withheld() -> None:
    log_p = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    assert torch.equal(keep_top(log_p, 3).exp(), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))


def test_answers_carry_no_gradient(service: Counting) -> None:
    assert not oracle(service)(images(3).requires_grad_()).requires_grad


# What is not granted is refused


def test_where_nothing_is_granted_nothing_is_answered(service: Counting) -> None:
    asked = oracle(service, access=Access.NOTHING)
    with pytest.raises(Refused, match="grants nothing"):
        asked(images(1))
    assert service.asked == []
    assert asked.answered == 0


@pytest.mark.parametrize("access", [a for a in Access if a is not Access.WEIGHTS])
def test_weights_are_handed_out_under_the_weights_grant_only(service: Counting, access: Access) -> None:
    with pytest.raises(Refused, match=rf"^asked for the weights, but only {access.name.lower()} were granted$"):
        oracle(service, access=access).model()


def test_the_model_handed_out_is_a_frozen_copy_that_leads_nowhere(service: Counting) -> None:
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


def test_handing_out_the_model_costs_no_answers(service: Counting) -> None:
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


def test_what_crossed_the_border_unseen_is_refused_once_somebody_settles() -> None:
    """As on an accelerator, where nobody looks at each question."""
    border = InputCheck()
    border.settle()
    for crossed in (False, True, False):
        border.note(torch.tensor(crossed))
    with pytest.raises(Refused, match=r"images in \[0,1\]"):
        border.settle()
    border.settle()


def test_a_refusal_is_a_sentence_for_the_user() -> None:
    assert issubclass(Refused, KdbenchError)


# The oracle keeps its secrets


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


def test_writing_another_threat_model_into_the_oracle_grants_nothing(service: Counting) -> None:
    asked = oracle(service, access=Access.LABEL, budget=2)
    asked.threat = Scenario(access=Access.WEIGHTS)
    with pytest.raises(Refused):
        asked.model()
    with pytest.raises(Refused):
        asked(images(3))
    assert (asked(images(2)).exp() > 0).sum(dim=1).tolist() == [1, 1]


# Answers and threat models as values


def test_the_ladder_of_answers_is_ordered_from_least_to_most_revealed() -> None:
    assert Access.NOTHING < Access.LABEL < Access.TOPK < Access.PROBS < Access.WEIGHTS


@pytest.mark.parametrize("access", Access)
def test_answers_are_written_by_name_in_either_case(access: Access) -> None:
    for name in (access.name, access.name.lower()):
        assert Access(name) is access  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "value"), [("topk", 0), ("budget", 0), ("data", 1.5), ("data", -0.1)])
def test_an_impossible_threat_model_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(KdbenchError, match=rf"^ThreatModel\.{field} must be .*, not {value}\.$"):
        Scenario(**{field: value})  # type: ignore[arg-type]


# The part of the data that a thief owns


def split(sizes: list[int]) -> Split:
    """Images each of another grey, labels mixed; `sizes` images a class."""
    y = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    x = torch.linspace(0, 1, len(y))[:, None, None, None].expand(-1, 1, 2, 2)
    return Split(x, y, len(sizes))


SIZES = st.lists(st.integers(10, 40), min_size=1, max_size=5)


@given(sizes=SIZES, fraction=st.floats(0.1, 1.0), seed=st.integers(0, 5))
def test_a_share_of_the_data_is_that_share_of_every_class_in_the_original_order(
    sizes: list[int], fraction: float, seed: int
) -> None:
    data = split(sizes)
    part = DataSubset(fraction, seed).of(data)
    assert [int((part.y == label).sum()) for label in range(len(sizes))] == [round(fraction * size) for size in sizes]
    grey = part.x[:, 0, 0, 0]
    assert (grey.diff() > 0).all()
    index = torch.searchsorted(data.x[:, 0, 0, 0].contiguous(), grey.contiguous())
    assert torch.equal(data.y[index], part.y)
    assert torch.equal(data.x[index], part.x)


def test_the_same_seed_owns_the_same_images_and_another_seed_others() -> None:
    data = split([40, 40])
    assert torch.equal(DataSubset(0.5, 3).of(data).x, DataSubset(0.5, 3).of(data).x)
    assert not torch.equal(DataSubset(0.5, 3).of(data).x, DataSubset(0.5, 4).of(data).x)


def test_owning_all_is_the_data_itself_and_owning_nothing_is_no_image() -> None:
    data = split([10, 12])
    assert DataSubset(1.0).of(data) is data
    nothing = DataSubset(0.0).of(data)
    assert len(nothing) == 0
    assert nothing.shape == data.shape
    assert nothing.classes == data.classes
    assert nothing.labelled


def test_a_share_too_small_for_a_class_is_refused_by_its_label() -> None:
    with pytest.raises(KdbenchError, match=r"^a fraction of 0\.1 leaves no image of class 1 \(3 in all\)$"):
        DataSubset(0.1).of(split([30, 3]))


def test_a_class_without_images_is_nobodys_fault() -> None:
    data = split([10, 10])
    assert len(DataSubset(0.5).of(Split(data.x, data.y, classes=3))) == 10


@pytest.mark.parametrize("fraction", [-0.1, 1.1, torch.nan])
def test_a_share_is_between_nothing_and_all(fraction: float) -> None:
    with pytest.raises(KdbenchError, match=r"^DataSubset\.fraction must be "):
        DataSubset(fraction)


def test_owning_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    DataSubset(0.5, 3).of(split([40, 40]))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_without_labels_keep_all_but_their_labels() -> None:
    data = blobs().train
    bare = data.without_labels()
    assert data.labelled
    assert not bare.labelled
    assert (bare.y == UNKNOWN).all()
    assert bare.y.dtype == data.y.dtype
    assert torch.equal(bare.x, data.x)
    assert (data.y != UNKNOWN).all()


def test_bytes_become_grey_levels_between_0_and_1() -> None:
    data = Split(torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1), torch.zeros(3).long(), 1)
    x = data.to("cpu").x
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.flatten(), torch.tensor([0.0, 0.2, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32])
def test_floats_stay_as_they_are_in_single_precision(dtype: torch.dtype) -> None:
    x = Split(torch.tensor([0.25, 1.0], dtype=dtype).reshape(2, 1, 1, 1), torch.zeros(2).long(), 1).to("cpu").x
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == [0.25, 1.0]


def test_taking_images_takes_their_labels_along() -> None:
    data = blobs().train
    index = torch.tensor([5, 0, 5])
    part = data.take(index)
    assert torch.equal(part.x, data.x[index])
    assert torch.equal(part.y, data.y[index])
    assert (len(part), part.shape) == (3, (1, 8, 8))
