"""Leases on claims: one worker at a time has a stage, and the claim of a worker that died is broken."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from threads import at_once

from kdbench.engine import leases
from kdbench.engine.leases import LEASE_SECONDS, NAMELESS_SECONDS
from kdbench.engine.store import Store, collect_garbage

KEY = "train/0123456789abcdef"
OTHER = "evaluate/0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


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


def test_a_claim_is_freed_when_its_holder_raises(store: Store) -> None:
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


@pytest.mark.parametrize(("silent", "free"), [(0, False), (LEASE_SECONDS - 20, False), (LEASE_SECONDS + 20, True)])
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
        os.utime(claim_file(store), (time.time() - LEASE_SECONDS - 20,) * 2)
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
        abandon(store, "elsewhere", 1, LEASE_SECONDS + 20)
        assert sum(at_once(crowd, claim)) == 1
    assert os.listdir(store.root / "claims") == []


def test_a_fresh_claim_is_not_taken_for_the_stale_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one has judged a claim to be stale and not yet removed it, a second comes and goes its whole way."""
    measure = leases._silent_seconds
    second: list[bool] = []

    def interrupted(path: Path) -> float:
        silent = measure(path)
        if not second:
            second.append(False)
            second[0] = held_by_second.enter_context(store.claim(KEY)) is not None
        return silent

    abandon(store, "elsewhere", 1, LEASE_SECONDS + 20)
    monkeypatch.setattr(leases, "_silent_seconds", interrupted)
    with ExitStack() as held_by_second, store.claim(KEY) as first:
        assert [first is not None, *second].count(True) == 1


def test_a_claim_made_while_another_was_let_go_holds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one looks for the holder of a claim, it is let go, and somebody else is faster to take it."""

    def let_go_and_taken(_: str) -> bool:
        monkeypatch.undo()
        claim_file(store).unlink()
        assert held_by_second.enter_context(store.claim(KEY)) is not None
        raise FileNotFoundError

    abandon(store, "elsewhere", 1, silent=0)
    monkeypatch.setattr(leases, "_is_dead", let_go_and_taken)
    with ExitStack() as held_by_second, store.claim(KEY) as late:
        assert late is None
        assert claim_file(store).exists()


def test_breaking_goes_on_after_one_that_died_while_breaking(store: Store, dead_pid: int) -> None:
    abandon(store, "elsewhere", 1, LEASE_SECONDS + 20)
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
        abandon(store, "elsewhere", 1, silent=LEASE_SECONDS - 20)
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
        monkeypatch.setattr(Path, "exists", lambda _: True)  # removed between the reading and the heartbeat
        held.heartbeat()


def test_probes_are_removed(store: Store) -> None:
    abandon(store, "elsewhere", 1, silent=0)
    for _ in range(5):
        with store.claim(KEY) as held:
            assert held is None
    assert os.listdir(store.root / "claims") == [claim_file(store).name]


def test_garbage_collection_removes_claims_of_the_dead_and_no_others(store: Store) -> None:
    with store.claim(KEY) as claim:
        dead = store.root / "claims" / "steal-dead"
        dead.write_text(f"{socket.gethostname()} {2**22 + 1} token")  # above any process number
        collect_garbage(store)
        assert claim
        assert [path.name for path in (store.root / "claims").iterdir()] == [KEY.replace("/", "-")]
