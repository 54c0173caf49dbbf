"""What stages say of themselves: the manifest of a finished one, the progress of a running one, why one failed."""

from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kdbench.errors import KdbenchError

Json = dict[str, Any]
PROGRESS = "progress.json"  # in the folder of a stage's checkpoints


@dataclass(frozen=True, slots=True)
class Throughput:
    """What went through a stage's trainings in its last attempt, and how fast: `images` in so many `seconds`.

    bare_seconds: what bare loops of the same modules would have taken, for those trainings where that was measured;
    None when it was measured for none. compared_seconds: the part of `seconds` that those trainings took.
    """

    images: int = 0
    seconds: float = 0.0
    compared_seconds: float = 0.0
    bare_seconds: float | None = None

    def add(self, images: int, seconds: float, bare: float | None) -> "Throughput":
        """This and another training; bare: images/s of a bare loop."""
        if not bare:
            return Throughput(self.images + images, self.seconds + seconds, self.compared_seconds, self.bare_seconds)
        return Throughput(
            self.images + images,
            self.seconds + seconds,
            self.compared_seconds + seconds,
            (self.bare_seconds or 0.0) + images / bare,
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """What stage.json says of a finished stage.

    title: of the stage, for people. spec: its specification as JSON. metrics: what it measured, declared names only.
    numbers: what its method wrote down. pictures: names of PNG files. seconds: of the last attempt. machine: versions and
    hardware. content: digest of the tensors of a decoded data set. The store adds the rest when it publishes the stage:
    its key, the SHA-256 of each file, and a random token that tells two publications of one key apart.
    """

    kind: str
    title: str = ""
    spec: Json = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    seconds: float = 0.0
    throughput: Throughput = Throughput()
    machine: dict[str, str] = field(default_factory=dict)
    content: str = ""
    key: str = ""
    files: dict[str, str] = field(default_factory=dict)
    token: str = ""

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """What the store wrote. Raises `KdbenchError` when it is damaged, or another version of kdbench wrote it."""
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            raise KdbenchError(f"The manifest of a stage cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Progress:
    """What a running stage last said of itself: how much of its current computation is done (0 to 1), and a text."""

    share: float
    text: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt at a stage failed: a sentence for people, and where it happened."""

    reason: str
    traceback: str = ""


_ADAPTER = TypeAdapter(Manifest)
