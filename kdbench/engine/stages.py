"""What each kind of stage does: a pure function of its specification and of the finished stages that it names."""

from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor, nn

from kdbench.engine.models import ModelFactory
from kdbench.engine.specs import (
    AuxiliarySpec,
    DataSpec,
    EvaluateSpec,
    HardenSpec,
    StageSpec,
    StealSpec,
    StudentSpec,
    TrainSpec,
)
from kdbench.engine.tensors import save_tensors
from kdbench.engine.victims import Victim, open_service
from kdbench.engine.workspace import TENSORS, Participant, Workspace, load_images
from kdbench.errors import KdbenchError
from kdbench.evaluation.evaluate import Evaluation, Metrics, evaluate_against, evaluate_student, evaluate_victim
from kdbench.evaluation.predictions import predict_labels
from kdbench.game.data import Dataset, DataSubset, Images, Split, resized
from kdbench.game.methods import Attack, Defense, no_surrogate
from kdbench.game.roles import Role, derive
from kdbench.game.threat import Oracle, Scenario, Service

PREDICTIONS = "predictions.safetensors"


@singledispatch
def run_stage(spec: StageSpec, workspace: Workspace) -> Metrics:
    """Run the stage: fill `workspace.out` and its log, and return its metrics. Raises what the method raises."""
    raise TypeError(f"no kind of stage is specified by a {type(spec).__name__}")


@run_stage.register
def _data(spec: DataSpec, workspace: Workspace) -> Metrics:
    """Decode a data set into tensors, once."""
    images = spec.dataset.make("dataset", Dataset).load(workspace.data_folder)
    splits = {"train": images.train, "validation": images.validation, "test": images.test}
    tensors = {"classes": torch.tensor(images.train.classes)}
    for name, split in splits.items():
        tensors |= {f"{name}.x": split.x, f"{name}.y": split.y}
    save_tensors(tensors, workspace.out / TENSORS)
    for name, size in {"classes": images.train.classes, **{name: len(split) for name, split in splits.items()}}.items():
        workspace.stage_log(name, size)
    return {}


@run_stage.register
def _train(spec: TrainSpec, workspace: Workspace) -> Metrics:
    """Make the undefended victim."""
    owner = _owner(spec, workspace, Role.VICTIM_TRAINING)
    owner.save(spec.victim.make("victim", Victim).make(owner.context), "training of the victim")
    return {}


@run_stage.register
def _harden(spec: HardenSpec, workspace: Workspace) -> Metrics:
    """Let a defense make of the victim the model to deploy."""
    owner = _owner(spec, workspace, Role.HARDENING)
    hardened = spec.defense.make("defense", Defense).harden(owner.load(spec.victim), owner.context)
    owner.save(hardened, f"harden of the defense '{spec.defense.method}'")
    return {}


@run_stage.register
def _auxiliary(spec: AuxiliarySpec, workspace: Workspace) -> Metrics:
    """Let a defense make the network that answering needs beside the deployed model."""
    owner = _owner(spec, workspace, Role.AUXILIARY)
    origin = f"auxiliary of the defense '{spec.defense.method}'"
    auxiliary = spec.defense.make("defense", Defense).auxiliary(owner.load(spec.victim), owner.context)
    if auxiliary is None:
        raise KdbenchError(f"The {origin} must return a network, or not be overridden.")
    owner.save(auxiliary, origin)
    return {}


@run_stage.register
def _steal(spec: StealSpec, workspace: Workspace) -> Metrics:
    """Let an attack make a student, through the oracle and nothing else."""
    images = load_images(spec.run.data.key, workspace)
    data = _attacker_data(images.train, spec.attack.scenario, spec.attack.subset, spec.seed)
    attacker = Participant(workspace, Role.ATTACK, data, spec.training, spec.numerics, spec.seed)
    ctx = replace(attacker.context, surrogate=_surrogates(spec, workspace, data.shape))
    service, model = _service(spec, workspace, images.train, Role.ATTACKED_SERVICE)
    oracle = Oracle(service, spec.attack.scenario, model, workspace.stage_log.query_counter)
    student = spec.attack.attack.make("attack", Attack).steal(oracle, ctx)
    attacker.save(student, f"steal of the attack '{spec.attack.attack.method}'")
    return {"queries": oracle.answered}


@run_stage.register
def _evaluate(spec: EvaluateSpec, workspace: Workspace) -> Metrics:
    """Evaluate a victim, or a student and how it compares with the victim. No attack has queried the service opened here."""
    images = load_images(spec.run.data.key, workspace)
    if spec.student is None:
        return _evaluate_victim(spec, workspace, images)
    robustness = spec.evaluation.robustness
    student = _load_student(spec.student, workspace, images.train, spec.seed)
    evaluation = evaluate_student(student, images, robustness, spec.seed)
    metrics = _keep_predictions(evaluation, workspace)
    if spec.victim is None:
        return metrics
    service, _ = _service(spec, workspace, images.train, Role.EVALUATED_SERVICE)
    served = predict_labels(service, images.test.x)
    return metrics | evaluate_against(evaluation, service, served, images, robustness, spec.seed)


def _evaluate_victim(spec: EvaluateSpec, workspace: Workspace, images: Images) -> Metrics:
    service, model = _service(spec, workspace, images.train, Role.EVALUATED_SERVICE)
    if model is None:
        raise KdbenchError("The network of the victim is not at hand, and the evaluation of a victim needs it.")
    evaluation = evaluate_victim(model, service, images, spec.evaluation.robustness, spec.seed)
    return _keep_predictions(evaluation, workspace)


def _keep_predictions(evaluation: Evaluation, workspace: Workspace) -> Metrics:
    """The metrics of an evaluation; its predictions go to a file of the stage."""
    save_tensors(evaluation.predictions.to_tensors(), workspace.out / PREDICTIONS)
    return evaluation.metrics


def _owner(spec: TrainSpec | HardenSpec, workspace: Workspace, role: Role) -> Participant:
    """The victim's owner in one of its roles, with all training images."""
    data = load_images(spec.run.data.key, workspace).train
    return Participant(workspace, role, data, spec.training, spec.numerics, spec.seed)


def _load_student(spec: StudentSpec, workspace: Workspace, data: Split, seed: int) -> nn.Module:
    factory = ModelFactory(spec.network.name, data, seed, Role.STUDENT_WEIGHTS, workspace.device)
    return factory.load(workspace.store.path(spec.key))


def _service(
    spec: StealSpec | EvaluateSpec, workspace: Workspace, data: Split, role: Role
) -> tuple[Service, nn.Module | None]:
    """The service of the victim and its network; without a victim there is nothing to query."""
    if spec.victim is None:
        return nn.Identity(), None
    return open_service(spec.victim, spec.numerics, workspace, data, role)


def _attacker_data(data: Split, scenario: Scenario, used: DataSubset, seed: int) -> Split:
    """The subset of the training data that the attacker has and this attack uses."""
    subset = used.of(DataSubset(scenario.data, derive(seed, Role.DATA_SUBSET)).of(data))
    return subset if scenario.labels else subset.without_labels()


def _surrogates(spec: StealSpec, workspace: Workspace, shape: tuple[int, int, int]) -> Callable[[str], Tensor]:
    """Gives the surrogate data sets of an attack by name, in the shape of the victim's images."""
    keys = {surrogate.name: surrogate.data.key for surrogate in spec.attack.surrogates}

    def surrogate(name: str) -> Tensor:
        if name not in keys:
            return no_surrogate(name)
        return resized(load_images(keys[name], workspace).train.x, shape)

    return surrogate
