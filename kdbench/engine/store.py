"""The store: a folder of finished stages, safe to share between processes and machines.

<kind>/<digest>/ holds stage.json and the stage's files, renamed into place in one step: what is there is complete and never
changes. specs/ says what a key means, failures/ what went wrong, claims/ who is at work, work/ holds checkpoints.
Absent names are looked up by listing, never by stat: a shared folder may remember for a while that a name was absent.
"""

import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from kdbench.errors import KdbenchError
from kdbench.game.fields import plain

KINDS = ("data", "train", "harden", "auxiliary", "steal", "evaluate")
MANIFEST = "stage.json"
CLAIM_SECONDS = 300  # a claim without a heartbeat for so long is nobody's
NAMELESS_SECONDS = 5  # nor is one whose maker died before it had written its name
Json = dict[str, Any]
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON of `value`, cut to 128 bits."""
    return json_digest(plain(value))


def json_digest(value: object) -> str:
    """The same of a value that is plain JSON already: a long plan has many thousands of them."""
    text = _CANONICAL.encode(value)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """Finished stages under `root`; a key is "<kind>/<digest>"."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        try:
            for name in (*KINDS, "specs", "failures", "claims", "work", "tmp", "log"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KdbenchError(
                f"The store {root} cannot be used: {error.strerror}. Choose another with --store."
            ) from None

    def path(self, key: str) -> Path:
        """Where the finished stage `key` lies."""
        return self.root / key

    def finished(self) -> set[str]:
        """The keys of all finished stages."""
        return {f"{kind}/{name}" for kind in KINDS for name in _names(self.root / kind)}

    def has(self, key: str) -> bool:
        """Whether the stage `key` is finished."""
        kind, name = key.split("/")
        return name in os.listdir(self.root / kind)

    def manifest(self, key: str) -> Json:
        """stage.json of a finished stage."""
        return read_json(self.path(key) / MANIFEST)

    def publish(self, key: str, built: Path, manifest: Mapping[str, Any]) -> bool:
        """Move the folder `built` to its place under `key`; False when somebody else was first and ours is discarded.

        Adds stage.json with the SHA-256 of each file. Files and folders are on disk before the name appears.
        """
        token = secrets.token_hex(8)
        files = {path.name: file_digest(path) for path in sorted(built.iterdir())}
        write_json(built / MANIFEST, {**manifest, "key": key, "files": files, "token": token})
        for path in (*built.iterdir(), built):
            _fsync(path)
        try:
            built.rename(self.path(key))
        except OSError:
            # A lost reply is not a lost rename: ours is in place if it carries our token.
            mine = self.has(key) and self.manifest(key)["token"] == token
            if not mine:
                shutil.rmtree(built, ignore_errors=True)
                if not self.has(key):
                    raise
            return mine
        _fsync(self.path(key).parent)
        return True

    def scratch(self, key: str) -> Path:
        """A fresh folder beside the stages, to build one in."""
        name = f"{_flat(key)}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        folder = self.root / "tmp" / name
        folder.mkdir()
        return folder

    def checkpoint_folder(self, key: str) -> Path:
        """The folder of checkpoints and progress of an unfinished stage."""
        folder = self.root / "work" / _flat(key)
        folder.mkdir(exist_ok=True)
        return folder

    def delete_checkpoints(self, key: str) -> None:
        """Remove checkpoints of a finished stage."""
        shutil.rmtree(self.root / "work" / _flat(key), ignore_errors=True)

    def checkpointed(self, key: str) -> int:
        """When an unfinished stage last saved a checkpoint, in nanoseconds of the file server's clock; 0: never."""
        try:
            saved = [path.stat().st_mtime_ns for path in (self.root / "work" / _flat(key)).glob("[!.]*.safetensors")]
        except FileNotFoundError:  # replaced or tidied up meanwhile: somebody is at it
            return time.time_ns()
        return max(saved, default=0)

    def progress(self, key: str) -> Json:
        """What an unfinished stage last said of itself: share (0 to 1) and text; empty when nothing."""
        try:
            return read_json(self.root / "work" / _flat(key) / "progress.json")
        except (OSError, ValueError):
            return {}

    def write_spec(self, key: str, spec: Mapping[str, Any]) -> None:
        """Say what `key` means, for workers."""
        write_json(self.root / "specs" / f"{_flat(key)}.json", spec)

    def spec(self, key: str) -> Json:
        """What `key` means."""
        return read_json(self.root / "specs" / f"{_flat(key)}.json")

    def fail(self, key: str, report: Mapping[str, Any]) -> None:
        """Write down why a stage failed; it stays unpublished, so the next run tries it again."""
        write_json(self.root / "failures" / f"{_flat(key)}.json", report)

    def failure(self, key: str) -> Json | None:
        """Why the last attempt at `key` failed, if it said so."""
        path = self.root / "failures" / f"{_flat(key)}.json"
        try:
            return read_json(path) if path.name in os.listdir(path.parent) else None
        except FileNotFoundError:  # another driver forgave it meanwhile
            return None

    def clear_failure(self, key: str) -> None:
        """Forget a failure, before another attempt."""
        (self.root / "failures" / f"{_flat(key)}.json").unlink(missing_ok=True)

    def discard(self, key: str) -> None:
        """Take a finished stage away (`--force`): renamed first, so that no one sees half of it."""
        grave = self.root / "tmp" / f"{_flat(key)}.{secrets.token_hex(4)}.discarded"
        with suppress(FileNotFoundError):  # there is none, or another driver was first
            self.path(key).rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def log_path(self, key: str) -> Path:
        """Where a worker's own output goes."""
        return self.root / "log" / f"{_flat(key)}.log"

    @contextmanager
    def claim(self, key: str) -> Iterator["Claim | None"]:
        """Hold `key` while working on it; None when somebody alive holds it. Saves work only: correctness never rests on it."""
        path = self.root / "claims" / _flat(key)
        mine = _take(path)
        if not mine and _break_stale(path):
            mine = _take(path)
        try:
            yield Claim(path, mine) if mine else None
        finally:
            if mine and _read(path) == mine:  # a claim that was broken may be somebody else's by now
                path.unlink(missing_ok=True)


class Claim:
    """A claim that is held; its heartbeat is the file's mtime."""

    def __init__(self, path: Path, mine: str) -> None:
        self._path, self._mine = path, mine

    def heartbeat(self) -> None:
        """Say that the holder is alive; nothing when the claim was broken."""
        if _read(self._path) == self._mine:
            with suppress(FileNotFoundError):  # broken just now
                os.utime(self._path)


def read_json(path: Path) -> Json:
    """The JSON object in a file."""
    value: Json = json.loads(path.read_text(encoding="utf-8"))
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace the file at `path` in one step."""
    with replacing(path) as file:
        file.write(json.dumps(plain(value), indent=1, sort_keys=True) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file to write that takes the place of the one at `path` in one step, if nothing breaks inside."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _names(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name


def _flat(key: str) -> str:
    return key.replace("/", "-")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take(path: Path) -> str:
    """Make a claim file; what it says (host, process, a random token), or nothing when there is one already."""
    mine = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return ""
    os.write(handle, mine.encode())
    os.close(handle)
    return mine


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _break_stale(path: Path) -> bool:
    """Remove a claim whose holder is dead; False when it is alive, or somebody else is breaking the claim just now.

    One at a time judges and removes: otherwise the second would remove the fresh claim that the first has made.
    """
    breaking = path.with_name(f"{path.name}.breaking")
    if not _take(breaking):
        _remove_stale(breaking)  # if its maker died while breaking, the next to come can
        return False
    try:
        return _remove_stale(path)
    finally:
        breaking.unlink(missing_ok=True)


def _remove_stale(path: Path) -> bool:
    try:
        holder = path.read_text(encoding="utf-8")
        if not (_is_dead(holder) or _silent_seconds(path) > (CLAIM_SECONDS if holder else NAMELESS_SECONDS)):
            return False
        path.unlink()
    except FileNotFoundError:  # its holder let go meanwhile
        pass
    return True


def _is_dead(holder: str) -> bool:
    """Whether a process of this host is no more; nothing is known of others."""
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
    """How long the claim's holder has been silent, by the file server's clock: a probe's mtime, not this machine's time."""
    probe = path.with_name(f".probe.{secrets.token_hex(4)}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


def collect_garbage(store: Store, days: float = 7) -> None:
    """Remove claims of the dead (killed between publishing and letting go), and scratch folders that died long ago."""
    for claim in (store.root / "claims").glob("[!.]*"):
        if not claim.suffix:  # not one that is being broken right now
            _break_stale(claim)
    for folder in (store.root / "tmp").iterdir():
        if time.time() - folder.stat().st_mtime > days * 86400:
            shutil.rmtree(folder, ignore_errors=True)
