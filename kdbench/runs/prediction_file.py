"""predictions.safetensors of a results folder: the labels that every student and victim gave to the test images.

Accuracy and fidelity are functions of them, so that every such number on a board can be recomputed, without a store.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from kdbench.atomic import replacing
from kdbench.errors import KdbenchError
from kdbench.records import Cell

FILE = "predictions.safetensors"
TEST = "test"
TRUTH = f"truth/{TEST}"
_TYPES: Mapping[str, type[np.unsignedinteger] | type[np.signedinteger]] = {
    "U8": np.uint8,
    "I16": np.int16,
    "I32": np.int32,
}
Labels = NDArray[np.integer]


def student_name(cell: str) -> str:
    """The name of the predictions of a cell's student."""
    return f"{cell}/{TEST}"


def victim_name(defense: str, seed: int) -> str:
    """The name of the predictions of the victim behind a defense, as served."""
    return f"victim/{defense}/{seed}"


def write(truth: Labels, classes: int, names: Sequence[str], file_of: Callable[[str], Path], folder: Path) -> Path:
    """Write the true test labels (N,) and those of `names`, one after another: only one of them is in memory.

    file_of: the file that a stage left, by the name of its test predictions in this folder.
    """
    code = _smallest(classes)
    with replacing(folder / FILE) as file:
        file.write(_header([TRUTH, *names], len(truth), code))
        file.write(_packed(truth, code))
        for name in names:
            labels = read(file_of(name), TEST)
            assert len(labels) == len(truth), f"{name} has {len(labels)} predictions for {len(truth)} test images"
            file.write(_packed(labels, code))
    return folder / FILE


def _smallest(classes: int) -> str:
    """The safetensors name of the smallest integer type that holds every label."""
    return next(code for code, kind in _TYPES.items() if classes - 1 <= np.iinfo(kind).max)


def _packed(labels: Labels, code: str) -> bytes:
    return labels.astype(np.dtype(_TYPES[code]).newbyteorder("<")).tobytes()


def _header(names: Iterable[str], count: int, code: str) -> bytes:
    """The head of a safetensors file of equally long vectors: its length, then JSON, filled up to 8 bytes."""
    size = count * np.dtype(_TYPES[code]).itemsize
    text = bytearray(b"{")
    for number, name in enumerate(names):  # piece by piece: a long run has many
        entry = {"dtype": code, "shape": [count], "data_offsets": [number * size, (number + 1) * size]}
        text += f"{',' if number else ''}{json.dumps(name)}:{json.dumps(entry)}".encode()
    text += b"}"
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read(path: Path, name: str) -> Labels:
    """The labels (N,) of that name in a safetensors file."""
    with safe_open(path, framework="numpy") as file:
        labels: Labels = file.get_tensor(name)
    return labels


def recompute(cells: Iterable[Cell], folder: Path) -> dict[str, dict[str, float]]:
    """student_acc, victim_acc and fidelity of each scored cell by name, from the predictions in `folder` alone.

    A cell without predictions is left out. Raises `KdbenchError` when the folder has no predictions.
    """
    if not (folder / FILE).is_file():
        raise KdbenchError(f"{folder} has no {FILE}: it was written before predictions were kept.")
    with safe_open(folder / FILE, framework="numpy") as file:
        names = set(file.keys())
        truth = file.get_tensor(TRUTH)
        found: dict[str, dict[str, float]] = {}
        for cell in cells:
            if student_name(cell.name) not in names:
                continue
            student = file.get_tensor(student_name(cell.name))
            found[cell.name] = {"student_acc": _share(student == truth)}
            if cell.defense:
                victim = file.get_tensor(victim_name(cell.defense.name, cell.seed))
                found[cell.name] |= {"victim_acc": _share(victim == truth), "fidelity": _share(student == victim)}
    return found


def _share(hits: NDArray[np.bool_]) -> float:
    return int(hits.sum()) / len(hits)
