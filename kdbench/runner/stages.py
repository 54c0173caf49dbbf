"""What each kind of stage does: a pure function of its specification and of the finished stages it names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench import registry
from kdbench.errors import KdbenchError
from kdbench.game.data import Dataset, Images, Owned, Split, fitted
from kdbench.game.fields import build
from kdbench.game.methods import Attack, Context, Defense, NewStudent, Recipe, derive, no_public, seeded
from kdbench.game.referee import compare, judge_student, judge_victim
from kdbench.game.robustness import Evasion
from kdbench.game.stacking import Company
from kdbench.game.threat import Oracle, Service, ThreatModel
from kdbench.game.training import fit, frozen, infer
from kdbench.runner.checkpoint import load_tensors, load_weights, save_tensors, save_weights
from kdbench.runner.journal import Journal
from kdbench.runner.store import Store, json_digest

WEIGHTS = "weights.safetensors"
TENSORS = "tensors.safetensors"
SPLITS = ("train", "validation", "test")
FEW = 256  # images enough to see that a network answers at all
BLIND_MEAN, BLIND_STD = 0.5, 0.25  # what a thief without images assumes of pixels

Numbers = dict[str, float]
Spec = Mapping[str, Any]


@dataclass
class Crew:
    """Stages that one worker does side by side: they train together, and share services that answer all of them alike."""

    company: Company = field(default_factory=Company)
    services: dict[str, tuple[Service, nn.Module]] = field(default_factory=dict)


@dataclass(frozen=True)
class Desk:
    """Where a stage is worked on: the store it reads, the folder it fills, its journal, its device, the data folder; and
    the crew if it is not worked on alone."""

    store: Store
    out: Path
    journal: Journal
    device: str
    data_folder: Path
    crew: Crew | None = None


def run_stage(kind: str, spec: Spec, desk: Desk) -> Numbers:
    """Do the stage: fill `desk.out` and return its metrics. Raises what the method raises."""
    return STAGES[kind](spec, desk)


def _data(spec: Spec, desk: Desk) -> Numbers:
    """Decode a data set into tensors, once."""
    dataset: Dataset = _method("dataset", spec["dataset"])
    images = dataset.load(desk.data_folder)
    tensors: dict[str, Tensor] = {}
    for name in SPLITS:
        split: Split = getattr(images, name)
        tensors |= {f"{name}.x": split.x, f"{name}.y": split.y}
    tensors["classes"] = torch.tensor(images.train.classes)
    save_tensors(tensors, desk.out / TENSORS)
    sizes: Numbers = {name: len(getattr(images, name)) for name in SPLITS}
    return {"classes": images.train.classes, **sizes}


def _train(spec: Spec, desk: Desk) -> Numbers:
    """Train the victim on hard labels."""
    data = images_of(spec["data"]["key"], desk).train
    workshop = Workshop.of(spec, desk, data, "victim")
    ctx = _context(spec, desk, data, workshop)
    victim = ctx.new_student()
    fit(victim, nn.functional.cross_entropy, ctx.data.x, ctx.data.y, ctx)
    workshop.save(desk, victim, "training of the victim")
    return desk.journal.numbers


def _harden(spec: Spec, desk: Desk) -> Numbers:
    """Let a defense make of the victim the model to deploy."""
    data = images_of(spec["data"]["key"], desk).train
    defense: Defense = _method("defense", spec["defense"])
    workshop = Workshop.of(spec, desk, data, "harden")
    hardened = defense.harden(workshop.load(desk, spec["victim"]), _context(spec, desk, data, workshop))
    workshop.save(desk, hardened, f"harden of the defense '{spec['defense']['method']}'")
    return desk.journal.numbers


def _equip(spec: Spec, desk: Desk) -> Numbers:
    """Let a defense make the network that its service needs beside the model."""
    data = images_of(spec["data"]["key"], desk).train
    defense: Defense = _method("defense", spec["defense"])
    workshop = Workshop.of(spec, desk, data, "equip")
    whose = f"companion of the defense '{spec['defense']['method']}'"
    companion = defense.companion(workshop.load(desk, spec["victim"]), _context(spec, desk, data, workshop, "equip"))
    if companion is None:
        raise KdbenchError(f"The {whose} must return a network, or not be overridden.")
    workshop.save(desk, companion, whose)
    return desk.journal.numbers


def _steal(spec: Spec, desk: Desk) -> Numbers:
    """Let an attack make a student, through the oracle and nothing else."""
    images = images_of(spec["data"]["key"], desk)
    attack: Attack = _method("attack", spec["attack"])
    threat = build(ThreatModel, spec["threat"], "threat")
    loot = _loot(images.train, threat, build(Owned, spec["owned"], "owned"), spec["seed"])
    workshop = Workshop.of(spec, desk, loot, "student")
    ctx = replace(_context(spec, desk, loot, workshop), public=_publics(spec, desk, loot.shape))
    service, model = open_service(spec, desk, images.train, "attacker")
    oracle = Oracle(service, threat, model, desk.journal.meter)
    student = attack.steal(oracle, ctx)
    workshop.save(desk, student, f"steal of the attack '{spec['attack']['method']}'")
    return {**desk.journal.numbers, "queries": oracle.answered}


def _score(spec: Spec, desk: Desk) -> Numbers:
    """Judge a victim, or a student and how it stands to the victim. The thief never touched the service opened here."""
    images = images_of(spec["data"]["key"], desk)
    evasion = build(Evasion, spec["evasion"], "robustness")
    seed = derive(spec["seed"], "referee")
    service, model = open_service(spec, desk, images.train, "public")
    if spec["student"] is None:
        return judge_victim(model, service, images, evasion, seed)
    student = Workshop.of(spec["student"], desk, images.train, "student").load(desk, spec["student"]["key"])
    numbers = judge_student(student, images, evasion, seed)
    return numbers if spec["victim"] is None else {**numbers, **compare(student, service, images, evasion, seed)}


STAGES: Mapping[str, Callable[[Spec, Desk], Numbers]] = {
    "data": _data,
    "train": _train,
    "harden": _harden,
    "equip": _equip,
    "steal": _steal,
    "score": _score,
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
class Workshop:
    """Makes networks for one side: of its own architecture or a named one, standardising as its images suggest."""

    own: str
    data: Split
    seed: int
    role: str
    device: str
    made: int = 0

    @classmethod
    def of(cls, spec: Spec, desk: Desk, data: Split, role: str) -> "Workshop":
        """The workshop of the side whose network and seed are in `spec`."""
        return cls(spec["network"]["name"], data, spec["seed"], role, desk.device)

    def __call__(self, name: str | None = None) -> nn.Module:
        """A fresh network; its weights depend on the seed, the role and how many were made before, on no other draw."""
        with seeded(derive(self.seed, self.role, name or self.own, self.made)):
            network = self._build(name or self.own)
        self.made += 1
        return network.to(self.device)

    def load(self, desk: Desk, key: str) -> nn.Module:
        """The network of this side's architecture whose weights the stage `key` left."""
        return load_weights(self._build(self.own), desk.store.path(key) / WEIGHTS).to(self.device)

    def save(self, desk: Desk, network: nn.Module, whose: str) -> None:
        """Keep the result of a method. Raises `KdbenchError` unless it is of this side's architecture."""
        expected = {name: value.shape for name, value in self._build(self.own).state_dict().items()}
        if {name: value.shape for name, value in network.state_dict().items()} != expected:
            raise KdbenchError(
                f"The {whose} must return a network of its side's architecture '{self.own}', as ctx.new_student() does."
            )
        images = self.data.x[:FEW] if len(self.data) else torch.zeros(FEW, *self.data.shape, device=self.device)
        if not infer(network, images).isfinite().all():
            raise KdbenchError(f"The {whose} returned a network whose answers are not finite: its training diverged.")
        save_weights(network, desk.out / WEIGHTS)

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


def _context(spec: Spec, desk: Desk, data: Split, networks: NewStudent, role: str = "method") -> Context:
    """What a method gets; its generator goes on where it was when the stage is resumed."""
    seed = derive(spec["seed"], role)
    generator = torch.Generator(desk.device).manual_seed(seed)
    desk.journal.generators.append(generator)
    recipe = build(Recipe, spec["recipe"], "recipe")
    numerics, company = spec["numerics"], desk.crew.company if desk.crew else None
    return Context(
        data,
        recipe,
        desk.device,
        seed,
        networks,
        generator,
        desk.journal,
        numerics["precision"],
        numerics["compile"],
        company,
    )


def open_service(spec: Spec, desk: Desk, data: Split, client: str) -> tuple[Service, nn.Module]:
    """The service of a hardened victim for one client, and the model behind it. Without a victim: nothing to ask."""
    victim = spec["victim"]
    if victim is None:
        return nn.Identity(), nn.Identity()
    workshop = Workshop.of(victim, desk, data, "service")
    model = workshop.load(desk, victim["key"]).requires_grad_(False)
    ctx = _context({**victim, "numerics": spec["numerics"]}, desk, data, workshop, f"service/{client}")
    if victim["companion"]:
        ctx = replace(ctx, companion=workshop.load(desk, victim["companion"]).eval().requires_grad_(False))
    defense: Defense = _method("defense", victim["defense"]) if victim["defense"] else Truthful()
    desk.journal.resumable &= not defense.stateful  # what such a service remembers is in no checkpoint
    if desk.crew is None or defense.stateful:
        return defense.serve(model, ctx), model
    name = json_digest({"victim": victim, "client": client})
    if name not in desk.crew.services:
        desk.crew.services[name] = Echo(defense.serve(model, ctx)), model
    return desk.crew.services[name]


@dataclass(frozen=True)
class Truthful(Defense):
    """What serves where no defense does: the victim's own answers, as fast as they can be had."""

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        """Log-softmax of the logits."""
        ask = frozen(model, ctx)
        return lambda x: ask(x).log_softmax(dim=1)


class Echo:
    """A service that remembers its last answer: those who train together often ask the same, one after another."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asked, self._answer = torch.empty(0), torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """What the service says of images `x`."""
        if not (self._asked.device == x.device and torch.equal(self._asked, x)):
            self._asked, self._answer = x, self._service(x)
        return self._answer


def _loot(data: Split, threat: ThreatModel, used: Owned, seed: int) -> Split:
    """The part of the training data that the thief owns and this attack uses."""
    owned = Owned(threat.data, derive(seed, "data")).of(data)
    part = used.of(owned)
    return part if threat.labels else part.without_labels()


def images_of(key: str, desk: Desk) -> Images:
    """The data set that the stage `key` decoded, on the device."""
    tensors = load_tensors(desk.store.path(key) / TENSORS)
    classes = int(tensors["classes"])
    splits = (Split(tensors[f"{name}.x"], tensors[f"{name}.y"], classes).to(desk.device) for name in SPLITS)
    return Images(*splits)


def _publics(spec: Spec, desk: Desk, shape: tuple[int, int, int]) -> Callable[[str], Tensor]:
    """Gives the public data sets of a theft by name, in the shape of the victim's images."""

    def public(name: str) -> Tensor:
        if name not in spec["publics"]:
            return no_public(name)
        return fitted(images_of(spec["publics"][name]["key"], desk).train.x, shape)

    return public


def _method(kind: str, spec: Spec) -> Any:
    return build(registry.load(kind, spec["method"]), spec["fields"], f"{kind}.{spec['method']}")
