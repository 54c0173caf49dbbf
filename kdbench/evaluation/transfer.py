"""Transfer: whether adversarial examples made on a student fool the served victim."""

from torch import Tensor

from kdbench.evaluation.adversarial import Robustness, pgd, robust_after
from kdbench.evaluation.network import EvaluatedNetwork
from kdbench.game.data import Split
from kdbench.game.roles import Role, derive, seeded
from kdbench.game.threat import Service


def transfer(
    student: EvaluatedNetwork, service: Service, served: Tensor, data: Split, robustness: Robustness, seed: int
) -> float:
    """The share of PGD examples made on `student` that `service` misclassifies, of images that it classifies correctly.

    served: the labels (N,) that the service gives to `data`. The value lies in [0,1]; it is 0 when the service is
    never right.
    """
    correct = data.take((served == data.y).nonzero().flatten())
    # Examples that stop where they first fool the student would transfer less.
    attack = student.attacked.in_batches(pgd(student.attacked, robustness))
    with seeded(derive(seed, Role.EVALUATION, "transfer"), str(data.x.device)):
        robust = robust_after([attack], service, correct, robustness.eps)
    return int((~robust).sum()) / len(correct) if len(correct) else 0.0
