"""Where a stage runs: the finished stages it reads, the folder it fills, and the context of each role in it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kdbench.engine.models import ModelFactory
from kdbench.engine.numerics import Numerics
from kdbench.engine.parts import TrainingSpec
from kdbench.engine.stage_log import StageLog
from kdbench.engine.tensors import load_tensors
from kdbench.game.data import Images, Split
from kdbench.game.methods import Context, EngineHooks
from kdbench.game.roles import Role, derive
from kdbench.game.threat import Service
from kdbench.training.fit import inference
from kdbench.training.fused import FusedTraining

if TYPE_CHECKING:  # how the store keeps stages decides no result, so its code is in no key
    from kdbench.engine.store import Store

TENSORS = "tensors.safetensors"


@dataclass
class FusedStages:
    """Stages that one worker runs together: they train as one network, and share services that answer all of them alike.

    services: by the digest of the victim and the role that asks.
    """

    fused: FusedTraining = field(default_factory=FusedTraining)
    services: dict[tuple[str, Role], tuple[Service, nn.Module | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Workspace:
    """Where a stage runs: the store it reads, the folder `out` it fills, its log, its device, and the data folder.

    fused_stages: the stages that run together with it; None when it runs alone.
    """

    store: "Store"
    out: Path
    stage_log: StageLog
    device: str
    data_folder: Path
    fused_stages: FusedStages | None = None


@dataclass(frozen=True)
class Participant:
    """One role of a stage: its images, how it trains, and what it draws from.

    seed: the cell's. training: its network and recipe. numerics: those of the run.
    """

    workspace: Workspace
    role: Role
    data: Split
    training: TrainingSpec
    numerics: Numerics
    seed: int

    @cached_property
    def factory(self) -> ModelFactory:
        """Makes its networks."""
        own, device = self.training.network.name, self.workspace.device
        return ModelFactory(own, self.data, self.seed, self.role.weights, device)

    @cached_property
    def context(self) -> Context:
        """What a method gets; its generator goes on where it was when the stage is resumed."""
        workspace, seed = self.workspace, derive(self.seed, self.role)
        generator = torch.Generator(workspace.device).manual_seed(seed)
        workspace.stage_log.generators.append(generator)
        return Context(
            self.data,
            self.training.recipe,
            workspace.device,
            seed,
            self.factory,
            generator,
            workspace.stage_log,
            self.numerics.precision,
            self.numerics.compile,
            EngineHooks(inference, workspace.fused_stages.fused if workspace.fused_stages else None),
        )

    def load(self, key: str) -> nn.Module:
        """The network that the stage `key` left, in eval mode."""
        return self.factory.load(self.workspace.store.path(key))

    def save(self, network: nn.Module, origin: str) -> None:
        """Keep the network that this stage is for. Raises `KdbenchError` as `ModelFactory.save` does."""
        self.factory.save(network, self.workspace.out, origin)


def load_images(key: str, workspace: Workspace) -> Images:
    """The data set that the stage `key` decoded, on the device; a split is read when it is first asked for."""
    path = workspace.store.path(key) / TENSORS

    def split(name: str) -> Split:
        x, y, classes = load_tensors(path, f"{name}.x", f"{name}.y", "classes").values()
        return Split(x, y, int(classes)).to(workspace.device)

    return Images.lazy(split)
