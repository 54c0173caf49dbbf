"""What methods are given: randomness of their own, secrets, auxiliary models, names of checkpoints; and what they declare."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from helpers import blobs, context, taught
from kdbench.api import Context, Defense, KdbenchError, Log, predict_logits, registered_defense, seeded
from kdbench.defenses.mad import MAD
from kdbench.defenses.model_guard import ModelGuardS
from kdbench.defenses.nasty import Nasty
from kdbench.defenses.top_k import TopK
from kdbench.game.methods import acts_on_answers, hardens, has_auxiliary


@dataclass(frozen=True)
class Rolled(Defense):
    """Answers with the classes rolled by one."""

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return log_p.roll(1, dims=1)


def test_a_service_answers_what_perturb_makes_of_the_log_probabilities() -> None:
    data = blobs().train
    victim = taught(data)
    clean = predict_logits(victim, data.x).log_softmax(dim=1)
    torch.testing.assert_close(Defense().serve(victim, context(data))(data.x), clean)
    torch.testing.assert_close(Rolled().serve(victim, context(data))(data.x), clean.roll(1, dims=1))


def test_whether_a_defense_acts_on_answers_hardens_or_has_an_auxiliary_model_is_read_from_its_methods() -> None:
    said = {
        type(defense).__name__: (acts_on_answers(defense), hardens(defense), has_auxiliary(defense))
        for defense in (Defense(), TopK(), ModelGuardS(), Nasty(), MAD())
    }
    assert said == {
        "Defense": (False, False, False),
        "TopK": (True, False, False),
        "ModelGuardS": (True, False, False),
        "Nasty": (False, True, False),
        "MAD": (True, False, True),
    }


def test_a_secret_is_the_same_at_every_call_and_depends_on_seed_and_name() -> None:
    ctx, other = context(blobs().train), context(blobs().train, seed=1)
    before = ctx.generator.get_state()
    secrets = [ctx.secret("noise"), ctx.secret("noise"), ctx.secret("other"), other.secret("noise")]
    assert secrets[0] == secrets[1]
    assert len(set(secrets)) == 3
    assert all(0 <= secret < 2**63 for secret in secrets)
    assert torch.equal(ctx.generator.get_state(), before)


def test_the_auxiliary_model_is_asked_through_the_context() -> None:
    data = blobs().train
    auxiliary = taught(data)
    ctx = replace(context(data), auxiliary=auxiliary)
    torch.testing.assert_close(ctx.auxiliary_logits(data.x), predict_logits(auxiliary, data.x))
    with pytest.raises(KdbenchError, match="auxiliary model, and the context has none"):
        context(data).auxiliary_logits(data.x)


def test_fits_are_numbered_in_their_order_and_other_checkpoints_burn_no_number() -> None:
    log = Log()
    ctx = replace(context(blobs().train), log=log)
    assert log.next_fit() == "fit/1"
    checkpoint = ctx.checkpoint("student/3")
    assert (checkpoint.load(), checkpoint.due()) == (None, False)
    assert log.next_fit() == "fit/2"


def test_a_registered_defense_is_made_by_name_and_fields() -> None:
    assert registered_defense("top-k", {"k": 2}) == TopK(2)
    with pytest.raises(KdbenchError, match="Did you mean 'top-k'"):
        registered_defense("top-kk", {})
    with pytest.raises(KdbenchError, match=r"defense\.top-k\.k must be"):
        registered_defense("top-k", {"k": 0})


def test_a_seeded_block_draws_the_same_and_leaves_no_trace_on_the_generator_outside() -> None:
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    drawn = []
    for _ in range(2):
        with seeded(3):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.rand(4), expected)


def test_a_seeded_block_on_the_cpu_leaves_the_accelerators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their generators would not be put back."""
    touched: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", touched.append)
    with seeded(3):
        drawn = torch.rand(4)
    assert touched == []
    torch.manual_seed(3)
    assert touched == [3], "what seeds accelerators is called by another name now"
    assert torch.equal(torch.rand(4), drawn), "the same numbers as ever"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_seeded_block_on_an_accelerator_puts_its_generator_back() -> None:
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    drawn = []
    for device in ("cuda", "cuda:0"):
        with seeded(3, device):
            drawn.append(torch.rand(4, device=device))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.cuda.get_rng_state(), before)
    with seeded(3):
        torch.rand(4)
    assert torch.equal(torch.cuda.get_rng_state(), before)
