"""The store: a folder of finished stages, safe to share between processes and machines.

<kind>/<digest>/ holds stage.json and the stage's files, renamed into place in one step: what is there is complete and never
changes. specs/ says what a key means, failures/ what went wrong, claims/ who is working, work/ holds checkpoints.
Absent names are looked up by listing, never by stat: a shared folder may remember for a while that a name was absent.
"""

import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path

from kdbench.engine import leases
from kdbench.engine.digests import file_digest
from kdbench.engine.json_files import read_json, write_json
from kdbench.engine.leases import Lease
from kdbench.engine.manifest import PROGRESS, Failure, Json, Manifest, Progress
from kdbench.errors import KdbenchError

KINDS = ("data", "train", "harden", "auxiliary", "steal", "evaluate")
MANIFEST = "stage.json"


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

    def manifest(self, key: str) -> Manifest:
        """What the finished stage `key` left, measured and took. Raises `KdbenchError` when its manifest is damaged."""
        return Manifest.from_json((self.path(key) / MANIFEST).read_bytes())

    def publish(self, key: str, built: Path, manifest: Manifest) -> bool:
        """Move the folder `built` to its place under `key`; False when another was first and ours is discarded.

        Adds stage.json with the SHA-256 of each file. Files and folders are on disk before the name appears.
        """
        token = secrets.token_hex(8)
        files = {path.name: file_digest(path) for path in sorted(built.iterdir())}
        write_json(built / MANIFEST, replace(manifest, key=key, files=files, token=token))
        for path in (*built.iterdir(), built):
            _fsync(path)
        try:
            built.rename(self.path(key))
        except OSError:
            # A lost reply is not a lost rename: ours is in place if it carries our token.
            mine = self.has(key) and self.manifest(key).token == token
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
        except FileNotFoundError:  # replaced or removed meanwhile: a worker is running it
            return time.time_ns()
        return max(saved, default=0)

    def progress(self, key: str) -> Progress | None:
        """What an unfinished stage last said of itself; None when it said nothing."""
        try:
            return Progress(**read_json(self.root / "work" / _flat(key) / PROGRESS))
        except (OSError, ValueError, TypeError):
            return None

    def write_spec(self, key: str, spec: Json) -> None:
        """Say what `key` means, for workers."""
        write_json(self.root / "specs" / f"{_flat(key)}.json", spec)

    def spec(self, key: str) -> Json:
        """What `key` means."""
        return read_json(self.root / "specs" / f"{_flat(key)}.json")

    def fail(self, key: str, failure: Failure) -> None:
        """Write down why a stage failed; it stays unpublished, so the next run tries it again."""
        write_json(self._failure_path(key), failure)

    def failure(self, key: str) -> Failure | None:
        """Why the last attempt at `key` failed, if it said so."""
        path = self._failure_path(key)
        try:
            return Failure(**read_json(path)) if path.name in os.listdir(path.parent) else None
        except FileNotFoundError:  # another scheduler cleared it meanwhile
            return None

    def _failure_path(self, key: str) -> Path:
        return self.root / "failures" / f"{_flat(key)}.json"

    def clear_failure(self, key: str) -> None:
        """Forget a failure, before another attempt."""
        self._failure_path(key).unlink(missing_ok=True)

    def discard(self, key: str) -> None:
        """Take a finished stage away (`--force`): renamed first, so that no one sees half of it."""
        discarded = self.root / "tmp" / f"{_flat(key)}.{secrets.token_hex(4)}.discarded"
        with suppress(FileNotFoundError):  # there is none, or another scheduler was first
            self.path(key).rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)

    def log_path(self, key: str) -> Path:
        """Where a worker's own output goes."""
        return self.root / "log" / f"{_flat(key)}.log"

    def claim(self, key: str) -> AbstractContextManager[Lease | None]:
        """Hold `key` while working on it; None when somebody alive holds it."""
        return leases.lease(self.root / "claims" / _flat(key))


def collect_garbage(store: Store, days: float = 7) -> None:
    """Remove stale claims (holders killed between publishing and letting go), and scratch folders of dead workers."""
    leases.break_all_stale(store.root / "claims")
    for folder in (store.root / "tmp").iterdir():
        if time.time() - folder.stat().st_mtime > days * 86400:
            shutil.rmtree(folder, ignore_errors=True)


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
