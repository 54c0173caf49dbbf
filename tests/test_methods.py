"""What methods are given: randomness that is nobody else's."""

import pytest
import torch

from kdbench.api import seeded


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
