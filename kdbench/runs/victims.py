"""The victims of a run, opened again from its store: the models, and the services that its evaluation queried."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from kdbench.engine.stage_log import StageLog
from kdbench.engine.stages import Workspace, load_images, open_service
from kdbench.engine.store import Json, Store
from kdbench.errors import KdbenchError
from kdbench.game.data import Images
from kdbench.game.roles import Role
from kdbench.game.threat import Service
from kdbench.records import Cell
from kdbench.runs.machine import choose_device


@dataclass(frozen=True)
class Victim:
    """A victim behind a defense: the stage that holds its weights, the model, and its service."""

    name: str
    key: str
    model: nn.Module
    service: Service


@dataclass(frozen=True)
class FinishedRun:
    """The cells of a results folder, and the stages of their first seed in the store at `root`, which is only read.

    scratch: a folder for what services write when they are opened; it is thrown away.
    """

    folder: Path
    cells: Sequence[Cell]
    root: Path
    scratch: Path

    @cached_property
    def seed(self) -> int:
        """The first seed."""
        return min(cell.seed for cell in self.cells)

    @cached_property
    def attacked(self) -> list[Cell]:
        """The scored cells of the first seed in which there is a victim."""
        return [cell for cell in self.cells if cell.defense and cell.seed == self.seed and cell.status.scored]

    @cached_property
    def reference(self) -> str:
        """The name of the defense that is the undefended victim."""
        names = [cell.defense.name for cell in self.attacked if cell.defense and cell.defense.is_reference]
        if not names:
            raise KdbenchError(
                f"{self.folder} has no scored cell of the undefended victim with seed {self.seed}: "
                "there is nothing to compare with."
            )
        return names[0]

    @cached_property
    def store(self) -> Store:
        """The store, which is there already."""
        if not (self.root / "data").is_dir():
            raise self.lacking(f"There is no store at {self.root}, where the stages of {self.folder} should be.")
        return Store(self.root)

    @cached_property
    def images(self) -> Images:
        """The data set."""
        key = self._evaluation(self.reference)["data"]["key"]
        self.manifest(key)
        return load_images(key, self._workspace)

    @property
    def about(self) -> str:
        """What was run, for the head of a figure."""
        cell = self.cells[0]
        return f"{cell.dataset}, victim {cell.victim}, seed {self.seed}"

    def undefended(self) -> Victim:
        """The victim without a defense."""
        return self._victim(self.reference)

    def defended(self) -> Iterator[Victim]:
        """The others by their names, one after another."""
        yield from map(self._victim, sorted({c.defense.name for c in self.attacked if c.defense} - {self.reference}))

    def manifest(self, key: str) -> Json:
        """stage.json of the stage `key`; raises `KdbenchError` when the store does not have it."""
        if not self.store.has(key):
            raise self.lacking(f"The store {self.root} has no stage {key}, which the figure is drawn from.")
        return self.store.manifest(key)

    def lacking(self, what: str) -> KdbenchError:
        """The error for something that a run would put into the store."""
        suite = self.cells[0].suite
        return KdbenchError(
            f"{what} Name the right one with --store, or make it with "
            f"`kdbench run {suite} --store {self.root} --out {self.folder}` and the other options of that run."
        )

    def _evaluation(self, defense: str) -> Json:
        """The specification of the stage that evaluated the victim behind `defense`: all that its service is made of."""
        cell = next(cell for cell in self.attacked if cell.defense and cell.defense.name == defense)
        spec: Json = self.manifest(cell.keys["evaluate_victim"])["spec"]
        return spec

    def _victim(self, defense: str) -> Victim:
        spec = self._evaluation(defense)
        key = spec["victim"]["key"]
        self.manifest(key)
        eager = {**spec["numerics"], "compile": False}  # for a few images, compiling would only take longer
        served = open_service({**spec, "numerics": eager}, self._workspace, self.images.train, Role.EVALUATED_SERVICE)
        service, model = served
        return Victim(defense, key, model, service)

    @cached_property
    def _workspace(self) -> Workspace:
        """A workspace whose stage log is thrown away: services may write down what they do."""
        recorded = self.attacked[0].protocol.numerics.device
        device = choose_device("cpu" if recorded == "cpu" else "auto")
        return Workspace(self.store, self.scratch, StageLog(self.scratch, self.scratch), device, Path())
