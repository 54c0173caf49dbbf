"""A stage's log on disk: numbers and pictures for its record, progress for the scheduler, checkpoints for a resumed run."""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.engine.json_files import write_json
from kdbench.engine.manifest import PROGRESS, Progress, Throughput
from kdbench.engine.tensors import load_state, save_state, save_tensors
from kdbench.errors import KdbenchError
from kdbench.game.methods import Checkpoint, Log
from kdbench.game.threat import QueryCounter

CHECKPOINT_SECONDS = float(os.environ.get("KDBENCH_CHECKPOINT_SECONDS", "30"))  # tests ask for one after every epoch
PROGRESS_SECONDS = 0.5
NAME = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)


class Stopped(BaseException):
    """The stage was asked to stop and its checkpoint is on disk. Not an Exception: no method may swallow it."""


class StageLog(Log):
    """The engine's log of one attempt at a stage.

    out: the folder of what the stage leaves. work: the folder of its checkpoints and its progress. stop: set from outside
    (by a signal) and obeyed at the next report of progress. resumable: False when a service keeps state that is in no
    checkpoint; such a stage starts again from the beginning.
    """

    def __init__(self, out: Path, work: Path) -> None:
        super().__init__()
        self.throughput = Throughput()
        self.stop = False
        self.query_counter = QueryCounter()
        self.generators: list[torch.Generator] = []
        self.pictures: list[str] = []
        self.resumable = True
        self.out, self._folder = out, work
        self._saved = self._told = time.monotonic()
        self._names: set[str] = set()

    def images(self, name: str, x: Tensor, labels: Tensor | None = None) -> None:
        """Keep images as `name`.png for people and `name`.safetensors for figures: "images" (N,C,H,W), "labels" (N,).

        Small images are enlarged in the picture, so that a person can see them. Raises `KdbenchError` when `name` cannot
        be a file name.
        """
        from torchvision.utils import save_image

        file = _file_name(name)
        factor = max(1, 64 // x.shape[-1])
        large = x.detach().cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        save_image(large, self.out / f"{file}.png", nrow=max(1, round(len(x) ** 0.5)), pad_value=1.0)
        self.pictures.append(f"{file}.png")
        tensors = {"images": x} if labels is None else {"images": x, "labels": labels}
        save_tensors(tensors, self.out / f"{file}.safetensors")

    def progress(self, share: float, text: str) -> None:
        """Tell the scheduler, at most twice a second. Raises `Stopped` when the stage was asked to stop."""
        now = time.monotonic()
        if now - self._told > PROGRESS_SECONDS:
            self._told = now
            write_json(self._folder / PROGRESS, Progress(share, text))
        if self.stop and not self.resumable:
            raise Stopped

    def timed(self, images: int, seconds: float, bare: float | None) -> None:
        """Count a training; a resumed stage counts what this attempt did."""
        self.throughput = self.throughput.add(images, seconds, bare)

    def checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint of that name, a file of the stage's folder.

        name: letters, digits, "_" and "-", in parts that "/" separates. Raises `KdbenchError` for any other name, and for
        one that the stage has asked for before: the second computation would resume from the state of the first.
        """
        if name in self._names:
            raise KdbenchError(f"Two checkpoints of one stage are named '{name}'; give each computation its own name.")
        self._names.add(name)
        return StageCheckpoint(self, self._folder / f"{_file_name(name)}.safetensors")

    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another, or the stage is about to stop."""
        return self.resumable and (self.stop or time.monotonic() - self._saved >= CHECKPOINT_SECONDS)

    def save(self, path: Path, state: Mapping[str, Any]) -> None:
        """Keep `state` with the random generators and the query count. Raises `Stopped` when asked to stop."""
        generators = [generator.get_state() for generator in self.generators]
        kept = {
            "state": state,
            "generators": generators,
            "answered": self.query_counter.answered,
            "numbers": self.numbers,
        }
        save_state(kept, path)
        self._saved = time.monotonic()
        if self.stop:
            raise Stopped

    def load(self, path: Path) -> Any:
        """What an interrupted run kept at `path`, or None; generators, query count and numbers go back to that moment."""
        kept = load_state(path) if self.resumable else None
        if kept is None:
            return None
        for generator, state in zip(self.generators, kept["generators"], strict=True):
            generator.set_state(state)
        self.query_counter.answered = kept["answered"]
        self.numbers.update(kept["numbers"])
        return kept["state"]


@dataclass(frozen=True)
class StageCheckpoint(Checkpoint):
    """A checkpoint on disk; the random generators and the query count of its stage are kept with it."""

    stage_log: StageLog
    path: Path

    def load(self) -> Any:
        """What an interrupted run saved last, or None."""
        return self.stage_log.load(self.path)

    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another, or the stage is about to stop."""
        return self.stage_log.due()

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep `state`. Raises `Stopped` when the stage was asked to stop."""
        self.stage_log.save(self.path, state)


def _file_name(name: str) -> str:
    """A file name that no other name has."""
    if not NAME.fullmatch(name):
        raise KdbenchError(
            f"'{name}' cannot name a checkpoint or images: use letters, digits, _ and -, and / between parts."
        )
    return name.replace("/", ".")
