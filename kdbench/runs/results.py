"""A results folder, as Python sees it: its records, and what is computed from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdbench import records
from kdbench.records import Cell
from kdbench.runs import prediction_file

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Results:
    """The cells of a results folder, in the order of their names."""

    folder: Path
    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, folder: Path) -> "Results":
        """The results in `folder`. Raises `KdbenchError` when there are none, or a record is damaged."""
        return cls(folder, tuple(records.read(folder)))

    def frame(self) -> "pd.DataFrame":
        """A row a cell: who met whom, how it ended, and all metrics and numbers (NaN: not measured)."""
        import pandas as pd

        return pd.DataFrame([_row(cell) for cell in self.cells])

    def recomputed(self) -> dict[str, dict[str, float]]:
        """student_acc, victim_acc and fidelity by the name of the cell, from the kept predictions alone.

        Raises `KdbenchError` when the folder has none: those of the old layout have not.
        """
        return prediction_file.recompute(self.cells, self.folder)


def _row(cell: Cell) -> dict[str, str | int | float | bool | None]:
    defense = cell.defense
    return {
        "suite": cell.suite,
        "dataset": cell.dataset,
        "victim": cell.victim,
        "student": cell.student,
        "defense": defense.name if defense else None,
        "attack": cell.attack.name,
        "adaptive": cell.attack.adaptive,
        "scenario": cell.scenario.name,
        "fraction": cell.subset.fraction,
        "seed": cell.seed,
        "status": cell.status.value,
        "reason": cell.reason,
        **cell.metrics,
        **cell.numbers,
    }
