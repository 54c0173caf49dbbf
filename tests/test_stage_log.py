"""The stage log: what a stage writes down, and what a resumed one gets back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdbench.engine import stage_log
from kdbench.engine.manifest import Throughput
from kdbench.engine.stage_log import CHECKPOINT_SECONDS, PROGRESS_SECONDS, StageLog, Stopped
from kdbench.engine.tensors import load_state, load_tensors
from kdbench.errors import KdbenchError
from runs import Clock, Json


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(stage_log, "time", made)
    return made


def stage_logs(folder: Path) -> Callable[[], StageLog]:
    """Makes the logs of one attempt after another at one stage."""
    for name in ("out", "work"):
        (folder / name).mkdir()
    return lambda: StageLog(folder / "out", folder / "work")


def test_a_checkpoint_puts_back_numbers_generators_and_the_query_count(tmp_path: Path) -> None:
    new = stage_logs(tmp_path)
    log = new()
    log.generators += [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)]
    log("loss", 0.25)
    torch.rand(3, generator=log.generators[1])
    log.query_counter.answered = 77
    log.checkpoint("student/3").save({"epochs": 4, "w": torch.arange(3)})
    expected = [torch.rand(5, generator=generator) for generator in log.generators]

    again = new()
    again.generators += [torch.Generator(), torch.Generator()]
    state = again.checkpoint("student/3").load()
    assert state["epochs"] == 4
    assert state["w"].tolist() == [0, 1, 2]
    assert again.numbers == {"loss": 0.25}
    assert again.query_counter.answered == 77
    assert all(torch.equal(torch.rand(5, generator=g), x) for g, x in zip(again.generators, expected, strict=True))


def test_without_a_checkpoint_nothing_is_put_back(tmp_path: Path) -> None:
    log = stage_logs(tmp_path)()
    log.query_counter.answered = 5
    log.generators.append(torch.Generator().manual_seed(3))
    assert log.checkpoint("student/3").load() is None
    assert log.query_counter.answered == 5
    assert torch.equal(
        torch.rand(2, generator=log.generators[0]), torch.rand(2, generator=torch.Generator().manual_seed(3))
    )


def test_checkpoints_are_kept_apart_by_name(tmp_path: Path) -> None:
    new, names = stage_logs(tmp_path), ("student/1", "student/2", "student", "images")
    log = new()
    for name in names:
        log.checkpoint(name).save({"name": name})
    again = new()
    assert [again.checkpoint(name).load()["name"] for name in reversed(names)] == list(reversed(names))
    assert again.checkpoint("student/3").load() is None


def test_two_checkpoints_of_one_name_are_an_error(tmp_path: Path) -> None:
    log = stage_logs(tmp_path)()
    log.checkpoint("student/3")
    log.checkpoint("student/4")
    with pytest.raises(KdbenchError, match="Two checkpoints of one stage are named 'student/3'"):
        log.checkpoint("student/3")


@pytest.mark.parametrize("name", ["", "/", "..", "../x", "a//b", "/a", "a/", "a.b", ".a", "a b", "a\\b", "ä", "a\n"])
def test_a_name_that_is_no_safe_file_name_is_refused(tmp_path: Path, name: str) -> None:
    log = stage_logs(tmp_path)()
    with pytest.raises(KdbenchError, match="cannot name a checkpoint"):
        log.checkpoint(name)
    with pytest.raises(KdbenchError, match="cannot name a checkpoint"):
        log.images(name, torch.rand(1, 1, 8, 8))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_fits_without_a_name_are_numbered_in_their_order(tmp_path: Path) -> None:
    new = stage_logs(tmp_path)
    log = new()
    assert [log.next_fit() for _ in range(2)] == ["fit/1", "fit/2"]
    assert new().next_fit() == "fit/1"


def test_a_damaged_checkpoint_only_costs_the_work(tmp_path: Path) -> None:
    new = stage_logs(tmp_path)
    new().checkpoint("student/3").save({"epochs": 1})
    (tmp_path / "work" / "student.3.safetensors").write_bytes(b"torn")
    assert new().checkpoint("student/3").load() is None


def test_a_checkpoint_is_due_when_the_interval_has_passed_since_the_last(tmp_path: Path, clock: Clock) -> None:
    log = stage_logs(tmp_path)()
    assert not log.due()
    clock.now += CHECKPOINT_SECONDS - 0.1
    assert not log.due()
    clock.now += 0.2
    assert log.due()
    log.checkpoint("student/3").save({})
    assert not log.due()
    clock.now += CHECKPOINT_SECONDS
    assert log.due()


def test_a_stage_that_is_asked_to_stop_saves_first_and_then_stops(tmp_path: Path, clock: Clock) -> None:
    log = stage_logs(tmp_path)()
    log.stop = True
    log.progress(0.5, "there is something to save")
    assert log.due()
    with pytest.raises(Stopped):
        log.checkpoint("student/3").save({"epochs": 2})
    assert load_state(tmp_path / "work" / "student.3.safetensors")["state"] == {"epochs": 2}


def test_no_method_can_swallow_the_stop() -> None:
    assert not issubclass(Stopped, Exception)


def test_what_cannot_be_resumed_is_never_saved_and_stops_at_once(tmp_path: Path, clock: Clock) -> None:
    new = stage_logs(tmp_path)
    new().checkpoint("student/3").save({"epochs": 1})
    log = new()
    log.resumable = False
    clock.now += 10 * CHECKPOINT_SECONDS
    assert not log.due()
    assert log.checkpoint("student/3").load() is None
    log.progress(0.1, "")
    log.stop = True
    assert not log.due()
    with pytest.raises(Stopped):
        log.progress(0.2, "")


def test_progress_is_told_at_most_twice_a_second(tmp_path: Path, clock: Clock) -> None:
    log = stage_logs(tmp_path)()
    path = tmp_path / "work" / "progress.json"
    told: list[Json] = []
    for step in range(1, 101):
        clock.now += 0.04
        log.progress(step / 100, f"step {step}")
        if path.exists() and (not told or told[-1] != json.loads(path.read_text())):
            told.append(json.loads(path.read_text()))
    assert 100 * 0.04 * 0.5 / PROGRESS_SECONDS <= len(told) <= 100 * 0.04 / PROGRESS_SECONDS
    assert told[-1]["text"] == f"step {round(told[-1]['share'] * 100)}"


def test_the_throughput_of_a_stage_is_that_of_all_its_trainings(tmp_path: Path) -> None:
    log = stage_logs(tmp_path)()
    log.timed(100, 2.0, None)
    assert log.throughput == Throughput(100, 2.0, 0.0, None)
    log.timed(300, 4.0, 100.0)
    log.timed(600, 5.0, 150.0)
    assert log.throughput == Throughput(1000, 11.0, 9.0, 3.0 + 4.0)


def test_a_resumed_stage_counts_what_its_own_attempt_did(tmp_path: Path) -> None:
    new = stage_logs(tmp_path)
    log = new()
    log.timed(100, 2.0, 60.0)
    log.checkpoint("student/3").save({})
    again = new()
    again.checkpoint("student/3").load()
    again.timed(40, 1.0, None)
    assert again.throughput == Throughput(40, 1.0, 0.0, None)


def test_pictures_are_kept_and_listed_and_small_ones_enlarged(tmp_path: Path) -> None:
    from PIL import Image

    log = stage_logs(tmp_path)()
    images, labels = torch.rand(9, 1, 8, 8), torch.arange(9)
    log.images("inverted", images, labels)
    assert log.pictures == ["inverted.png"]
    with Image.open(tmp_path / "out" / "inverted.png") as picture:
        assert min(picture.size) > 3 * 64
    kept = load_tensors(tmp_path / "out" / "inverted.safetensors")
    assert torch.equal(kept["images"], images)
    assert torch.equal(kept["labels"], labels)


def test_images_without_labels_are_kept_without(tmp_path: Path) -> None:
    log = stage_logs(tmp_path)()
    log.images("queries", torch.rand(4, 3, 80, 80))
    assert set(load_tensors(tmp_path / "out" / "queries.safetensors")) == {"images"}
