"""The numerics policy: what the arithmetic of a stage depends on besides its code and its data. Part of every key."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kdbench.game.methods import Precision

# One thread a worker: oversubscribed cores do a fifth of the work. The allocator keeps large blocks instead of returning
# them to the system and faulting them in again, 1.2 times the speed of training.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it CUDA's matrix products are not deterministic, and refused
}


@dataclass(frozen=True)
class Numerics:
    """What the arithmetic depends on; part of every key.

    device: "cpu" or "cuda". threads: of one worker, whatever the number of workers. compile: whether networks are
    compiled. fuse: how many attack runs a worker does side by side at most, their students trained together (1: each
    alone). Which ones is in no key: a student is that of its solo run up to rounding.
    """

    device: str = "cpu"
    precision: Precision = "fp32"
    threads: int = 1
    compile: bool = False
    fuse: int = 1


def apply_numerics(numerics: Numerics) -> None:
    """Make the arithmetic of this process what `numerics` says."""
    torch.set_num_threads(numerics.threads)
    # An accelerator lacks a deterministic form of some operations: there it is a wish, on a CPU it is the law.
    torch.use_deterministic_algorithms(True, warn_only=numerics.device != "cpu")
    # Memory is never read before it is written, so filling it would only cost time. (The name is made by a class behind
    # the module, which mypy cannot see.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # Off unless bf16 is on: cuDNN's convolutions would round fp32 to ten bits, too coarse for finite differences.
    torch.backends.cudnn.allow_tf32 = numerics.precision != "fp32"


@contextmanager
def numerics_environment() -> Iterator[None]:
    """Environment variables that a process must find when it starts, inside; libraries read them only once."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
