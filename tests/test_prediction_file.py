"""The kept predictions of a results folder, and what is computed from them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_records import CELL

from kdbench.errors import KdbenchError
from kdbench.runs import prediction_file


@pytest.mark.parametrize(("classes", "kind"), [(2, np.uint8), (256, np.uint8), (257, np.int16), (40_000, np.int32)])
def test_labels_are_kept_in_the_smallest_type_and_read_by_safetensors(classes: int, kind: type, tmp_path: Path) -> None:
    truth = np.array([0, classes - 1, 1])
    save_file({"test": truth[::-1].copy(), "validation": np.array([0])}, tmp_path / "stage.safetensors")
    path = prediction_file.write(truth, classes, ["a--b/test"], lambda _: tmp_path / "stage.safetensors", tmp_path)
    found = load_file(path)
    assert found.keys() == {"truth/test", "a--b/test"}
    assert {labels.dtype for labels in found.values()} == {np.dtype(kind)}
    assert found["truth/test"].tolist() == truth.tolist()
    assert found["a--b/test"].tolist() == truth[::-1].tolist()


def test_accuracies_and_fidelity_are_shares_of_the_test_images(tmp_path: Path) -> None:
    labels = {"student": [0, 1, 1, 1], "victim": [0, 1, 1, 2]}
    for name, predicted in labels.items():
        save_file({"test": np.array(predicted)}, tmp_path / f"{name}.safetensors")
    names = prediction_file.student_name(CELL.name), prediction_file.victim_name("mine", 0)
    files = {names[0]: tmp_path / "student.safetensors", names[1]: tmp_path / "victim.safetensors"}
    prediction_file.write(np.array([0, 1, 2, 0]), 3, list(files), lambda name: files[name], tmp_path)
    found = prediction_file.recompute([CELL, replace(CELL, seed=7)], tmp_path)
    assert found == {CELL.name: {"student_acc": 0.5, "victim_acc": 0.5, "fidelity": 0.75}}


def test_a_folder_of_before_predictions_were_kept_says_so(tmp_path: Path) -> None:
    with pytest.raises(KdbenchError, match=r"has no predictions\.safetensors: it was written before"):
        prediction_file.recompute([CELL], tmp_path)
