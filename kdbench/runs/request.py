"""What a person asks of a run: the suite's changes, and how to run it. Light to import: the command line makes one."""

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdbench.errors import KdbenchError


@dataclass(frozen=True)
class Options:
    """How to run a suite. Of these, device, threads, compile and fuse are part of every key; nothing else changes a number.

    out: the results folder; None: below `runs/`, by the suite's name. jobs: worker processes; None: one a core.
    executor: the registered name of what starts them.
    """

    store: Path = Path("runs/store")
    out: Path | None = None
    device: str = "auto"
    jobs: int | None = None
    threads: int = 1
    compile: bool = False
    fuse: int = 1
    data_dir: Path = Path("data")
    force: bool = False
    profile: bool = False
    executor: str = "local"


@dataclass(frozen=True)
class Request(Options):
    """The options of `kdbench run`: what to change in the suite, and how to run it.

    changes: as "PATH=VALUE", the value as TOML has it.
    """

    defense: Sequence[str] = ()
    attack: Sequence[str] = ()
    dataset: str | None = None
    student: Sequence[str] = ()
    seeds: int | None = None
    robustness: str | None = None
    precision: str | None = None
    changes: Sequence[str] = ()
    dry_run: bool = False
    quiet: bool = False

    def tree(self) -> dict[str, Any]:
        """What it changes in the suite file: dotted path -> value. Raises `KdbenchError` for a change without a path."""
        named = {
            "defenses": list(self.defense),
            "attacks": list(self.attack),
            "dataset": {"name": self.dataset} if self.dataset else None,
            "student.networks": list(self.student),
            "seeds": self.seeds,
            "robustness.level": self.robustness,
            "precision": self.precision,
        }
        chosen = {path: value for path, value in named.items() if value}
        return chosen | dict(_change(text) for text in self.changes)

    def folder(self, suite: str) -> Path:
        """The results folder. A changed suite gets one of its own: its cells are not those of the suite."""
        changes = self.tree()
        suffix = "-" + hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:6] if changes else ""
        return self.out or Path("runs") / f"{suite}{suffix}"


def _change(text: str) -> tuple[str, Any]:
    """PATH=VALUE, the value as TOML has it; what is not TOML is a string."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise KdbenchError(f"--set takes PATH=VALUE, such as attack.kd.temperature=20, not '{text}'.")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path, value
