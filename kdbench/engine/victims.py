"""Kinds of victims, registered like methods; and how the service of a victim behind a defense is opened for a role."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.engine.numerics import Numerics
from kdbench.engine.parts import VictimSpec
from kdbench.engine.workspace import Participant, Workspace
from kdbench.game.data import Split
from kdbench.game.fields import Checked
from kdbench.game.methods import Context, Defense
from kdbench.game.roles import Role
from kdbench.game.threat import Service
from kdbench.training.fit import fit

Opened = tuple[Service, nn.Module | None]


@dataclass(frozen=True)
class Victim(Checked):
    """Subclass = frozen dataclass, registered as a kind of victim; its fields say where the victim comes from.

    A victim whose network is at hand overrides `make`, one that answers elsewhere overrides `open`.
    """

    has_model: ClassVar[bool] = True
    """Whether its network is at hand. Without one, what needs the network (hardening, white-box metrics) is skipped."""

    def make(self, ctx: Context) -> nn.Module:
        """The undefended network, made once for a seed and cached."""
        raise NotImplementedError

    def open(self, model: nn.Module | None, defense: Defense, ctx: Context) -> Opened:
        """The service behind `defense` for one client, and the network that answers; None where it is not at hand.

        model: the deployed network, in eval mode and frozen; None for a victim without one.
        """
        assert model is not None, "a victim without a network says how to reach it: it overrides open"
        return defense.serve(model, ctx), model


@dataclass(frozen=True)
class Trained(Victim):
    """Trained here on hard labels, from the initial weights of the seed."""

    def make(self, ctx: Context) -> nn.Module:
        """Cross-entropy on all images of the owner."""
        victim = ctx.new_student()
        fit(victim, nn.functional.cross_entropy, ctx.data.x, ctx.data.y, ctx)
        return victim


class LastAnswerCache:
    """A service that keeps its last answer: stages that train together often ask the same, one after another."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asked, self._answer = torch.empty(0), torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """The service's answer (N,K) to images `x` (N,C,H,W)."""
        if not (self._asked.device == x.device and torch.equal(self._asked, x)):
            self._asked, self._answer = x, self._service(x)
        return self._answer


def open_service(spec: VictimSpec, numerics: Numerics, workspace: Workspace, data: Split, role: Role) -> Opened:
    """The service of a victim behind its defense, and the deployed network; data: the owner's images.

    role: who asks, so that no question of the attacker changes the answers that are measured.
    """
    server = Participant(workspace, role, data, spec.training, numerics, spec.seed)
    # Made here, also where a service is shared: checkpoints hold the same generators whichever stage opened it.
    ctx = server.context
    defense = spec.defense.make("defense", Defense) if spec.defense else Defense()
    workspace.stage_log.resumable &= not defense.stateful  # what such a service remembers is in no checkpoint
    if workspace.fused_stages is None or defense.stateful:
        return _open(spec, defense, server, ctx)
    services = workspace.fused_stages.services
    if (spec.digest, role) not in services:
        service, model = _open(spec, defense, server, ctx)
        services[spec.digest, role] = LastAnswerCache(service), model
    return services[spec.digest, role]


def _open(spec: VictimSpec, defense: Defense, server: Participant, ctx: Context) -> Opened:
    victim = spec.victim.make("victim", Victim)
    model = server.load(spec.key).requires_grad_(False) if victim.has_model else None
    if spec.auxiliary:
        ctx = replace(ctx, auxiliary=server.load(spec.auxiliary).eval().requires_grad_(False))
    return victim.open(model, defense, ctx)
