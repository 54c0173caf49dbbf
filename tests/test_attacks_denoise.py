"""Denoise: it simulates registered defenses on networks of its own, and learns to undo them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import accuracy, blobs, context, remembering, taught
from kdbench.api import (
    Access,
    Attack,
    Defense,
    KdbenchError,
    Oracle,
    Refused,
    Scenario,
    Split,
    keep_top,
    kl,
    predict_logits,
)
from kdbench.attacks.denoise import Denoise, Examples, guessed, simulated
from kdbench.attacks.kd import KD
from kdbench.defenses.gaussian_noise import GaussianNoise
from kdbench.defenses.mad import MAD
from kdbench.defenses.reverse_sigmoid import ReverseSigmoid
from kdbench.defenses.rounding import Rounding
from kdbench.defenses.stingy import Stingy
from kdbench.defenses.top_k import TopK
from kdbench.game.methods import EngineHooks
from kdbench.training.fit import inference
from kdbench.training.fused import FusedTraining

EPOCHS, IMAGES = 2, 96


DENOISE = Denoise(examples=256, epochs=5)
GUESSES = ("rounding:decimals=1", "reverse-sigmoid", "gaussian-noise", "top-k:k=2")


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1, model="mini-16")


def oracle_on(model: nn.Module, budget: int | None = None, access: Access = Access.PROBS, topk: int = 5) -> Oracle:
    service = Defense().serve(model, context(blobs().train))
    return Oracle(service, Scenario(access=access, topk=topk, budget=budget), model)


def behind(defense: Defense, model: nn.Module) -> Oracle:
    return Oracle(defense.serve(model, context(blobs().train)), Scenario(), model)


def rows(*size: int, seed: int = 0, scale: float = 5.0) -> Tensor:
    """Log-probabilities (N,K)."""
    z = torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (scale * z).log_softmax(dim=1)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# Simulated defenses


@pytest.mark.parametrize(
    ("text", "defense"),
    [
        ("rounding", Rounding()),
        ("rounding:decimals=1", Rounding(decimals=1)),
        ("reverse-sigmoid:beta=0.5, gamma=0.2", ReverseSigmoid(beta=0.5, gamma=0.2)),
        ("mad:keep_argmax=false", MAD(keep_argmax=False)),
        ("stingy:hidden=minus-infinity", Stingy()),
    ],
)
def test_a_guess_is_a_registered_defense_with_its_fields(text: str, defense: Defense) -> None:
    assert guessed(text) == defense


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("roundin", "Did you mean 'rounding'"),
        ("rounding:decimal=1", "There is no field 'decimal'"),
        ("rounding:decimals=0", "decimals must be greater"),
        ("nasty", "denoise cannot simulate 'nasty'"),
        ("model-guard-s", "denoise cannot simulate 'model-guard-s'"),
        ("none", "denoise cannot simulate 'none'"),
    ],
)
def test_a_guess_that_cannot_be_simulated_is_refused_before_any_training(text: str, error: str) -> None:
    with pytest.raises(KdbenchError, match=error):
        Denoise(guess=("top-k", text))


def test_a_guess_of_nothing_is_refused() -> None:
    with pytest.raises(KdbenchError, match="at least one defense"):
        Denoise(guess=())


def test_it_names_the_defenses_whose_code_it_depends_on() -> None:
    attack = Denoise(guess=("rounding:decimals=1", "rounding:decimals=2", "mad"))
    assert attack.simulated_defenses() == ("rounding", "mad")
    assert DENOISE.simulated_defenses() == DENOISE.guess


@pytest.mark.parametrize("text", ["rounding:decimals=1", "reverse-sigmoid", "top-k:k=2", "model-guard-w"])
def test_simulated_answers_are_those_of_the_defense(text: str, data: Split) -> None:
    clean, image = rows(50, 3), torch.arange(50)
    wanted = guessed(text).perturb(clean, data.x[:50], context(data))
    torch.testing.assert_close(simulated(guessed(text), clean, image, context(data)), wanted)


def test_simulated_noise_is_drawn_anew_for_each_example(data: Split) -> None:
    clean = rows(1, 3, scale=0.1).expand(2000, -1)  # of one image
    error = (
        simulated(GaussianNoise(0.01), clean, torch.zeros(2000, dtype=torch.long), context(data)).exp() - clean.exp()
    )
    assert len(error.unique(dim=0)) > 1900


@pytest.mark.parametrize("text", ["mad", "adaptive-misinformation:threshold=0.9", "gradient-redirection:epochs=1"])
def test_a_simulated_defense_has_an_auxiliary_model_of_its_own(text: str, data: Split, victim: nn.Module) -> None:
    student = replace(DENOISE, guess=(text,)).steal(oracle_on(victim), context(data, EPOCHS))
    assert predict_logits(student, data.x).isfinite().all()


# Denoising


def test_examples_are_clean_and_perturbed_answers_with_their_classes_in_one_random_order(data: Split) -> None:
    shadow = taught(data, epochs=12)
    examples = replace(DENOISE, examples=500, guess=("top-k:k=1",))._examples([shadow], context(data))
    clean = predict_logits(shadow, data.x).log_softmax(dim=1)
    (perturbed,) = examples.perturbed
    assert examples.clean.shape == perturbed.shape == (500, 3)
    known = clean.exp().sort(dim=1).values
    drawn = examples.clean.exp().sort(dim=1).values
    assert torch.cdist(drawn, known).min(dim=1).values.max() < 1e-3
    assert torch.equal(perturbed.argmax(dim=1), examples.clean.argmax(dim=1))
    assert examples.clean.argmax(dim=1).bincount(minlength=3).min() > 100  # whatever the answers' own labels are


def test_what_the_access_level_withholds_is_withheld_in_the_simulation_too() -> None:
    log_p = rows(5, 6)
    examples = Examples(log_p, [log_p])
    assert torch.equal(examples.truncated(Scenario(access=Access.TOPK, topk=2)).perturbed[0], keep_top(log_p, 2))
    assert examples.truncated(Scenario(access=Access.PROBS, topk=2)) is examples


@pytest.mark.parametrize(
    "guess",
    [(GUESSES[0],), (GUESSES[1],), (GUESSES[2],), (GUESSES[3],), GUESSES],
    ids=str,
)
def test_a_denoiser_undoes_what_it_was_shown(guess: tuple[str, ...], data: Split) -> None:
    attack = Denoise(guess=guess, examples=1000, epochs=20)
    ctx = context(data, EPOCHS)

    def shown(clean: Tensor) -> Examples:
        image = torch.arange(len(clean)) % len(data)
        return Examples(clean, [simulated(guessed(text), clean, image, ctx) for text in guess])

    denoise = attack._denoiser(shown(rows(1000, 4).float()), ctx)
    numbers = ctx.log.numbers
    assert numbers["denoised_kl"] < 0.5 * numbers["perturbed_kl"]
    held_out = shown(rows(300, 4, seed=1).float())  # answers it has not seen
    for given in held_out.perturbed:
        answer, clean = denoise(given), held_out.clean.exp()
        torch.testing.assert_close(answer.exp().sum(dim=1), torch.ones(300))
        assert kl(clean, answer) < 0.5 * kl(clean, attack.clipped(given).log_softmax(dim=1))


@pytest.mark.parametrize(
    ("defense", "attack"),
    [
        (Rounding(decimals=1), Denoise(guess=("rounding:decimals=1",))),
        (GaussianNoise(sigma=0.3), Denoise(guess=("gaussian-noise:sigma=0.3",))),
        (ReverseSigmoid(), Denoise(guess=("reverse-sigmoid",))),
        (TopK(k=1), Denoise(guess=("top-k:k=1",))),
        (GaussianNoise(sigma=0.3), Denoise(guess=("rounding", "reverse-sigmoid", "gaussian-noise:sigma=0.3", "top-k"))),
    ],
    ids=str,
)
def test_it_learns_more_of_a_defended_victim_than_kd(
    defense: Defense, attack: Denoise, data: Split, victim: nn.Module
) -> None:
    def distance(attacker: Attack) -> float:
        student = attacker.steal(behind(defense, victim), context(data, epochs=15))
        return float(kl(truth.exp(), predict_logits(student, blobs().test.x).log_softmax(dim=1)))

    truth = predict_logits(victim, blobs().test.x).log_softmax(dim=1)
    assert distance(replace(attack, examples=2000)) < 0.6 * distance(KD())


def test_of_an_undefended_victim_it_learns_all_the_same(data: Split, victim: nn.Module) -> None:
    for subset in (data, data.without_labels()):
        student = replace(DENOISE, examples=2000).steal(oracle_on(victim), context(subset, epochs=20))
        assert accuracy(student, blobs().validation) > 0.9


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
def test_truncated_answers_and_unknown_labels_leave_it_a_student_that_answers(
    labelled: bool, topk: int, data: Split, victim: nn.Module
) -> None:
    subset = data if labelled else data.without_labels()
    student = DENOISE.steal(oracle_on(victim, access=Access.TOPK, topk=topk), context(subset, EPOCHS))
    assert predict_logits(student, data.x).isfinite().all()


@pytest.mark.parametrize(
    ("queries", "labelled", "asked"),
    [
        ("once", True, IMAGES),
        ("once", False, IMAGES),
        ("augmented", True, EPOCHS * IMAGES),
        ("augmented", False, (EPOCHS + 1) * IMAGES),  # once more, for the labels of the shadow
    ],
)
def test_the_shadow_and_the_denoiser_ask_nothing_but_unknown_labels(
    queries: Any, labelled: bool, asked: int, data: Split, victim: nn.Module
) -> None:
    subset, attack = data if labelled else data.without_labels(), replace(DENOISE, queries=queries)
    exact = oracle_on(victim, asked)
    attack.steal(exact, context(subset, EPOCHS))
    assert exact.left == 0
    with pytest.raises(Refused, match="left"):
        attack.steal(oracle_on(victim, asked - 1), context(subset, EPOCHS))


def test_shadows_are_named_and_each_learns_the_attackers_images(data: Split, victim: nn.Module) -> None:
    attack = replace(DENOISE, shadows=("mini-16", "", "mini-32"))
    ctx, made = remembering(context(data, epochs=15))
    attack.steal(oracle_on(victim), ctx)
    assert attack.networks() == ("mini-16", "mini-32")
    assert [net.classifier.in_features for net in made] == [16, 32, 16, 64]
    assert all(accuracy(net, data) > 0.9 for net in made)


def test_no_shadow_is_refused() -> None:
    with pytest.raises(KdbenchError, match="at least one network"):
        Denoise(shadows=())


def test_denoisers_in_fused_training_learn_what_they_learn_alone(data: Split, victim: nn.Module) -> None:
    def steal(fused: FusedTraining | None, number: int, out: dict[int, Tensor]) -> None:
        ctx = replace(context(data, seed=number), engine=EngineHooks(inference, fused))
        out[number] = predict_logits(DENOISE.steal(oracle_on(victim), ctx), data.x)

    alone: dict[int, Tensor] = {}
    together: dict[int, Tensor] = {}
    for number in (0, 1):
        steal(None, number, alone)
    fused = FusedTraining()
    fused.run([lambda s=number: steal(fused, s, together) for number in (0, 1)])  # type: ignore[misc]
    for number in (0, 1):
        torch.testing.assert_close(together[number], alone[number], atol=1e-3, rtol=1e-3)
