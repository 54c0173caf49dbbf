"""The numerics policy of stages."""

import os
from collections.abc import Iterator

import pytest
import torch

from kdbench.engine.numerics import ENVIRONMENT, Numerics, apply_numerics, numerics_environment


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    tf32, benchmark = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def test_the_arithmetic_of_a_process_is_made_what_the_numerics_say() -> None:
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    apply_numerics(Numerics(threads=2))
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.backends.cudnn.benchmark


def test_an_accelerator_only_warns_of_what_is_not_deterministic() -> None:
    apply_numerics(Numerics(device="cuda"))
    assert torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("bf16", True)])
def test_products_of_fp32_are_never_rounded_to_tf32(precision: str, tf32: bool) -> None:
    apply_numerics(Numerics(precision=precision))  # type: ignore[arg-type]
    assert torch.backends.cudnn.allow_tf32 is tf32


def test_the_environment_of_workers_holds_inside_and_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    with numerics_environment():
        assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT
    assert os.environ["OMP_NUM_THREADS"] == "5"
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ
