"""A checkpoint made in a fused group is that of a solo run, and resumes either way to the same students."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_runs import RECIPES, Method, alone, assert_close, fitting, together, with_recipe

from helpers import blobs
from kdbench.api import Checkpoint, Context, Log, Split


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


class Keeping(Log):
    """Keeps checkpoints in memory, and stops the method at one of them."""

    class Stop(BaseException):
        pass

    def __init__(self, generator: torch.Generator, kept: dict[str, Any], stop_after: int) -> None:
        super().__init__()
        self.generator, self.kept, self.left = generator, kept, stop_after

    def checkpoint(self, name: str) -> Checkpoint:
        return Kept(self, name)


class Kept(Checkpoint):
    """One checkpoint of `Keeping`."""

    def __init__(self, log: Keeping, name: str) -> None:
        self._log, self._name = log, name

    def due(self) -> bool:
        return True

    def save(self, state: Any) -> None:
        self._log.kept[self._name] = copy.deepcopy(state), self._log.generator.get_state()
        self._log.left -= 1
        if not self._log.left:
            raise Keeping.Stop

    def load(self) -> Any:
        if self._name not in self._log.kept:
            return None
        state, generator = self._log.kept[self._name]
        self._log.generator.set_state(generator)
        return copy.deepcopy(state)


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=str)
@pytest.mark.parametrize("before", [alone, together])
@pytest.mark.parametrize("after", [alone, together])
def test_a_checkpoint_made_in_a_fused_group_is_that_of_a_solo_run(
    data: Split, recipe: dict[str, Any], before: Callable[..., Any], after: Callable[..., Any]
) -> None:
    """Whether it was made alone or together, it is resumed alone or together, to the same students."""
    kept: list[dict[str, Any]] = [{} for _ in range(3)]

    def methods(stop_after: int) -> list[tuple[Method, Context]]:
        contexts = [with_recipe(seed, epochs=4, **recipe) for seed in range(3)]
        logs = [Keeping(ctx.generator, kept[n], stop_after) for n, ctx in enumerate(contexts)]
        run = fitting(F.cross_entropy, data.y, data)
        return [(run, replace(ctx, log=log)) for ctx, log in zip(contexts, logs, strict=True)]

    if before is alone:
        for method in methods(2):
            with pytest.raises(Keeping.Stop):
                alone([method])
    else:
        with pytest.raises(Keeping.Stop):
            together(methods(2))
    assert [state["fit/1"][0]["epochs"] for state in kept] == [2, 2, 2]
    resumed = after(methods(0))
    kept = [{} for _ in range(3)]
    for ours, theirs in zip(resumed, alone(methods(0)), strict=True):
        assert_close(ours, theirs)
