"""What each kind of stage does: a pure function of its specification and of the finished stages it names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench import registry
from kdbench.engine.stage_log import StageLog
from kdbench.engine.store import Store, json_digest
from kdbench.engine.tensors import load_tensors, load_weights, save_tensors, save_weights
from kdbench.errors import KdbenchError
from kdbench.evaluation.adversarial import Robustness
from kdbench.evaluation.evaluate import Evaluation, evaluate_against, evaluate_student, evaluate_victim
from kdbench.evaluation.predictions import predict_labels
from kdbench.game.data import Dataset, DataSubset, Images, Split, resized
from kdbench.game.fields import build
from kdbench.game.methods import Attack, Context, Defense, EngineHooks, NewStudent, Recipe, no_surrogate
from kdbench.game.roles import Role, derive, seeded
from kdbench.game.threat import Oracle, Scenario, Service
from kdbench.training.fit import fit, inference, predict_logits
from kdbench.training.fused import FusedTraining

WEIGHTS = "weights.safetensors"
TENSORS = "tensors.safetensors"
PREDICTIONS = "predictions.safetensors"
SPLITS = ("train", "validation", "test")
FEW = 256  # images enough to see that a network answers at all
BLIND_MEAN, BLIND_STD = 0.5, 0.25  # what a thief without images assumes of pixels

SERVICE_WEIGHTS = {
    Role.ATTACKED_SERVICE: Role.ATTACKED_SERVICE_WEIGHTS,
    Role.EVALUATED_SERVICE: Role.EVALUATED_SERVICE_WEIGHTS,
}

Numbers = dict[str, float]
Spec = Mapping[str, Any]


@dataclass
class FusedStages:
    """Stages that one worker does side by side: they train together, and share services that answer all of them alike."""

    fused: FusedTraining = field(default_factory=FusedTraining)
    services: dict[str, tuple[Service, nn.Module]] = field(default_factory=dict)


@dataclass(frozen=True)
class Workspace:
    """Where a stage is worked on: the store it reads, the folder it fills, its journal, its device, the data folder; and
    the crew if it is not worked on alone."""

    store: Store
    out: Path
    stage_log: StageLog
    device: str
    data_folder: Path
    fused_stages: FusedStages | None = None


def run_stage(kind: str, spec: Spec, workspace: Workspace) -> Numbers:
    """Do the stage: fill `workspace.out` and return its metrics. Raises what the method raises."""
    return STAGES[kind](spec, workspace)


def _data(spec: Spec, workspace: Workspace) -> Numbers:
    """Decode a data set into tensors, once."""
    dataset: Dataset = _method("dataset", spec["dataset"])
    images = dataset.load(workspace.data_folder)
    tensors: dict[str, Tensor] = {}
    for name in SPLITS:
        split: Split = getattr(images, name)
        tensors |= {f"{name}.x": split.x, f"{name}.y": split.y}
    tensors["classes"] = torch.tensor(images.train.classes)
    save_tensors(tensors, workspace.out / TENSORS)
    sizes: Numbers = {name: len(getattr(images, name)) for name in SPLITS}
    return {"classes": images.train.classes, **sizes}


def _train(spec: Spec, workspace: Workspace) -> Numbers:
    """Train the victim on hard labels."""
    data = load_images(spec["data"]["key"], workspace).train
    factory = ModelFactory.of(spec, workspace, data, Role.VICTIM_WEIGHTS)
    ctx = _context(spec, workspace, data, factory, Role.VICTIM_TRAINING)
    victim = ctx.new_student()
    fit(victim, nn.functional.cross_entropy, ctx.data.x, ctx.data.y, ctx)
    factory.save(workspace, victim, "training of the victim")
    return workspace.stage_log.numbers


def _harden(spec: Spec, workspace: Workspace) -> Numbers:
    """Let a defense make of the victim the model to deploy."""
    data = load_images(spec["data"]["key"], workspace).train
    defense: Defense = _method("defense", spec["defense"])
    factory = ModelFactory.of(spec, workspace, data, Role.HARDENING_WEIGHTS)
    ctx = _context(spec, workspace, data, factory, Role.HARDENING)
    hardened = defense.harden(factory.load(workspace, spec["victim"]), ctx)
    factory.save(workspace, hardened, f"harden of the defense '{spec['defense']['method']}'")
    return workspace.stage_log.numbers


def _auxiliary(spec: Spec, workspace: Workspace) -> Numbers:
    """Let a defense make the network that its service needs beside the model."""
    data = load_images(spec["data"]["key"], workspace).train
    defense: Defense = _method("defense", spec["defense"])
    factory = ModelFactory.of(spec, workspace, data, Role.AUXILIARY_WEIGHTS)
    whose = f"companion of the defense '{spec['defense']['method']}'"
    auxiliary = defense.auxiliary(
        factory.load(workspace, spec["victim"]), _context(spec, workspace, data, factory, Role.AUXILIARY)
    )
    if auxiliary is None:
        raise KdbenchError(f"The {whose} must return a network, or not be overridden.")
    factory.save(workspace, auxiliary, whose)
    return workspace.stage_log.numbers


def _steal(spec: Spec, workspace: Workspace) -> Numbers:
    """Let an attack make a student, through the oracle and nothing else."""
    images = load_images(spec["data"]["key"], workspace)
    attack: Attack = _method("attack", spec["attack"])
    scenario = build(Scenario, spec["scenario"], "scenario")
    attacker_data = _attacker_data(images.train, scenario, build(DataSubset, spec["subset"], "subset"), spec["seed"])
    factory = ModelFactory.of(spec, workspace, attacker_data, Role.STUDENT_WEIGHTS)
    ctx = replace(
        _context(spec, workspace, attacker_data, factory, Role.ATTACK),
        surrogate=_surrogates(spec, workspace, attacker_data.shape),
    )
    service, model = open_service(spec, workspace, images.train, Role.ATTACKED_SERVICE)
    oracle = Oracle(service, scenario, model, workspace.stage_log.meter)
    student = attack.steal(oracle, ctx)
    factory.save(workspace, student, f"steal of the attack '{spec['attack']['method']}'")
    return {**workspace.stage_log.numbers, "queries": oracle.answered}


def _score(spec: Spec, workspace: Workspace) -> Numbers:
    """Judge a victim, or a student and how it stands to the victim. The thief never touched the service opened here."""
    images = load_images(spec["data"]["key"], workspace)
    robustness = build(Robustness, spec["robustness"], "robustness")
    seed = spec["seed"]
    service, model = open_service(spec, workspace, images.train, Role.EVALUATED_SERVICE)
    if spec["student"] is None:
        return _kept(evaluate_victim(model, service, images, robustness, seed), workspace)
    student = ModelFactory.of(spec["student"], workspace, images.train, Role.STUDENT_WEIGHTS).load(
        workspace, spec["student"]["key"]
    )
    evaluation = evaluate_student(student, images, robustness, seed)
    numbers = _kept(evaluation, workspace)
    if spec["victim"] is None:
        return numbers
    served = predict_labels(service, images.test.x)
    return {**numbers, **evaluate_against(evaluation, service, served, images, robustness, seed)}


def _kept(evaluation: Evaluation, workspace: Workspace) -> Numbers:
    """The metrics of an evaluation; its predictions go to a file of the stage."""
    save_tensors(evaluation.predictions.to_tensors(), workspace.out / PREDICTIONS)
    return evaluation.metrics


STAGES: Mapping[str, Callable[[Spec, Workspace], Numbers]] = {
    "data": _data,
    "train": _train,
    "harden": _harden,
    "auxiliary": _auxiliary,
    "steal": _steal,
    "evaluate": _score,
}


class Standardise(nn.Module):
    """Pixels in [0,1] -> standardised pixels, inside the model: every image outside of one is in [0,1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1))
        self.register_buffer("std", std.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) in [0,1] -> the same with mean 0 and deviation 1 over the owner's images."""
        return (x - self.mean) / self.std


@dataclass
class ModelFactory:
    """Makes networks for one side: of its own architecture or a named one, standardising as its images suggest."""

    own: str
    data: Split
    seed: int
    role: Role
    device: str
    made: int = 0

    @classmethod
    def of(cls, spec: Spec, workspace: Workspace, data: Split, role: Role) -> "ModelFactory":
        """The workshop of the side whose network and seed are in `spec`."""
        return cls(spec["network"]["name"], data, spec["seed"], role, workspace.device)

    def __call__(self, name: str | None = None) -> nn.Module:
        """A fresh network; its weights depend on the seed, the role and how many were made before, on no other draw."""
        with seeded(derive(self.seed, self.role, name or self.own, self.made)):
            network = self._build(name or self.own)
        self.made += 1
        return network.to(self.device)

    def load(self, workspace: Workspace, key: str) -> nn.Module:
        """The network of this side's architecture whose weights the stage `key` left."""
        return load_weights(self._build(self.own), workspace.store.path(key) / WEIGHTS).to(self.device)

    def save(self, workspace: Workspace, network: nn.Module, whose: str) -> None:
        """Keep the result of a method. Raises `KdbenchError` unless it is of this side's architecture."""
        expected = {name: value.shape for name, value in self._build(self.own).state_dict().items()}
        if {name: value.shape for name, value in network.state_dict().items()} != expected:
            raise KdbenchError(
                f"The {whose} must return a network of its side's architecture '{self.own}', as ctx.new_student() does."
            )
        images = self.data.x[:FEW] if len(self.data) else torch.zeros(FEW, *self.data.shape, device=self.device)
        if not predict_logits(network, images).isfinite().all():
            raise KdbenchError(f"The {whose} returned a network whose answers are not finite: its training diverged.")
        save_weights(network, workspace.out / WEIGHTS)

    def _build(self, name: str) -> nn.Module:
        network: nn.Module = registry.load("model", name)(self.data.shape, self.data.classes)
        model = nn.Sequential(Standardise(*self._pixels()), network)
        # From the first: the layout decides in which order sums are taken, and a resumed run must take them alike.
        return model.to(memory_format=torch.channels_last)

    def _pixels(self) -> tuple[Tensor, Tensor]:
        if not len(self.data):
            channels = self.data.shape[0]
            return torch.full((channels,), BLIND_MEAN), torch.full((channels,), BLIND_STD)
        std, mean = torch.std_mean(self.data.x, dim=(0, 2, 3))
        return mean.cpu(), std.clamp_min(1e-3).cpu()


def _context(spec: Spec, workspace: Workspace, data: Split, networks: NewStudent, role: Role) -> Context:
    """What a method gets; its generator goes on where it was when the stage is resumed."""
    seed = derive(spec["seed"], role)
    generator = torch.Generator(workspace.device).manual_seed(seed)
    workspace.stage_log.generators.append(generator)
    recipe = build(Recipe, spec["recipe"], "recipe")
    numerics, fused = spec["numerics"], workspace.fused_stages.fused if workspace.fused_stages else None
    return Context(
        data,
        recipe,
        workspace.device,
        seed,
        networks,
        generator,
        workspace.stage_log,
        numerics["precision"],
        numerics["compile"],
        EngineHooks(inference, fused),
    )


def open_service(spec: Spec, workspace: Workspace, data: Split, client: Role) -> tuple[Service, nn.Module]:
    """The service of a hardened victim for one client, and the model behind it. Without a victim: nothing to ask."""
    victim = spec["victim"]
    if victim is None:
        return nn.Identity(), nn.Identity()
    factory = ModelFactory.of(victim, workspace, data, SERVICE_WEIGHTS[client])
    model = factory.load(workspace, victim["key"]).requires_grad_(False)
    ctx = _context({**victim, "numerics": spec["numerics"]}, workspace, data, factory, client)
    if victim["auxiliary"]:
        ctx = replace(ctx, auxiliary=factory.load(workspace, victim["auxiliary"]).eval().requires_grad_(False))
    defense: Defense = _method("defense", victim["defense"]) if victim["defense"] else Defense()
    workspace.stage_log.resumable &= not defense.stateful  # what such a service remembers is in no checkpoint
    if workspace.fused_stages is None or defense.stateful:
        return defense.serve(model, ctx), model
    name = json_digest({"victim": victim, "client": client})
    if name not in workspace.fused_stages.services:
        workspace.fused_stages.services[name] = LastAnswerCache(defense.serve(model, ctx)), model
    return workspace.fused_stages.services[name]


class LastAnswerCache:
    """A service that remembers its last answer: those who train together often ask the same, one after another."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asked, self._answer = torch.empty(0), torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """What the service says of images `x`."""
        if not (self._asked.device == x.device and torch.equal(self._asked, x)):
            self._asked, self._answer = x, self._service(x)
        return self._answer


def _attacker_data(data: Split, scenario: Scenario, used: DataSubset, seed: int) -> Split:
    """The part of the training data that the thief owns and this attack uses."""
    subset = DataSubset(scenario.data, derive(seed, Role.DATA_SUBSET)).of(data)
    part = used.of(subset)
    return part if scenario.labels else part.without_labels()


def load_images(key: str, workspace: Workspace) -> Images:
    """The data set that the stage `key` decoded, on the device."""
    path = workspace.store.path(key) / TENSORS

    def split(name: str) -> Split:
        x, y, classes = load_tensors(path, f"{name}.x", f"{name}.y", "classes").values()
        return Split(x, y, int(classes)).to(workspace.device)

    return Images.lazy(split)


def _surrogates(spec: Spec, workspace: Workspace, shape: tuple[int, int, int]) -> Callable[[str], Tensor]:
    """Gives the public data sets of a theft by name, in the shape of the victim's images."""

    def surrogate(name: str) -> Tensor:
        if name not in spec["surrogates"]:
            return no_surrogate(name)
        return resized(load_images(spec["surrogates"][name]["key"], workspace).train.x, shape)

    return surrogate


def _method(kind: str, spec: Spec) -> Any:
    return build(registry.load(kind, spec["method"]), spec["fields"], f"{kind}.{spec['method']}")
