"""Checks before any training that the networks of a suite take its images."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kdbench import registry
from kdbench.errors import KdbenchError
from kdbench.game.roles import seeded
from kdbench.suites.suite import Suite

TRIED = 2  # black images

Shape = tuple[int, int, int]


def try_networks(suite: Suite, shape: Shape, classes: int) -> None:
    """Run each network that `suite` will train, untrained, on images of `shape` (C,H,W).

    Raises `KdbenchError` naming the field, the network and the shape for the first that cannot.
    """
    fields: dict[str, str] = {}
    for field, name in _named(suite):
        fields.setdefault(name, field)
    for name, field in fields.items():
        try:
            _try(name, shape, classes)
        except KdbenchError as error:
            raise KdbenchError(f"{field}: {error}") from None


def _named(suite: Suite) -> Iterator[tuple[str, str]]:
    """Each network after the field that names it; those of an attack that will be skipped are left out."""
    yield "victim.network", suite.victim
    for student in suite.students:
        yield "student.networks", student
    for choice in (*suite.attacks, *suite.baselines):
        if choice.instance.needs <= suite.scenario.access:
            for name in choice.instance.networks():
                yield f"attack.{choice.name}", name


def _try(name: str, shape: Shape, classes: int) -> None:
    """On the CPU, as workers make networks: the meta device computes nothing, but its setup takes a second."""
    size = "x".join(map(str, shape))
    try:
        with seeded(0), torch.no_grad():
            answers = registry.load("model", name)(shape, classes).eval()(torch.zeros(TRIED, *shape))
    except KdbenchError:
        raise
    except Exception as error:  # a user's network may raise anything at images that it was not made for
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
        raise KdbenchError(f"The network '{name}' cannot take images of {size} ({reason}).") from None
    if not isinstance(answers, Tensor) or answers.shape != (TRIED, classes):
        found = tuple(answers.shape) if isinstance(answers, Tensor) else f"a {type(answers).__name__}"
        raise KdbenchError(
            f"The network '{name}' answers {TRIED} images of {size} with {found}, not {(TRIED, classes)}."
        )
