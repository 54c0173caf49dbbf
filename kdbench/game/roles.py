"""Whose randomness: every draw of a cell belongs to one role, and no two roles share a random stream."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import torch


class Role(StrEnum):
    """Who draws. A real attacker does not know the order in which the victim saw its images, nor its initial weights.

    `*_WEIGHTS`: the initial weights of networks made there. Each service draws apart from the other: what the attacker
    asked must not change the answers that are measured. DATA_SUBSET: which images the attacker has.
    """

    VICTIM_WEIGHTS = "victim-weights"
    VICTIM_TRAINING = "victim-training"
    HARDENING_WEIGHTS = "hardening-weights"
    HARDENING = "hardening"
    AUXILIARY_WEIGHTS = "auxiliary-weights"
    AUXILIARY = "auxiliary"
    STUDENT_WEIGHTS = "student-weights"
    ATTACK = "attack"
    ATTACKED_SERVICE_WEIGHTS = "attacked-service-weights"
    ATTACKED_SERVICE = "attacked-service"
    EVALUATED_SERVICE_WEIGHTS = "evaluated-service-weights"
    EVALUATED_SERVICE = "evaluated-service"
    EVALUATION = "evaluation"
    DATA_SUBSET = "data-subset"

    @property
    def weights(self) -> "Role":
        """The role that draws the initial weights of the networks that this one makes."""
        return _WEIGHTS[self]


_WEIGHTS = {
    Role.VICTIM_TRAINING: Role.VICTIM_WEIGHTS,
    Role.HARDENING: Role.HARDENING_WEIGHTS,
    Role.AUXILIARY: Role.AUXILIARY_WEIGHTS,
    Role.ATTACK: Role.STUDENT_WEIGHTS,
    Role.ATTACKED_SERVICE: Role.ATTACKED_SERVICE_WEIGHTS,
    Role.EVALUATED_SERVICE: Role.EVALUATED_SERVICE_WEIGHTS,
}


def derive(seed: int, role: Role, *rest: object) -> int:
    """A seed in [0, 2^63) for one role of the cell with that `seed`; `rest` tells apart several draws of one role."""
    text = "/".join(str(part) for part in (seed, role, *rest))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Fix torch's global generators inside, and leave them as they were: for code that draws from nowhere else."""
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: it seeds every device there is, and only these are put back.
        torch.default_generator.manual_seed(seed)
        for name in devices:
            with torch.cuda.device(name):
                torch.cuda.manual_seed(seed)
        yield


def draw_seed(generator: torch.Generator) -> int:
    """A seed drawn from `generator`."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
