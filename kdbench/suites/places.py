"""File and line of what is wrong in a suite file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from kdbench.errors import KdbenchError
from kdbench.suites.old_spellings import modern_path
from kdbench.suites.sweeps import Sweep
from kdbench.suites.toml_lines import Path, keys_of, line_of


class Located(KdbenchError):
    """An error that names its place already."""


@dataclass
class Places:
    """Names file and line of the places of one suite file.

    changed: the paths that the command line changed; what is wrong there is not the file's fault. sweeps, swept: the
    sweeps of the file, and the name of the method that each of their points is made from.
    """

    file: str
    text: str
    changed: frozenset[Path]
    sweeps: Sequence[Sweep] = ()
    swept: dict[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> list[tuple[int, Path]]:
        """The lines of all tables and keys, under today's names."""
        return [(number, modern_path(key)) for number, key in keys_of(self.text)]

    @contextmanager
    def located(self, *path: str) -> Iterator[None]:
        """Put file and line before an error that is raised inside."""
        try:
            yield
        except Located:
            raise
        except KdbenchError as error:
            raise self.error((*path, error.field) if error.field else path, str(error)) from None

    def error(self, path: Sequence[str], sentence: str) -> KdbenchError:
        """The error for a mistake at `path`."""
        return Located(f"{self._beginning(tuple(path))}{sentence}")

    def line(self, path: Sequence[str]) -> int | None:
        """The line of a path, or of the table that holds it."""
        return line_of(self.keys, tuple(path))

    def _beginning(self, path: Path) -> str:
        """File and line as the beginning of a sentence; empty when the command line wrote what is wrong."""
        path = tuple(self.swept.get(name, name) for name in path)
        written = path in (key for _, key in self.keys)
        sweeps = [number for number, sweep in enumerate(self.sweeps) if list(path) in sweep.paths]
        if sweeps and not written:
            return self._of_sweep(sweeps[0])
        made = any(path[: len(change)] == change or change[: len(path)] == path for change in self.changed)
        if path in self.changed or (made and not written):
            return ""
        line = self.line(path)
        return f"{self.file}, line {line}: " if line else f"{self.file}: "

    def _of_sweep(self, number: int) -> str:
        headers = [line for line, key in self.keys if key == ("sweep",)]
        if ("sweep",) in self.changed or number >= len(headers):
            return ""
        return f"{self.file}, line {headers[number]}: "
