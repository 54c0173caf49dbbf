"""Candidates that live in processes of their own, each in the environment in which it is used."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from kdbench.engine.numerics import ENVIRONMENT

# How a worker of kdbench keeps large blocks of memory; the usual research loop leaves the allocator as it is.
OURS = {name: value for name, value in ENVIRONMENT.items() if name.startswith("MALLOC")}


class Apart:
    """A candidate in a process of its own; a call is one turn of it, all others wait meanwhile."""

    def __init__(self, environment: dict[str, str], make: Callable[..., Callable[[], object]], *given: Any) -> None:
        """make: what builds the candidate there out of `given`; a function that can be imported."""
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, given))
        with _only(environment):
            self._process.start()
        self._here.recv()

    def __call__(self) -> None:
        self._here.send("go")
        self._here.recv()

    def close(self) -> None:
        """End the process."""
        self._here.send("stop")
        self._process.join()


def _serve(there: Connection, make: Callable[..., Callable[[], object]], given: tuple[Any, ...]) -> None:
    candidate = make(*given)
    there.send("ready")
    while there.recv() == "go":
        candidate()
        there.send("done")


@contextmanager
def _only(environment: dict[str, str]) -> Iterator[None]:
    """Of what kdbench sets for its workers, the environment holds just these inside."""
    before = dict(os.environ)
    for name in OURS:
        os.environ.pop(name, None)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
