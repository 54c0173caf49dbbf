"""A run opened again: the victims of its first seed, from its store, as its evaluation queried them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from kdbench.engine.manifest import Manifest
from kdbench.engine.specs import EvaluateSpec, read_spec
from kdbench.engine.stage_log import StageLog
from kdbench.engine.store import Store
from kdbench.engine.victims import open_service
from kdbench.engine.workspace import Workspace, load_images
from kdbench.errors import KdbenchError
from kdbench.game.data import Images
from kdbench.game.roles import Role
from kdbench.game.threat import Service
from kdbench.records import Cell
from kdbench.runs.machine import choose_device


@dataclass(frozen=True)
class OpenedVictim:
    """A victim behind a defense: the stage that has its network, the network, and its service."""

    name: str
    key: str
    network: nn.Module
    service: Service


@dataclass(frozen=True)
class OpenedRun:
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
        key = self._evaluation(self.reference).run.data.key
        self.manifest(key)
        return load_images(key, self._workspace)

    @property
    def about(self) -> str:
        """What was run, for the head of a figure."""
        cell = self.cells[0]
        return f"{cell.dataset}, victim {cell.victim}, seed {self.seed}"

    def undefended(self) -> OpenedVictim:
        """The victim without a defense."""
        return self._victim(self.reference)

    def defended(self) -> Iterator[OpenedVictim]:
        """The others by their names, one after another."""
        yield from map(self._victim, sorted({c.defense.name for c in self.attacked if c.defense} - {self.reference}))

    def manifest(self, key: str) -> Manifest:
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

    def _evaluation(self, defense: str) -> EvaluateSpec:
        """The specification of the stage that evaluated the victim behind `defense`: all that its service is made of."""
        cell = next(cell for cell in self.attacked if cell.defense and cell.defense.name == defense)
        found = self.manifest(cell.keys["evaluate_victim"])
        spec = read_spec({"kind": found.kind, "spec": found.spec})
        assert isinstance(spec, EvaluateSpec)
        return spec

    def _victim(self, defense: str) -> OpenedVictim:
        spec = self._evaluation(defense)
        assert spec.victim is not None
        self.manifest(spec.victim.key)
        eager = replace(spec.numerics, compile=False)  # for a few images, compiling would only take longer
        opened = open_service(spec.victim, eager, self._workspace, self.images.train, Role.EVALUATED_SERVICE)
        service, network = opened
        if network is None:
            raise KdbenchError(f"The victim behind '{defense}' has no network here that could be drawn.")
        return OpenedVictim(defense, spec.victim.key, network, service)

    @cached_property
    def _workspace(self) -> Workspace:
        """A workspace whose stage log is thrown away: services may write down what they do."""
        recorded = self.attacked[0].protocol.numerics.device
        device = choose_device("cpu" if recorded == "cpu" else "auto")
        return Workspace(self.store, self.scratch, StageLog(self.scratch, self.scratch), device, Path())
