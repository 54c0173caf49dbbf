"""What a worker is told to do, as the store keeps it: here specifications cross the border between processes."""

from dataclasses import dataclass

from kdbench.engine.manifest import Json
from kdbench.engine.specs import StageSpec, read_spec
from kdbench.game.fields import build, plain


@dataclass(frozen=True)
class WorkerOptions:
    """What workers are told beside the specification; none of it changes what is computed.

    profile: whether trainings measure what a bare loop of theirs would do.
    """

    data_folder: str
    profile: bool = False


@dataclass(frozen=True)
class Order:
    """A stage to run. title: for people."""

    title: str
    spec: StageSpec
    options: WorkerOptions

    def to_json(self) -> Json:
        """As the store keeps it; `from_json` reads it back."""
        return {
            "kind": self.spec.kind,
            "title": self.title,
            "spec": plain(self.spec),
            "options": plain(self.options),
        }

    @classmethod
    def from_json(cls, value: Json) -> "Order":
        """What `to_json` wrote. Raises `KdbenchError` when another version of kdbench wrote it."""
        return cls(value["title"], read_spec(value), build(WorkerOptions, value["options"], "options"))
