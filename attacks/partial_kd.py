"""Knowledge distillation with part of the data, as in the ablation of the Nasty Teacher (Ma et al., ICLR 2021)."""

from dataclasses import dataclass

from kdbench.api import DataSubset, Fraction, Whole

from .kd import KD


@dataclass(frozen=True)
class PartialKD(KD):
    """Runs KD with a class-balanced `fraction` of the attacker's images, drawn with `subset_seed`.

    The paper goes from 10 to 90 %. Departure: its loader draws without regard to classes. Here the subset is balanced, also
    for an attacker without labels.
    """

    fraction: Fraction = 0.1
    subset_seed: Whole = 0

    def data_subset(self) -> DataSubset:
        return DataSubset(self.fraction, self.subset_seed)
