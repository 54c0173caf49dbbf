"""One thread: the protocol's arithmetic, and no contention with the workers that some tests start. And a tiny suite."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from auxiliary_runs import WITH_AUXILIARY
from surrogate_runs import WITH_SURROGATES

from kdbench.engine.numerics import Numerics
from kdbench.engine.plan import Plan
from kdbench.engine.planner import make_plan
from kdbench.suites import reader as suite
from kdbench.suites.methods import with_undefended
from kdbench.suites.suite import Suite
from runs import TINY, FinishedRun, RecordedProgress, run

torch.set_num_threads(1)
pytest.register_assert_rewrite("scheduler_processes")  # its assertions show what differs, as those of tests do


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("suites") / "tiny.toml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="session")
def tiny(tiny_file: str) -> Callable[..., Suite]:
    """Makes the suite above with some dotted paths changed."""

    def load(changes: Mapping[str, Any] | None = None) -> Suite:
        return with_undefended(suite.load(tiny_file, changes))

    return load


@pytest.fixture
def plan(tiny: Callable[..., Suite]) -> Callable[..., Plan]:
    """Plans the suite above with some dotted paths changed, on made-up data."""

    def make(changes: Mapping[str, Any] | None = None, numerics: Numerics | None = None, content: str = "d") -> Plan:
        return make_plan(tiny(changes), numerics or Numerics(), content)

    return make


@pytest.fixture(scope="session")
def golden(tiny: Callable[..., Suite], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder, progress_display = tmp_path_factory.mktemp("golden"), RecordedProgress()
    return FinishedRun(folder, run(tiny(), folder, progress_display), progress_display)


@pytest.fixture(scope="session")
def auxiliary_run(tiny: Callable[..., Suite], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The tiny suite with two defenses that have an auxiliary model; no test changes this folder."""
    folder, progress_display = tmp_path_factory.mktemp("auxiliary"), RecordedProgress()
    return FinishedRun(folder, run(tiny(WITH_AUXILIARY), folder, progress_display), progress_display)


@pytest.fixture(scope="session")
def surrogate_run(tiny: Callable[..., Suite], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """One cell of an attack that uses photographs; no test changes this folder."""
    folder, progress_display = tmp_path_factory.mktemp("with_surrogates"), RecordedProgress()
    return FinishedRun(folder, run(tiny(WITH_SURROGATES), folder, progress_display), progress_display)
