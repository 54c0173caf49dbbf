"""The store: finished stages appear whole or not at all."""

import hashlib
import os
import secrets
import threading
import time
from pathlib import Path

import pytest
from threads import at_once

from kdbench.engine import store as stores
from kdbench.engine.digests import file_digest
from kdbench.engine.json_files import write_json
from kdbench.engine.manifest import PROGRESS, Failure, Manifest, Progress, Throughput
from kdbench.engine.store import KINDS, MANIFEST, Store, collect_garbage
from kdbench.errors import KdbenchError

KEY = "train/0123456789abcdef"
OTHER = "evaluate/0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def built(store: Store, key: str = KEY, **files: str) -> Path:
    """A folder with `files` (weights.txt by default), ready to be published."""
    folder = store.scratch(key)
    for name, text in (files or {"weights": "w"}).items():
        (folder / f"{name}.txt").write_text(text)
    return folder


# Publishing


def test_a_published_stage_is_in_place_with_what_was_built(store: Store) -> None:
    assert (
        store.publish(KEY, built(store, weights="w", notes="n"), Manifest("train", metrics={"victim_acc": 0.5})) is True
    )
    assert store.has(KEY)
    assert store.finished() == {KEY}
    assert store.manifest(KEY).metrics == {"victim_acc": 0.5}
    assert store.manifest(KEY).key == KEY
    assert (store.path(KEY) / "weights.txt").read_text() == "w"
    assert os.listdir(store.root / "tmp") == []


def test_a_manifest_lists_the_sha256_of_each_file_and_of_no_other(store: Store) -> None:
    store.publish(KEY, built(store, weights="abc", notes=""), Manifest("train"))
    folder = store.path(KEY)
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != MANIFEST}
    assert store.manifest(KEY).files == found
    assert set(found) == {"weights.txt", "notes.txt"}
    assert found["weights.txt"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_second_publisher_discards_its_own_and_is_told(store: Store) -> None:
    store.publish(KEY, built(store, weights="first"), Manifest("train", "first"))
    second = built(store, weights="second", extra="x")
    assert store.publish(KEY, second, Manifest("train", "second")) is False
    assert not second.exists()
    assert store.manifest(KEY).title == "first"
    assert (store.path(KEY) / "weights.txt").read_text() == "first"
    assert not (store.path(KEY) / "extra.txt").exists()


def test_of_many_who_publish_at_once_exactly_one_is_first(store: Store) -> None:
    for attempt in range(20):
        key = f"steal/{attempt}"
        folders = [built(store, key, weights=str(number)) for number in range(6)]

        def publish(number: int, key: str = key, folders: list[Path] = folders) -> bool:
            return store.publish(key, folders[number], Manifest("steal", str(number)))

        wins = at_once(6, publish)
        assert sum(wins) == 1
        assert store.manifest(key).title == str(wins.index(True))
        assert (store.path(key) / "weights.txt").read_text() == str(wins.index(True))
    assert os.listdir(store.root / "tmp") == []


def test_a_stage_that_is_seen_is_whole(store: Store) -> None:
    """A reader who lists all the time finds every listed stage complete, down to the digests."""
    done = threading.Event()
    broken: list[str] = []
    seen: set[str] = set()

    def look() -> None:
        for key in store.finished() - seen:
            seen.add(key)
            files = store.manifest(key).files
            if {name: file_digest(store.path(key) / name) for name in files} != files or len(files) != 5:
                broken.append(key)

    def read() -> None:
        while not done.is_set():
            look()
        look()

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        key = f"harden/{number}"
        store.publish(
            key, built(store, key, **{f"file{i}": secrets.token_hex(2000) for i in range(5)}), Manifest("train")
        )
    done.set()
    reader.join()
    assert len(seen) == 60
    assert broken == []


def test_a_half_built_folder_is_never_seen(store: Store) -> None:
    folder = built(store, weights="half")
    write_json(folder / MANIFEST, {"key": KEY})
    assert store.finished() == set()
    assert not store.has(KEY)


@pytest.mark.parametrize("step", ["file_digest", "write_json", "_fsync"])
def test_a_publisher_that_dies_at_any_step_before_the_rename_leaves_nothing_visible(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    folder = built(store)
    with monkeypatch.context() as patch:
        patch.setattr(stores, step, die)
        with pytest.raises(KeyboardInterrupt):
            store.publish(KEY, folder, Manifest("train"))
    assert store.finished() == set()
    assert store.publish(KEY, built(store), Manifest("train")) is True


def test_everything_is_on_disk_before_the_name_appears(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(stores, "_fsync", lambda path: order.append(f"{path.name} {store.has(KEY)}"))
    folder = built(store, a="1", b="2")
    store.publish(KEY, folder, Manifest("train"))
    assert set(order[:3]) == {"a.txt False", "b.txt False", f"{MANIFEST} False"}
    assert order[3:] == [f"{folder.name} False", "train True"]


def test_a_rename_whose_reply_was_lost_is_still_ours(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def lossy(path: Path, target: Path) -> Path:
        rename(path, target)
        raise OSError("the server did not answer")

    monkeypatch.setattr(Path, "rename", lossy)
    assert store.publish(KEY, built(store), Manifest("train")) is True
    assert (store.path(KEY) / "weights.txt").read_text() == "w"


def test_a_rename_that_fails_for_another_reason_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise OSError("no space left on device")

    folder = built(store)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        store.publish(KEY, folder, Manifest("train"))
    assert not store.has(KEY)


def test_scratch_folders_of_one_key_do_not_meet(store: Store) -> None:
    assert len({store.scratch(KEY) for _ in range(50)}) == 50


def test_a_discarded_stage_is_gone_and_can_be_published_again(store: Store) -> None:
    store.publish(KEY, built(store, weights="old"), Manifest("train"))
    store.publish(OTHER, built(store, OTHER), Manifest("train"))
    store.discard(KEY)
    assert store.finished() == {OTHER}
    assert not store.path(KEY).exists()
    assert os.listdir(store.root / "tmp") == []
    assert store.publish(KEY, built(store, weights="new"), Manifest("train")) is True
    assert (store.path(KEY) / "weights.txt").read_text() == "new"


def test_discarding_what_is_not_there_is_nothing(store: Store) -> None:
    store.discard(KEY)
    assert store.finished() == set()


def test_a_store_opened_again_has_what_it_had(store: Store) -> None:
    store.publish(
        KEY,
        built(store),
        Manifest(
            "train",
            "a title",
            {"seed": 1},
            {"victim_acc": 0.5},
            {"loss": 1.0},
            ("x.png",),
            1.5,
            Throughput(9, 1.0, 1.0, 0.5),
        ),
    )
    again = Store(store.root)
    assert again.finished() == {KEY}
    assert again.manifest(KEY) == store.manifest(KEY)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_store_in_an_unusable_place_is_a_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KdbenchError, match=r"The store .*file.* cannot be used: .+\. Choose another with --store\."):
        Store(tmp_path / place)


def test_a_damaged_manifest_is_a_sentence(store: Store) -> None:
    store.publish(KEY, built(store), Manifest("train"))
    (store.path(KEY) / MANIFEST).write_text('{"kind": "train", "seconds": "long"}')
    with pytest.raises(KdbenchError, match="The manifest of a stage cannot be read"):
        store.manifest(KEY)


# Failures, specifications, progress


def test_a_failure_is_kept_until_it_is_cleared(store: Store) -> None:
    assert store.failure(KEY) is None
    store.fail(KEY, Failure("first", "t"))
    store.fail(KEY, Failure("second", "t"))
    assert store.failure(KEY) == Failure("second", "t")
    assert store.failure(OTHER) is None
    store.clear_failure(KEY)
    store.clear_failure(KEY)
    assert store.failure(KEY) is None


def test_a_failed_stage_is_not_published(store: Store) -> None:
    store.fail(KEY, Failure("r"))
    assert store.finished() == set()


def test_a_failure_that_is_cleared_while_it_is_read_is_no_failure(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another scheduler tries the stage again between our listing and our reading."""
    store.fail(KEY, Failure("r"))
    listing = os.listdir

    def cleared(path: Path) -> list[str]:
        names = listing(path)
        store.clear_failure(KEY)
        return names

    monkeypatch.setattr(os, "listdir", cleared)
    assert store.failure(KEY) is None


def test_a_specification_comes_back_as_json_has_it(store: Store) -> None:
    store.write_spec(KEY, {"kind": "train", "spec": {"milestones": (1, 2), "x": None}})
    assert store.spec(KEY) == {"kind": "train", "spec": {"milestones": [1, 2], "x": None}}


def test_there_is_no_progress_before_a_stage_reported_some_and_after_its_checkpoints_are_deleted(store: Store) -> None:
    assert store.progress(KEY) is None
    write_json(store.checkpoint_folder(KEY) / PROGRESS, Progress(0.5, "epoch 1/2"))
    assert store.progress(KEY) == Progress(0.5, "epoch 1/2")
    store.delete_checkpoints(KEY)
    assert store.progress(KEY) is None
    assert os.listdir(store.root / "work") == []


def test_every_kind_of_stage_has_its_folder(store: Store) -> None:
    assert set(KINDS) < set(os.listdir(store.root))


def test_a_checkpoint_is_known_by_when_it_was_saved(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.checkpointed(KEY) == 0
    work = store.checkpoint_folder(KEY)
    assert store.checkpointed(KEY) == 0
    for name, moment in (("part-1.safetensors", 5), ("part-2.safetensors", 9), (".part-3.safetensors.1.partial", 20)):
        (work / name).touch()
        os.utime(work / name, ns=(moment, moment))
    (work / "progress.json").touch()
    assert store.checkpointed(KEY) == 9


def test_garbage_collection_removes_old_scratch_folders_and_no_young_ones(store: Store) -> None:
    old, young = built(store), built(store)
    os.utime(old, (time.time() - 8 * 86400,) * 2)
    store.publish(KEY, built(store), Manifest("train"))
    os.utime(store.path(KEY), (time.time() - 8 * 86400,) * 2)
    collect_garbage(store)
    assert not old.exists()
    assert young.exists()
    assert store.has(KEY)
