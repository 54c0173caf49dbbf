"""A fit that was interrupted resumes to the same bits; measuring its throughput changes none."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_training import State, network, same, state, trained
from torch import Tensor

from helpers import blobs, context
from kdbench.api import Checkpoint, Context, Log, Split, fit


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


class Kept(Checkpoint):
    """One checkpoint a call of `save`, with the generator's state, in the log's list."""

    def __init__(self, log: "Keeping", name: str) -> None:
        self._log, self._name = log, name

    def due(self) -> bool:
        return True

    def save(self, state: Mapping[str, Any]) -> None:
        self._log.saved.append((self._name, copy.deepcopy(state), self._log.generator.get_state()))

    def load(self) -> Any:
        if self._log.kept is None or self._log.kept[0] != self._name:
            return None
        self._log.generator.set_state(self._log.kept[2])
        return copy.deepcopy(self._log.kept[1])


class Keeping(Log):
    """Keeps a checkpoint an epoch in memory; starts with one of another log's, if given."""

    def __init__(self, generator: torch.Generator, kept: Any = None) -> None:
        super().__init__()
        self.saved: list[Any] = []
        self.shares: list[float] = []
        self.generator, self.kept = generator, kept

    def progress(self, share: float, text: str) -> None:
        self.shares.append(share)

    def checkpoint(self, name: str) -> Checkpoint:
        return Kept(self, name)


def with_checkpoints(data: Split, changes: dict[str, Any], kept: Any = None) -> tuple[State, Keeping]:
    """A fit of five epochs, from the start or from a checkpoint; its model and its log."""
    ctx = context(data, epochs=5).training(**changes)
    log = Keeping(ctx.generator, kept)
    return state(trained(data, replace(ctx, log=log))), log


RECIPES: list[dict[str, Any]] = [
    {"crop": 1, "flip": True, "milestones": (2, 4)},
    {"optimizer": "adam", "lr": 0.01, "schedule": "cosine"},
    {"nesterov": True, "clip": 0.5},
]


@pytest.mark.parametrize("changes", RECIPES)
def test_a_fit_resumed_after_any_epoch_ends_with_the_same_bits(data: Split, changes: dict[str, Any]) -> None:
    uninterrupted = state(trained(data, context(data, epochs=5).training(**changes)))
    saving, log = with_checkpoints(data, changes)
    assert same(saving, uninterrupted)
    assert [saved[1]["epochs"] for saved in log.saved] == [1, 2, 3, 4, 5]
    for epochs, kept in enumerate(log.saved, 1):
        resumed, rest = with_checkpoints(data, changes, kept)
        assert same(resumed, uninterrupted)
        assert [later[1]["epochs"] for later in rest.saved] == list(range(epochs + 1, 6))


def test_a_resumed_fit_leaves_the_model_in_eval_mode_even_if_nothing_was_left_to_do(data: Split) -> None:
    _, log = with_checkpoints(data, {})
    ctx = context(data, epochs=5)
    model = network().train()
    resumed = Keeping(ctx.generator, log.saved[-1])
    fit(model, F.cross_entropy, data.x, data.y, replace(ctx, log=resumed))
    assert not any(module.training for module in model.modules())
    assert resumed.saved == []


def test_fits_without_a_name_keep_their_checkpoints_apart(data: Split) -> None:
    ctx = context(data)
    log = Keeping(ctx.generator)
    ctx = replace(ctx, log=log)
    trained(data, ctx)
    trained(data, ctx)
    names = [saved[0] for saved in log.saved]
    assert names[0] == names[1] != names[2] == names[3]


def test_a_fit_with_a_name_uses_the_checkpoint_of_that_name_whatever_was_fitted_before(data: Split) -> None:
    """So a resumed method may leave out a fit that is over, and still find the checkpoint of the next one."""

    def fits(*names: str, kept: Any = None) -> tuple[State, Keeping]:
        ctx = context(data, epochs=3)
        log = Keeping(ctx.generator, kept)
        model = network()
        for name in names:
            model = network()
            fit(model, F.cross_entropy, data.x, data.y, replace(ctx, log=log), name)
        return state(model), log

    expected, log = fits("student/0", "student/1")
    assert [saved[0] for saved in log.saved] == 3 * ["student/0"] + 3 * ["student/1"]
    resumed, _ = fits("student/1", kept=log.saved[4])
    assert same(resumed, expected)


def test_progress_rises_to_1(data: Split) -> None:
    _, log = with_checkpoints(data, {})
    assert log.shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_log_without_an_engine_keeps_numbers_and_no_checkpoints() -> None:
    log = Log()
    log("loss", 3)
    assert log.numbers == {"loss": 3.0}
    checkpoint = log.checkpoint("student/3")
    assert not checkpoint.due()
    checkpoint.save({"epochs": 1})
    assert checkpoint.load() is None


# Throughput


class Timing(Log):
    """Remembers what was timed."""

    def __init__(self, profiling: bool) -> None:
        super().__init__()
        self.profiling = profiling
        self.timings: list[tuple[int, float, float | None]] = []

    def timed(self, images: int, seconds: float, bare: float | None) -> None:
        self.timings.append((images, seconds, bare))


def test_measuring_the_throughput_of_a_bare_loop_changes_no_weight(data: Split) -> None:
    weights, logs = [], []
    for profiling in (False, True):
        ctx = replace(context(data, epochs=3), log=Timing(profiling))
        model = network()
        noisy = torch.rand(len(data), generator=ctx.generator)  # a loss may draw from the generator, too

        def loss(z: Tensor, target: tuple[Tensor, Tensor], ctx: Context = ctx) -> Tensor:
            y, weight = target
            return F.cross_entropy(z, y) + weight.mean() * torch.rand((), generator=ctx.generator)

        fit(model, loss, data.x, (data.y, noisy), ctx)
        fit(model, F.cross_entropy, data.x, data.y, ctx)
        weights.append(state(model))
        logs.append(ctx.log)
    assert same(*weights)
    for log in logs:
        assert isinstance(log, Timing)
        assert [images for images, _, _ in log.timings] == [3 * len(data)] * 2
        assert all(seconds > 0 for _, seconds, _ in log.timings)
        assert all((bare is not None and bare > 0) == log.profiling for _, _, bare in log.timings)
