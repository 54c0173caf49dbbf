"""A stage's log on disk: numbers and pictures for its record, progress for the driver, checkpoints for a resumed run."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.engine.store import write_json
from kdbench.engine.tensors import load_state, save_state
from kdbench.game.methods import Checkpoint, Log
from kdbench.game.threat import QueryCounter

CHECKPOINT_SECONDS = float(
    os.environ.get("KDBENCH_CHECKPOINT_SECONDS", "30")
)  # the tests' way to a checkpoint an epoch
PROGRESS_SECONDS = 0.5


class Stopped(BaseException):
    """The stage was asked to stop and its checkpoint is on disk. Not an Exception: no method may swallow it."""


@dataclass
class Throughput:
    """What went through a stage's trainings in this attempt, and how fast: `images` in so many `seconds`.

    limit_seconds: what a bare loop of the same modules would have taken, for those trainings whose limit was measured;
    None when it was of none. limited_seconds: the part of `seconds` that those trainings took.
    """

    images: int = 0
    seconds: float = 0.0
    limited_seconds: float = 0.0
    limit_seconds: float | None = None

    def add(self, images: int, seconds: float, limit: float | None) -> None:
        """Count one training; limit: images/s of its bare loop."""
        self.images += images
        self.seconds += seconds
        if limit:
            self.limited_seconds += seconds
            self.limit_seconds = (self.limit_seconds or 0.0) + images / limit


class StageLog(Log):
    """The runner's Log. `stop` is set from outside (a signal) and obeyed at the next report of progress."""

    def __init__(self, out: Path, work: Path) -> None:
        super().__init__()
        self.throughput = Throughput()
        self.stop = False
        self.meter = QueryCounter()
        self.generators: list[torch.Generator] = []
        self.pictures: list[str] = []
        self.resumable = True
        self.out, self._folder = out, work
        self._saved = self._told = time.monotonic()

    def images(self, name: str, x: Tensor) -> None:
        """Save a sheet of images (N,C,H,W) in [0,1] as `name`.png, small ones enlarged so that a person can see them."""
        from torchvision.utils import save_image

        factor = max(1, 64 // x.shape[-1])
        large = x.detach().cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        save_image(large, self.out / f"{name}.png", nrow=max(1, round(len(x) ** 0.5)), pad_value=1.0)
        self.pictures.append(f"{name}.png")

    def progress(self, share: float, text: str) -> None:
        """Tell the driver, at most twice a second. Raises `Stopped` when the stage was asked to stop."""
        now = time.monotonic()
        if now - self._told > PROGRESS_SECONDS:
            self._told = now
            write_json(self._folder / "progress.json", {"share": share, "text": text})
        if self.stop and not self.resumable:
            raise Stopped

    def timed(self, images: int, seconds: float, limit: float | None) -> None:
        """Count it: a resumed stage counts what this attempt did."""
        self.throughput.add(images, seconds, limit)

    def checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint of that name, a file of the stage's folder."""
        return StageCheckpoint(self, name.replace("/", "-"))

    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another, or the stage is about to stop."""
        return self.resumable and (self.stop or time.monotonic() - self._saved >= CHECKPOINT_SECONDS)

    def save(self, slot: str, state: Mapping[str, Any]) -> None:
        """Keep `state` with the random generators and the query count. Raises `Stopped` when asked to stop."""
        generators = [generator.get_state() for generator in self.generators]
        kept = {"state": state, "generators": generators, "answered": self.meter.answered, "numbers": self.numbers}
        save_state(kept, self._folder / f"{slot}.safetensors")
        self._saved = time.monotonic()
        if self.stop:
            raise Stopped

    def load(self, slot: str) -> Any:
        """What an interrupted run kept under `slot`, or None; generators, query count and numbers go back to that moment."""
        kept = load_state(self._folder / f"{slot}.safetensors") if self.resumable else None
        if kept is None:
            return None
        for generator, state in zip(self.generators, kept["generators"], strict=True):
            generator.set_state(state)
        self.meter.answered = kept["answered"]
        self.numbers.update(kept["numbers"])
        return kept["state"]


@dataclass(frozen=True)
class StageCheckpoint(Checkpoint):
    """A checkpoint on disk, beside the random generators and the query count of its stage."""

    stage_log: StageLog
    name: str

    def load(self) -> Any:
        """What an interrupted run saved last, or None."""
        return self.stage_log.load(self.name)

    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another, or the stage is about to stop."""
        return self.stage_log.due()

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep `state`. Raises `Stopped` when the stage was asked to stop."""
        self.stage_log.save(self.name, state)
