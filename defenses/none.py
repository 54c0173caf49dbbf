"""No defense: the victim as it was trained, answering with its log-probabilities. All others are compared with it."""

from dataclasses import dataclass
from typing import ClassVar

from kdbench.api import Defense


@dataclass(frozen=True)
class NoDefense(Defense):
    """Deploys the victim and answers with its log-probabilities."""

    is_reference: ClassVar[bool] = True
