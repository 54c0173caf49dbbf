"""Files that are replaced in one step."""

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

from kdbench.atomic import replacing
from kdbench.engine.json_files import read_json, write_json


def test_a_file_that_is_replaced_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with replacing(path) as file:
        file.write(b"first")
        assert not path.exists()
    with contextlib.suppress(ZeroDivisionError), replacing(path) as file:
        file.write(b"sec")
        raise ZeroDivisionError
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    """Who reads while others write finds one of the written objects, never a part of one."""
    path = tmp_path / "file.json"
    values = [{"number": number, "padding": "x" * 5000 * number} for number in range(8)]
    write_json(path, values[0])

    def write(value: dict[str, Any]) -> None:
        for _ in range(20):
            write_json(path, value)

    writers = [threading.Thread(target=write, args=(value,)) for value in values]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert read_json(path) in values
    assert os.listdir(tmp_path) == ["file.json"]
