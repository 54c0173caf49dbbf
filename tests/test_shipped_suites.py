"""The shipped suites: what their authors must not forget, as laws over all of them."""

from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import blobs, context
from kdbench import records as results
from kdbench import registry
from kdbench.api import Defense
from kdbench.attacks.denoise import guessed
from kdbench.suites import reader as suites
from kdbench.suites.suite import Choice, Suite

Json = dict[str, Any]
RESULTS = Path(__file__).parent.parent / "results"
SHIPPED = suites.shipped()
CROSS = [name for name in SHIPPED if name.startswith("cross-")]


def chosen(suite: Suite, method: str) -> list[Choice]:
    """The defenses and attacks of a suite that are of that method."""
    return [c for c in (*suite.defenses, *suite.attacks, *suite.baselines) if c.method == method]


# Queries


def queries(method: str, fields: Json, images: int, epochs: int) -> int:
    """How many queries an attack with so many images makes, as far as its fields say; 0 where it uses what is left."""
    images = fields.get("images", images)
    if fields.get("queries") == "once":
        return images
    if fields.get("queries") != "augmented":
        return 0
    points = prod(len(set(fields[name])) for name in ("temperatures", "alphas")) if method == "kd-grid" else 1
    candidates = points * (1 - fields["held_out"]) if points > 1 else 0
    lessons = ceil(images / fields["batch"]) - 1 if fields.get("competition") else 0
    return round((candidates + 1) * images * epochs) + lessons * fields.get("steps", 0) * fields.get("batch", 0)


def subset(suite: Suite, choice: Choice) -> int:
    """How many images an attacker of `suite` uses."""
    return round(training_images(suite.dataset) * suite.scenario.data * choice.instance.data_subset().fraction)


def training_images(dataset: Choice) -> int:
    """How many images the victim is trained on."""
    fields = dataset.fields
    size = dataset.instance.sizes[0] if hasattr(dataset.instance, "sizes") else 1797 - fields["test"]
    return int(fields.get("train") or size - fields["validation"])


def over_budget(suite: Suite) -> list[str]:
    """The attacks of `suite` that make more queries than the budget allows."""
    return [
        f"{choice.name} by {student}"
        for choice in (*suite.attacks, *suite.baselines)
        for student, recipe in suite.student_recipes.items()
        if suite.scenario.budget is not None
        and choice.instance.needs > 0
        and queries(choice.method, choice.fields, subset(suite, choice), recipe.epochs) > suite.scenario.budget
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_queries_of_attacks_fit_the_budget(name: str) -> None:
    assert over_budget(suites.load(name)) == []


@pytest.mark.parametrize("name", CROSS)
def test_a_grid_that_asks_about_every_augmented_batch_does_not_fit(name: str) -> None:
    [student] = suites.load(name).students
    assert over_budget(suites.load(name, {"attack.kd-grid.queries": "augmented"})) == [f"kd-grid by {student}"]


def test_queries_are_counted_as_the_oracle_counts_them() -> None:
    """Of an attack in the committed results of digits, whose fields, recipe and share of the data stand in the record."""
    cells = [cell for cell in results.read(RESULTS / "digits") if "queries" in cell.metrics and cell.defense]
    assert {cell.attack.method for cell in cells} >= {
        "kd",
        "partial-kd",
        "hard-label",
        "assistant-kd",
        "deep-inversion",
    }
    for cell in cells:
        epochs = cell.protocol.student_recipe["epochs"]
        counted = queries(cell.attack.method, cell.attack.fields, round(900 * cell.subset.fraction), epochs)
        assert cell.metrics["queries"] == counted, cell.name


# Precision


@pytest.mark.parametrize("name", SHIPPED)
def test_no_suite_leaves_its_precision_to_the_hardware(name: str) -> None:
    assert suites.load(name).precision != "auto"


@pytest.mark.parametrize("name", SHIPPED)
def test_attacks_that_need_small_differences_of_answers_run_in_fp32(name: str) -> None:
    suite = suites.load(name)
    assert suite.precision == "fp32" or not chosen(suite, "dfme")


# The cross matrices


@pytest.mark.parametrize("name", CROSS)
def test_attacks_of_a_cross_matrix_have_one_temperature(name: str) -> None:
    """Except HTC, which is about another temperature, and attacks without images, which have that of their papers."""
    attackers = [c for c in suites.load(name).attacks if c.instance.data_subset().fraction and c.method != "htc"]
    assert len({c.fields["temperature"] for c in attackers if "temperature" in c.fields}) == 1


@pytest.mark.parametrize("name", CROSS)
def test_an_assistant_of_a_cross_matrix_is_smaller_than_the_victim_and_larger_than_the_student(name: str) -> None:
    suite = suites.load(name)
    [choice] = chosen(suite, "assistant-kd")
    for student in suite.students:
        sizes = [parameters(network) for network in (suite.victim, *choice.instance.networks(), student)]
        assert len(sizes) > 2
        assert sizes == sorted(sizes, reverse=True)


def parameters(network: str) -> int:
    """The weights of a network for the images of CIFAR-10."""
    return sum(weight.numel() for weight in registry.load("model", network)((3, 32, 32), 10).parameters())


@pytest.mark.parametrize("name", CROSS)
def test_a_distilled_victim_of_a_cross_matrix_takes_the_steps_of_a_plain_one(name: str) -> None:
    suite = suites.load(name)
    [choice] = chosen(suite, "assistant-distillation")
    recipe, plain, temperature = choice.recipe, suite.victim_recipe, choice.fields["temperature"]
    assert recipe
    assert recipe.lr == pytest.approx(temperature * plain.lr)
    assert recipe.lr * recipe.weight_decay == pytest.approx(plain.lr * plain.weight_decay)
    assert recipe.clip, "the one epoch at T = 1 has the gradient of the plain victim, at T times its rate"


@pytest.mark.parametrize("name", CROSS)
def test_a_cross_matrix_looks_for_masked_gradients(name: str) -> None:
    assert suites.load(name).robustness.level in ("more", "full"), "PGD is compared with Square"


@pytest.mark.parametrize("name", CROSS)
def test_the_surrogate_data_of_a_cross_matrix_has_more_classes_than_the_victim(name: str) -> None:
    """Photographs of things, by their thousands: the default surrogate data are pieces of two."""
    suite = suites.load(name)
    [choice] = chosen(suite, "knockoff")
    assert registry.load("dataset", choice.fields["surrogate"]).classes > suite.dataset.instance.classes


@pytest.mark.parametrize("name", [*CROSS, "mnist"])
def test_the_attacker_who_denoises_knows_the_settings_of_the_defenses(name: str) -> None:
    suite = suites.load(name)
    [attack] = chosen(suite, "denoise")
    guesses = {text.partition(":")[0]: guessed(text) for text in attack.fields["guess"]}
    assert len(guesses) == len(attack.fields["guess"]) > 2
    for method, defense in guesses.items():
        assert [choice.instance for choice in chosen(suite, method)] == [defense]


def test_the_reverse_sigmoid_of_100_classes_keeps_their_labels() -> None:
    [choice] = chosen(suites.load("cross-cifar100"), "reverse-sigmoid")
    spread = torch.tensor([0.1, 0.3, 1, 3, 10]).repeat_interleave(200)[:, None]
    log_p = (spread * torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))).log_softmax(dim=1)
    labels = log_p.argmax(dim=1)
    assert torch.equal(perturbed(choice.instance, log_p).argmax(dim=1), labels)
    assert not torch.equal(perturbed(type(choice.instance)(), log_p).argmax(dim=1), labels), "as the toolbox's does"


def perturbed(defense: Defense, log_p: Tensor) -> Tensor:
    """What the defense answers instead of `log_p`, whatever the images."""
    data = blobs().train
    return defense.perturb(log_p, data.x, context(data))
