"""The plan: which stages a suite needs, each once, and which of them each cell is made of."""

from dataclasses import dataclass, field

from kdbench.engine.numerics import Numerics
from kdbench.engine.parts import Keys
from kdbench.engine.specs import StageSpec, StealSpec, stage_key
from kdbench.game.data import DataSubset
from kdbench.game.threat import Scenario
from kdbench.records import cell_name
from kdbench.suites.suite import Choice, Suite

STAGES_OF_CELL = (
    "train",
    "harden",
    "auxiliary",
    "steal",
    "evaluate",
    "evaluate_victim",
)  # in the order in which they can fail


@dataclass(frozen=True, slots=True)
class Stage:
    """A unit of computation. Its key says all that its result depends on; `title` is for people, and unique in a plan."""

    spec: StageSpec
    title: str
    key: str

    @classmethod
    def of(cls, spec: StageSpec, title: str) -> "Stage":
        """The stage of this specification."""
        return cls(spec, title, stage_key(spec))

    @property
    def kind(self) -> str:
        """What kind of stage it is."""
        return self.spec.kind

    @property
    def inputs(self) -> Keys:
        """The stages it builds on."""
        return self.spec.inputs

    @property
    def fusible_group(self) -> str:
        """Equal for attack runs whose students may be trained together: the same network and recipe. "" for all others.

        Hardening is not fused: its loss may query the hardened model itself, whose weights lie elsewhere within an epoch.
        """
        return self.spec.training.digest if isinstance(self.spec, StealSpec) else ""


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """One defense against one attack by one student with one seed, and the stages it is made of; or why it is skipped.

    keys: of its stages, in the order of `STAGES_OF_CELL`, "" where it has none.
    """

    seed: int
    student: str
    defense: Choice | None
    attack: Choice
    subset: DataSubset
    scenario: Scenario
    keys: Keys
    skipped: str = ""
    bypassed: bool = False

    @property
    def stages(self) -> dict[str, str]:
        """The keys of its stages by name; none when it is skipped."""
        return {name: key for name, key in zip(STAGES_OF_CELL, self.keys, strict=False) if key}

    @property
    def name(self) -> str:
        """Its name in the results."""
        defense = self.defense.name if self.defense else None
        return cell_name(defense, self.attack.name, self.student, self.seed, self.subset.fraction, self.subset.seed)


@dataclass
class Plan:
    """All stages of a suite, each after those it builds on, and all cells."""

    suite: Suite
    numerics: Numerics
    data_digest: str
    stages: dict[str, Stage] = field(default_factory=dict)
    cells: list[PlannedCell] = field(default_factory=list)

    def add(self, spec: StageSpec, title: str) -> str:
        """Put a stage into the plan, once; its key."""
        stage = Stage.of(spec, title)
        return self.stages.setdefault(stage.key, stage).key
