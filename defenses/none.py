"""No defense: the victim as it was trained, answering with its log-probabilities. The yardstick of all others."""

from dataclasses import dataclass

from kdbench.api import Defense


@dataclass(frozen=True)
class NoDefense(Defense):
    """Deploys the victim and answers truthfully."""
