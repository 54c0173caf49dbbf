"""Leases: a stage is claimed by one worker at a time, and the claim of a worker that died is broken.

A lease is a file made with O_EXCL that names its holder; its heartbeat is the file's modification time. It only saves
work: correctness never rests on it. The leases of `filelock` were tried: they do not break the claim of another host that
fell silent long ago at the first look, and never an empty one.
"""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEASE_SECONDS = 300  # a lease without a heartbeat for so long is stale
NAMELESS_SECONDS = 5  # so is one whose maker died before it had written its name


class Lease:
    """A lease that is held."""

    def __init__(self, path: Path, holder: str) -> None:
        self._path, self._holder = path, holder

    def heartbeat(self) -> None:
        """Say that the holder is alive; does nothing when the lease was broken."""
        if _read(self._path) == self._holder:
            with suppress(FileNotFoundError):  # broken just now
                os.utime(self._path)


@contextmanager
def lease(path: Path) -> Iterator[Lease | None]:
    """Hold the lease at `path` inside; None when somebody alive holds it."""
    holder = _take(path)
    if not holder and break_stale(path):
        holder = _take(path)
    try:
        yield Lease(path, holder) if holder else None
    finally:
        if holder and _read(path) == holder:  # a lease that was broken may be somebody else's by now
            path.unlink(missing_ok=True)


def break_stale(path: Path) -> bool:
    """Remove the lease at `path` if it is stale; False when it is not, or another process is breaking it just now.

    One process at a time judges and removes: otherwise the second would remove the fresh lease that the first has made.
    """
    breaking = path.with_name(f"{path.name}.breaking")
    if not _take(breaking):
        _remove_stale(breaking)  # if its maker died while breaking, the next to come can
        return False
    try:
        return _remove_stale(path)
    finally:
        breaking.unlink(missing_ok=True)


def break_all_stale(folder: Path) -> None:
    """Remove the stale leases in a folder."""
    for path in folder.glob("[!.]*"):
        if not path.suffix:  # not one that is being broken right now
            break_stale(path)


def _take(path: Path) -> str:
    """Make a lease file; what it says (host, process, a random token), or nothing when there is one already."""
    holder = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return ""
    os.write(handle, holder.encode())
    os.close(handle)
    return holder


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _remove_stale(path: Path) -> bool:
    try:
        holder = path.read_text(encoding="utf-8")
        if not (_is_dead(holder) or _silent_seconds(path) > (LEASE_SECONDS if holder else NAMELESS_SECONDS)):
            return False
        path.unlink()
    except FileNotFoundError:  # its holder let go meanwhile
        pass
    return True


def _is_dead(holder: str) -> bool:
    """Whether the holder was a process of this host that has ended; nothing is known of other hosts."""
    host, pid, *_ = (*holder.split(), "", "")
    if host != socket.gethostname() or not pid:
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _silent_seconds(path: Path) -> float:
    """Seconds since the last heartbeat by the file server's clock: a probe's time of modification, not this machine's time."""
    probe = path.with_name(f".probe.{secrets.token_hex(4)}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()
