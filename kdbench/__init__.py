"""kdbench: a benchmark of defenses against model stealing by knowledge distillation, and of the attacks on them.

    results = kdbench.run("digits")                # as `kdbench run digits`
    results = kdbench.load("results/digits")       # what a run has left behind
    results.frame().groupby("defense")["student_acc"].mean()

Heavy packages are imported when a function is called, not before.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdbench.runs.request import Request
    from kdbench.runs.results import Results

__version__ = "0.1.0"


def run(suite: str = "digits", request: "Request | None" = None) -> "Results":
    """Run a shipped suite or a suite file as `kdbench run` does, and return its results.

    request: what to change in the suite, and how to run it (`kdbench.runs.request.Request`). Raises `KdbenchError` for
    the user's mistakes; cells that fail are part of the results.
    """
    from kdbench.runs.command import open_session
    from kdbench.runs.request import Request
    from kdbench.runs.results import Results

    session = open_session(suite, request or Request())
    session.run()
    return Results.of(session.out)


def load(folder: str | Path) -> "Results":
    """The results in a folder. Raises `KdbenchError` when there are none, or a record is damaged."""
    from kdbench.runs.results import Results

    return Results.of(Path(folder))
