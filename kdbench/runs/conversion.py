"""Conversion: a results folder of the old layout (cells/*.json) becomes one of the present layout, with the same numbers."""

from pathlib import Path

from kdbench import migration, records
from kdbench.errors import KdbenchError
from kdbench.runs import plan_file


def convert(folder: Path) -> int:
    """Rewrite the records and the plan in `folder`; how many cells it holds.

    Raises `KdbenchError` when there is nothing to convert, or a record is damaged: the folder then stays as it is.
    """
    if not migration.is_old(folder):
        raise KdbenchError(f"{folder} does not have the old layout: there is no {migration.FOLDER}/ to convert.")
    cells = records.read(folder)
    if not (folder / records.FILE).is_file():  # else an earlier conversion was interrupted after this
        records.write(cells, folder)
    if (folder / plan_file.FILE).is_file():
        plan = plan_file.read(folder)
        plan_file.write(plan.store, ((stage.key, stage.title) for stage in plan.stages), plan.cells, folder)
    migration.remove(folder)
    return len(cells)
