"""The store: finished stages appear whole or not at all, claims save work, and no file in it is a pickle."""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from helpers import blobs
from kdbench.engine import store as stores
from kdbench.engine.store import (
    CLAIM_SECONDS,
    KINDS,
    MANIFEST,
    NAMELESS_SECONDS,
    Store,
    collect_garbage,
    digest,
    file_digest,
    read_json,
    write_json,
)
from kdbench.engine.tensors import load_state, load_tensors, load_weights, save_state, save_tensors, save_weights
from kdbench.errors import KdbenchError
from kdbench.zoo.networks import mini_8

KEY = "train/0123456789abcdef"
OTHER = "score/0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def built(store: Store, key: str = KEY, **files: str) -> Path:
    """A folder with `files` (weights.txt by default), ready to be published."""
    folder = store.scratch(key)
    for name, text in (files or {"weights": "w"}).items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def claim_file(store: Store, key: str = KEY) -> Path:
    return store.root / "claims" / key.replace("/", "-")


def abandon(store: Store, host: str, pid: int, silent: float, key: str = KEY) -> None:
    """Leave a claim as a holder on `host` would that was last heard of `silent` seconds ago."""
    path = claim_file(store, key)
    path.write_text(f"{host} {pid}")
    os.utime(path, (time.time() - silent,) * 2)


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def at_once(count: int, act: Callable[[int], Any]) -> list[Any]:
    """What `act` returns in each of `count` threads that start together."""
    barrier = threading.Barrier(count)
    results: list[Any] = [None] * count

    def run(number: int) -> None:
        barrier.wait()
        results[number] = act(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# Keys


def test_a_digest_depends_on_values_and_not_on_their_order() -> None:
    one, other = {"a": 1, "b": {"c": (1, 2), "d": None}}, {"b": {"d": None, "c": [1, 2]}, "a": 1}
    assert digest(one) == digest(other)
    assert len(digest(one)) == 32
    assert digest(one) == hashlib.sha256(b'{"a":1,"b":{"c":[1,2],"d":null}}').hexdigest()[:32]


@pytest.mark.parametrize("other", [{"a": 2}, {"b": 1}, {"a": 1, "b": None}, {"a": "1"}, {"a": [1]}, {"a": True}])
def test_a_digest_changes_with_any_value(other: object) -> None:
    assert digest(other) != digest({"a": 1})


def test_what_is_not_a_number_has_no_digest() -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest({"a": float("nan")})


# Publishing


def test_a_published_stage_is_in_place_with_what_was_built(store: Store) -> None:
    assert store.publish(KEY, built(store, weights="w", notes="n"), {"metrics": {"loss": 0.5}}) is True
    assert store.has(KEY)
    assert store.finished() == {KEY}
    assert store.manifest(KEY)["metrics"] == {"loss": 0.5}
    assert store.manifest(KEY)["key"] == KEY
    assert (store.path(KEY) / "weights.txt").read_text() == "w"
    assert os.listdir(store.root / "tmp") == []


def test_a_manifest_lists_the_sha256_of_each_file_and_of_no_other(store: Store) -> None:
    store.publish(KEY, built(store, weights="abc", notes=""), {})
    folder = store.path(KEY)
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != MANIFEST}
    assert store.manifest(KEY)["files"] == found
    assert set(found) == {"weights.txt", "notes.txt"}
    assert found["weights.txt"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_second_publisher_discards_its_own_and_is_told(store: Store) -> None:
    store.publish(KEY, built(store, weights="first"), {"by": 1})
    second = built(store, weights="second", extra="x")
    assert store.publish(KEY, second, {"by": 2}) is False
    assert not second.exists()
    assert store.manifest(KEY)["by"] == 1
    assert (store.path(KEY) / "weights.txt").read_text() == "first"
    assert not (store.path(KEY) / "extra.txt").exists()


def test_of_many_who_publish_at_once_exactly_one_is_first(store: Store) -> None:
    for attempt in range(20):
        key = f"steal/{attempt}"
        folders = [built(store, key, weights=str(number)) for number in range(6)]

        def publish(number: int, key: str = key, folders: list[Path] = folders) -> bool:
            return store.publish(key, folders[number], {"by": number})

        wins = at_once(6, publish)
        assert sum(wins) == 1
        assert store.manifest(key)["by"] == wins.index(True)
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
            files = store.manifest(key)["files"]
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
        store.publish(key, built(store, key, **{f"file{i}": secrets.token_hex(2000) for i in range(5)}), {})
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
            store.publish(KEY, folder, {})
    assert store.finished() == set()
    assert store.publish(KEY, built(store), {}) is True


def test_everything_is_on_disk_before_the_name_appears(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(stores, "_fsync", lambda path: order.append(f"{path.name} {store.has(KEY)}"))
    folder = built(store, a="1", b="2")
    store.publish(KEY, folder, {})
    assert set(order[:3]) == {"a.txt False", "b.txt False", f"{MANIFEST} False"}
    assert order[3:] == [f"{folder.name} False", "train True"]


def test_a_rename_whose_reply_was_lost_is_still_ours(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def lossy(path: Path, target: Path) -> Path:
        rename(path, target)
        raise OSError("the server did not answer")

    monkeypatch.setattr(Path, "rename", lossy)
    assert store.publish(KEY, built(store), {}) is True
    assert (store.path(KEY) / "weights.txt").read_text() == "w"


def test_a_rename_that_fails_for_another_reason_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise OSError("no space left on device")

    folder = built(store)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        store.publish(KEY, folder, {})
    assert not store.has(KEY)


def test_scratch_folders_of_one_key_do_not_meet(store: Store) -> None:
    assert len({store.scratch(KEY) for _ in range(50)}) == 50


def test_a_discarded_stage_is_gone_and_can_be_published_again(store: Store) -> None:
    store.publish(KEY, built(store, weights="old"), {})
    store.publish(OTHER, built(store, OTHER), {})
    store.discard(KEY)
    assert store.finished() == {OTHER}
    assert not store.path(KEY).exists()
    assert os.listdir(store.root / "tmp") == []
    assert store.publish(KEY, built(store, weights="new"), {}) is True
    assert (store.path(KEY) / "weights.txt").read_text() == "new"


def test_discarding_what_is_not_there_is_nothing(store: Store) -> None:
    store.discard(KEY)
    assert store.finished() == set()


def test_a_store_opened_again_has_what_it_had(store: Store) -> None:
    store.publish(KEY, built(store), {"seconds": 1.5})
    again = Store(store.root)
    assert again.finished() == {KEY}
    assert again.manifest(KEY) == store.manifest(KEY)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_store_in_an_unusable_place_is_a_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KdbenchError, match=r"The store .*file.* cannot be used: .+\. Choose another with --store\."):
        Store(tmp_path / place)


# Failures, specifications, progress


def test_a_failure_is_kept_until_it_is_forgiven(store: Store) -> None:
    assert store.failure(KEY) is None
    store.fail(KEY, {"reason": "first", "traceback": "t"})
    store.fail(KEY, {"reason": "second", "traceback": "t"})
    assert store.failure(KEY) == {"reason": "second", "traceback": "t"}
    assert store.failure(OTHER) is None
    store.clear_failure(KEY)
    store.clear_failure(KEY)
    assert store.failure(KEY) is None


def test_a_failed_stage_is_not_published(store: Store) -> None:
    store.fail(KEY, {"reason": "r"})
    assert store.finished() == set()


def test_a_failure_that_is_forgiven_while_it_is_read_is_no_failure(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another driver tries the stage again between our listing and our reading."""
    store.fail(KEY, {"reason": "r"})
    listing = os.listdir

    def forgiven(path: Path) -> list[str]:
        names = listing(path)
        store.clear_failure(KEY)
        return names

    monkeypatch.setattr(os, "listdir", forgiven)
    assert store.failure(KEY) is None


def test_a_specification_comes_back_as_json_has_it(store: Store) -> None:
    store.write_spec(KEY, {"kind": "train", "spec": {"milestones": (1, 2), "x": None}})
    assert store.spec(KEY) == {"kind": "train", "spec": {"milestones": [1, 2], "x": None}}


def test_progress_is_empty_until_something_was_said_and_after_the_work_is_forgotten(store: Store) -> None:
    assert store.progress(KEY) == {}
    write_json(store.checkpoint_folder(KEY) / "progress.json", {"share": 0.5, "text": "half"})
    assert store.progress(KEY) == {"share": 0.5, "text": "half"}
    store.delete_checkpoints(KEY)
    assert store.progress(KEY) == {}
    assert os.listdir(store.root / "work") == []


def test_a_json_file_is_replaced_in_one_step(tmp_path: Path) -> None:
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


# Claims


def test_a_claim_is_exclusive_while_it_is_held(store: Store) -> None:
    with store.claim(KEY) as held:
        assert held is not None
        with store.claim(KEY) as second, store.claim(OTHER) as other:
            assert second is None
            assert other is not None
        with store.claim(KEY) as third:  # a refused claim frees nothing
            assert third is None
    with store.claim(KEY) as again:
        assert again is not None
    assert os.listdir(store.root / "claims") == []


def test_a_claim_is_freed_when_its_work_raises(store: Store) -> None:
    with pytest.raises(RuntimeError, match="broken"), store.claim(KEY):
        raise RuntimeError("broken")
    with store.claim(KEY) as held:
        assert held is not None


def test_of_many_who_claim_at_once_exactly_one_gets_it(store: Store) -> None:
    def claim(_: int) -> bool:
        with store.claim(KEY) as held:
            leaving.wait()
            return held is not None

    for _ in range(20):
        leaving = threading.Barrier(6)
        assert sum(at_once(6, claim)) == 1


def test_a_claim_of_a_dead_process_on_this_host_is_free_at_once(store: Store, dead_pid: int) -> None:
    abandon(store, socket.gethostname(), dead_pid, silent=0)
    with store.claim(KEY) as held:
        assert held is not None


def test_a_killed_process_frees_its_claim(store: Store) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kdbench.engine.store import Store\n"
        f"with Store(Path(sys.argv[1])).claim({KEY!r}) as held: print(held is not None, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "True\n"
        with store.claim(KEY) as held:
            assert held is None
        process.kill()
        process.wait()
    with store.claim(KEY) as held:
        assert held is not None


@pytest.mark.parametrize(("silent", "free"), [(0, False), (CLAIM_SECONDS - 20, False), (CLAIM_SECONDS + 20, True)])
def test_a_claim_from_elsewhere_holds_until_it_was_silent_for_too_long(store: Store, silent: float, free: bool) -> None:
    abandon(store, "elsewhere", 1, silent)
    with store.claim(KEY) as held:
        assert (held is not None) is free


def test_a_dead_number_on_another_host_says_nothing(store: Store, dead_pid: int) -> None:
    abandon(store, "elsewhere", dead_pid, silent=0)
    with store.claim(KEY) as held:
        assert held is None


def test_a_live_claim_on_this_host_holds(store: Store) -> None:
    abandon(store, socket.gethostname(), os.getpid(), silent=0)
    with store.claim(KEY) as held:
        assert held is None


@pytest.mark.parametrize(("silent", "free"), [(0, False), (NAMELESS_SECONDS - 2, False), (NAMELESS_SECONDS + 2, True)])
def test_a_claim_whose_holder_is_just_writing_its_name_holds_for_seconds(
    store: Store, silent: float, free: bool
) -> None:
    claim_file(store).touch()
    os.utime(claim_file(store), (time.time() - silent,) * 2)
    with store.claim(KEY) as held:
        assert (held is not None) is free
        assert claim_file(store).exists()
    assert claim_file(store).exists() is not free


def test_a_heartbeat_keeps_a_claim(store: Store) -> None:
    with store.claim(KEY) as held:
        assert held is not None
        os.utime(claim_file(store), (time.time() - CLAIM_SECONDS - 20,) * 2)
        held.heartbeat()
        with store.claim(KEY) as second:
            assert second is None


def test_silence_is_measured_by_the_clock_of_the_file_server(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is wrong by a day breaks no live claim."""
    abandon(store, "elsewhere", 1, silent=0)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with store.claim(KEY) as held:
        assert held is None


@pytest.mark.parametrize("crowd", [2, 8])
def test_a_claim_that_was_silent_for_too_long_is_broken_by_exactly_one(store: Store, crowd: int) -> None:
    def claim(_: int) -> bool:
        with store.claim(KEY) as held:
            leaving.wait()
            return held is not None

    for _ in range(200):
        leaving = threading.Barrier(crowd)
        abandon(store, "elsewhere", 1, CLAIM_SECONDS + 20)
        assert sum(at_once(crowd, claim)) == 1
    assert os.listdir(store.root / "claims") == []


def test_nobody_takes_a_fresh_claim_for_the_stale_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one has judged a claim to be stale and not yet removed it, a second comes and goes its whole way."""
    measure = stores._silent_seconds
    second: list[bool] = []

    def interrupted(path: Path) -> float:
        silent = measure(path)
        if not second:
            second.append(False)
            second[0] = competing_students.enter_context(store.claim(KEY)) is not None
        return silent

    abandon(store, "elsewhere", 1, CLAIM_SECONDS + 20)
    monkeypatch.setattr(stores, "_silent_seconds", interrupted)
    with ExitStack() as competing_students, store.claim(KEY) as first:
        assert [first is not None, *second].count(True) == 1


def test_a_claim_made_while_another_was_let_go_holds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one looks for the holder of a claim, it is let go, and somebody else is faster to take it."""

    def let_go_and_taken(_: str) -> bool:
        monkeypatch.undo()
        claim_file(store).unlink()
        assert competing_students.enter_context(store.claim(KEY)) is not None
        raise FileNotFoundError

    abandon(store, "elsewhere", 1, silent=0)
    monkeypatch.setattr(stores, "_is_dead", let_go_and_taken)
    with ExitStack() as competing_students, store.claim(KEY) as late:
        assert late is None
        assert claim_file(store).exists()


def test_breaking_goes_on_after_one_that_died_while_breaking(store: Store, dead_pid: int) -> None:
    abandon(store, "elsewhere", 1, CLAIM_SECONDS + 20)
    claim_file(store).with_name(f"{claim_file(store).name}.breaking").write_text(f"{socket.gethostname()} {dead_pid}")
    got = []
    for _ in range(3):
        with store.claim(KEY) as held:
            got.append(held is not None)
    assert any(got)
    assert os.listdir(store.root / "claims") == []


def test_a_holder_whose_claim_was_broken_leaves_the_next_ones_alone(store: Store) -> None:
    with store.claim(KEY) as slow:
        assert slow is not None
        claim_file(store).unlink()
        abandon(store, "elsewhere", 1, silent=CLAIM_SECONDS - 20)
        before = claim_file(store).stat().st_mtime
        slow.heartbeat()
        assert claim_file(store).stat().st_mtime == before
    with store.claim(KEY) as third:
        assert third is None


def test_a_heartbeat_of_a_claim_that_is_gone_is_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.claim(KEY) as held:
        assert held is not None
        claim_file(store).unlink()
        held.heartbeat()
        monkeypatch.setattr(Path, "exists", lambda _: True)  # removed between a look and the beat
        held.heartbeat()


def test_probes_are_removed(store: Store) -> None:
    abandon(store, "elsewhere", 1, silent=0)
    for _ in range(5):
        with store.claim(KEY) as held:
            assert held is None
    assert os.listdir(store.root / "claims") == [claim_file(store).name]


def test_sweeping_removes_claims_of_the_dead_and_no_others(store: Store) -> None:
    with store.claim(KEY) as claim:
        dead = store.root / "claims" / "steal-dead"
        dead.write_text(f"{socket.gethostname()} {2**22 + 1} token")  # above any process number
        collect_garbage(store)
        assert claim
        assert [path.name for path in (store.root / "claims").iterdir()] == [KEY.replace("/", "-")]


def test_sweeping_removes_old_scratch_folders_and_no_young_ones(store: Store) -> None:
    old, young = built(store), built(store)
    os.utime(old, (time.time() - 8 * 86400,) * 2)
    store.publish(KEY, built(store), {})
    os.utime(store.path(KEY), (time.time() - 8 * 86400,) * 2)
    collect_garbage(store)
    assert not old.exists()
    assert young.exists()
    assert store.has(KEY)


# Checkpoints and weights


def trained(
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer], steps: int = 3
) -> tuple[nn.Module, Any]:
    """A network after some steps on blobs, and the optimiser that took them."""
    data = blobs().train
    torch.manual_seed(0)
    net = mini_8(data.shape, data.classes)
    opt = optimizer(net.parameters())
    return step(net, opt, steps), opt


def step(net: nn.Module, opt: torch.optim.Optimizer, steps: int) -> nn.Module:
    data = blobs().train
    for _ in range(steps):
        opt.zero_grad()
        nn.functional.cross_entropy(net(data.x), data.y).backward()
        opt.step()
    return net


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True),
    "plain sgd": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 1e-3, fused=True),
}


def same(one: Any, other: Any) -> bool:
    """Equal down to bits and types; a tuple counts as a list."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimisers_state_comes_back_down_to_integer_keys(tmp_path: Path, name: str) -> None:
    net, opt = trained(OPTIMIZERS[name])
    save_state({"model": net.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "c")
    back = load_state(tmp_path / "c")
    assert same(opt.state_dict(), back["optimizer"])
    assert same(dict(net.state_dict()), back["model"])
    assert all(isinstance(key, int) for key in back["optimizer"]["state"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    net, opt = trained(OPTIMIZERS[name])
    save_state({"model": net.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "c")
    step(net, opt, 3)
    other, second = trained(OPTIMIZERS[name], steps=1)
    back = load_state(tmp_path / "c")
    other.load_state_dict(back["model"])
    second.load_state_dict(back["optimizer"])
    step(other, second, 3)
    assert same(dict(net.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        None,
        True,
        {"a": None, "b": False, "c": True, "d": 0, "e": -1.5, "f": "text", "g": ""},
        {"nested": [[1, [2, []]], {"x": [{"y": None}]}]},
        {1: "one", "1": "another", 2.5: None},
        {"inf": float("inf"), "small": 5e-324, "third": 1 / 3, "large": 2**70},
        {"betas": (0.9, 0.999)},
        [torch.tensor(3), torch.tensor(2.5, dtype=torch.float64), torch.empty(0, 3), torch.tensor([True, False])],
        {"bytes": torch.arange(5, dtype=torch.uint8), "half": torch.ones(2, dtype=torch.bfloat16)},
        {"strided": torch.arange(12).reshape(3, 4).T, "tensor": torch.zeros(1), "value": {"list": 1}},
    ],
    ids=repr,
)
def test_a_state_comes_back_as_it_was(tmp_path: Path, state: Any) -> None:
    save_state(state, tmp_path / "c")
    assert same(state, load_state(tmp_path / "c"))


def test_tensors_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    x = torch.arange(4.0)
    save_state({"x": x, "view": x[1:]}, tmp_path / "c")
    back = load_state(tmp_path / "c")
    back["x"].zero_()
    assert back["view"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "state",
    [{1, 2}, object(), b"bytes", 1j, nn.Linear(1, 1), lambda: 0, {"deep": [{"in": {3}}]}, {(1, 2): 3}, {b"k": 1}],
)
def test_a_state_of_anything_else_is_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(KdbenchError, match="a checkpoint holds"):
        save_state(state, tmp_path / "c")
    assert os.listdir(tmp_path) == []


def test_a_state_that_was_never_saved_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path / "absent") is None


def test_a_damaged_state_is_none(tmp_path: Path) -> None:
    """Cut off anywhere, empty, noise, or tensors that are no checkpoint: a checkpoint only saves work."""
    path = tmp_path / "c"
    save_state({"model": {"w": torch.arange(6.0)}, "epochs": 3}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert load_state(path) is None, length
    for noise in (b"\xff" * 200, b"\x80\x04}q\x00.", whole[:8] + b"x" * 300, b"{" * 500):
        path.write_bytes(noise)
        assert load_state(path) is None
    save_tensors({"w": torch.zeros(2)}, path)
    assert load_state(path) is None
    path.write_bytes(whole)
    assert load_state(path)["epochs"] == 3


def test_a_checkpoint_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    save_state({"epochs": 1}, path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_state({"epochs": 2}, path)
    assert load_state(path) == {"epochs": 1}


def test_checkpoints_and_weights_are_safetensors_and_json(tmp_path: Path) -> None:
    net, opt = trained(OPTIMIZERS["adam"])
    save_state({"model": net.state_dict(), "optimizer": opt.state_dict(), "epochs": 3}, tmp_path / "state")
    save_weights(net, tmp_path / "weights")
    with safe_open(tmp_path / "weights", framework="pt") as file:
        assert set(file.keys()) == set(net.state_dict())
    with safe_open(tmp_path / "state", framework="pt") as file:
        json.loads(file.metadata()["state"])
    for path in tmp_path.iterdir():
        length = int.from_bytes(path.read_bytes()[:8], "little")
        json.loads(path.read_bytes()[8 : 8 + length])  # the header of a safetensors file
        assert b"pickle" not in path.read_bytes()


def test_weights_come_back_in_eval_mode(tmp_path: Path) -> None:
    net, _ = trained(OPTIMIZERS["sgd"])
    save_weights(net, tmp_path / "w")
    torch.manual_seed(1)
    data = blobs().train
    other = load_weights(mini_8(data.shape, data.classes), tmp_path / "w")
    assert not any(module.training for module in other.modules())
    assert same(dict(net.state_dict()), dict(other.state_dict()))
    assert same(load_tensors(tmp_path / "w"), {name: net.state_dict()[name] for name in load_tensors(tmp_path / "w")})


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        save_weights(trained(OPTIMIZERS["sgd"])[0], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


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


def test_a_file_that_is_replaced_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with stores.replacing(path) as file:
        file.write("first")
        assert not path.exists()
    with contextlib.suppress(ZeroDivisionError), stores.replacing(path) as file:
        file.write("sec")
        raise ZeroDivisionError
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
